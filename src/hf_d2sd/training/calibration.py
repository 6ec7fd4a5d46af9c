"""`hf-d2sd calibrate`: temperatures that make a drafter's confidence the rate at which its tokens are accepted."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import tqdm

from ..binding import bind
from ..checks import refuse_missing_packages, refuse_unknown_dtype, refuse_unwritable_file
from ..modeling import D2SDAssistant, D2SDDrafterModel
from ..pairs import is_pair, refuse_missing_folder
from .blocks import NO_LABEL, cut_blocks, draw_anchors, draw_prefix_lengths
from .drafters import Trainee
from .features import compute_features
from .shards import Row, batched, read_rows, refuse_missing_rows

GRID = torch.logspace(math.log10(0.2), math.log10(5), 129)  # temperatures that are tried
_BINS = 10


@dataclass
class CalibrateOptions:
    """Fit a temperature for each slot of a drafter's block, on held-out rows, and save it in the drafter's config."""

    drafter: Path = field(metadata={"help": "folder of the drafter; its config.json is written anew"})
    target: str = field(metadata={"help": "folder or Hub id of the target"})
    data: list[Path] = field(metadata={"help": "folders of `hf-d2sd distill`, one or more"})
    held_out: int = field(default=50, metadata={"help": "as in training: one row in so many is held out"})
    anchors: int = field(default=64, metadata={"help": "blocks out of each row"})
    rows: int = field(default=8, metadata={"help": "rows in a forward"})
    prefix_base: float = field(default=0.0, metadata={"help": "second drafter: v kept tokens with P(v) ∝ base^v"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the target"})
    plot: Path | None = field(default=None, metadata={"help": "PNG file for the reliability diagram (matplotlib)"})
    seed: int = 0

    def __post_init__(self):
        self.drafter = Path(self.drafter)
        self.data = [Path(folder) for folder in ([self.data] if isinstance(self.data, (str, Path)) else self.data)]
        self.plot = Path(self.plot) if self.plot is not None else None
        if self.held_out < 2 or self.anchors < 1 or self.rows < 1:
            raise ValueError(
                "held_out must be at least 2, anchors and rows at least 1; got "
                f"{self.held_out}, {self.anchors} and {self.rows}."
            )
        refuse_unknown_dtype(self.dtype, "auto")
        if self.plot is not None:
            refuse_missing_packages("--plot", "train", "matplotlib")
            refuse_unwritable_file("--plot", self.plot)
            _refuse_unknown_picture(self.plot)

    def check_places(self) -> None:
        """Raises `ValueError` for folders without a drafter or rows."""
        refuse_missing_folder(self.target)
        if not (self.drafter / "config.json").is_file():
            raise ValueError(f"{self.drafter} is no folder of a drafter, whose config.json is to be written anew.")
        if is_pair(str(self.drafter)):
            raise ValueError(f"{self.drafter} is a pair: calibrate its drafters, then join them by `hf-d2sd join`.")
        refuse_missing_rows(self.data)


def _refuse_unknown_picture(path: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise ValueError(
            f"--plot is {path}, a kind of file that matplotlib does not write; it writes {', '.join(kinds)}."
        )


@dataclass(frozen=True)
class Evidence:
    """What M drafted tokens said of themselves, and what became of them; only slots that decoding would reach."""

    slot: Tensor  # (M,), 1..γ-1
    confidence: Tensor  # (M, temperatures), the draft's probability of its own token at each temperature of GRID
    right: Tensor  # (M,), bool: the target wrote the same token


def calibrate(options: CalibrateOptions) -> dict:
    """Fit, save, and say what it changed; the held-out rows are split in half: one to fit on, one to measure on.

    Raises:
        ValueError: if no row is held out, or the drafter does not fit the target.
    """
    options.check_places()
    rows = [row for row in read_rows(*options.data) if row.is_held_out(options.held_out) and row.response_length >= 2]
    if len(rows) < 2:
        folders = ", ".join(map(str, options.data))
        raise ValueError(f"{folders}: {len(rows)} held-out rows; two are needed. Lower --held_out.")
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=options.dtype).eval().requires_grad_(False)
    model = D2SDDrafterModel.from_pretrained(options.drafter, dtype=torch.float32).requires_grad_(False)
    bind(D2SDAssistant.from_drafters(model), target, AutoTokenizer.from_pretrained(options.target))
    to_fit, to_measure = (gather(model, target, half, options) for half in (rows[::2], rows[1::2]))
    temperatures = fit(to_fit, model.config.block_size)
    model.config.confidence_temperatures = temperatures
    model.config.save_pretrained(options.drafter)
    neutral = [1.0] * len(temperatures)
    before, after = (reliability(to_measure, values) for values in (neutral, temperatures))
    if options.plot is not None:
        draw(before, after, options.plot)
    return {"temperatures": temperatures, "tokens": len(to_measure.slot), "before": before, "after": after}


@torch.no_grad()
def gather(model: D2SDDrafterModel, target, rows: list[Row], options: CalibrateOptions) -> Evidence:
    """Drafts of blocks in the target's own text. A slot counts if all drafted before it are right."""
    parts = list(_evidence(model, target, rows, options))
    return Evidence(*(torch.cat([getattr(part, name) for part in parts]) for name in ("slot", "confidence", "right")))


def _evidence(model, target, rows: list[Row], options: CalibrateOptions) -> Iterator[Evidence]:
    trainee, config = Trainee(model, target), model.config
    generator = torch.Generator().manual_seed(options.seed)
    for batch in tqdm(list(batched(rows, options.rows)), desc="held-out rows"):
        anchors = draw_anchors(batch, options.anchors, generator)
        prefix_lengths = draw_prefix_lengths(anchors.shape, config.block_size, options.prefix_base, generator)
        features = compute_features(target, batch, config.target_layer_ids)
        blocks = cut_blocks(batch, features, anchors, prefix_lengths, config)
        labelled = blocks.labels != NO_LABEL
        logits = trainee.logits(blocks)
        tokens = logits.argmax(-1)
        if config.draft_vocab_size is not None:
            tokens = model.draft_token_ids[tokens]
        right = torch.ones_like(labelled)
        right[labelled] = tokens == blocks.labels[labelled]
        reached = torch.ones_like(right)
        reached[..., 1:] = right[..., :-1].int().cumprod(-1).bool()
        counts = reached[labelled]
        slot = torch.arange(config.block_size, device=right.device).expand_as(right)[labelled]
        yield Evidence(slot[counts], confidences(logits[counts]), right[labelled][counts])


def confidences(logits: Tensor, chunk: int = 256) -> Tensor:
    """(M, temperatures): the probability of the best of the logits (M, V) at each temperature of GRID."""
    columns = []
    for part in logits.float().split(chunk):
        below = part - part.max(-1, keepdim=True).values
        columns.append(torch.stack([1 / torch.exp(below / t).sum(-1) for t in GRID.tolist()], dim=1))
    return torch.cat(columns) if columns else logits.new_zeros(0, len(GRID))


def fit(evidence: Evidence, block_size: int, prior: float = 20.0) -> list[float]:
    """For each slot 1..γ-1 the temperature of GRID whose confidences are likeliest, given what was right.

    Few tokens reach the late slots: to each slot's evidence the mean of all slots is added, with the weight of
    `prior` tokens.
    """
    confidence = evidence.confidence.clamp(1e-6, 1 - 1e-6)
    losses = -torch.where(evidence.right[:, None], confidence, 1 - confidence).log()  # (M, temperatures)
    mean = losses.mean(0)
    totals = [losses[evidence.slot == slot].sum(0) + prior * mean for slot in range(1, block_size)]
    return [round(float(GRID[total.argmin()]), 4) for total in totals]


def reliability(evidence: Evidence, temperatures: list[float]) -> dict:
    """Expected calibration error over ten bins of equal width, and each bin's share, mean confidence and accuracy."""
    nearest = torch.tensor([int((GRID - value).abs().argmin()) for value in temperatures])
    confidence = evidence.confidence.gather(1, nearest[evidence.slot - 1][:, None])[:, 0]
    which = (confidence * _BINS).long().clamp(max=_BINS - 1)
    bins, error = [], 0.0
    for index in range(_BINS):
        inside = which == index
        if inside.any():
            said, was = confidence[inside].mean().item(), evidence.right[inside].float().mean().item()
            share = inside.float().mean().item()
            bins.append({"share": round(share, 4), "confidence": round(said, 4), "accuracy": round(was, 4)})
            error += share * abs(said - was)
    return {"expected_calibration_error": round(error, 4), "bins": bins}


def draw(before: dict, after: dict, path: Path) -> None:
    """The reliability diagram: accuracy against confidence, before and after."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, result, style in (("before", before, "o--"), ("after", after, "o-")):
        said, was = ([point[key] for point in result["bins"]] for key in ("confidence", "accuracy"))
        axes.plot(said, was, style, label=f"{name}: error {result['expected_calibration_error']:.3f}")
    axes.set(xlabel="confidence", ylabel="share that the target wrote too", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150, metadata={"Title": json.dumps(after["expected_calibration_error"])})
