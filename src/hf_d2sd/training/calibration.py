"""`hf-d2sd calibrate`: temperatures that make a drafter's confidence the rate at which its tokens are accepted.

A temperature is kept where it helps on rows that it was not fitted on: with few rows most do not.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ..binding import bind
from ..checks import refuse_missing_packages, refuse_unknown_dtype, refuse_unwritable_file
from ..modeling import D2SDAssistant, D2SDDrafterConfig, D2SDDrafterModel
from ..pairs import is_pair, refuse_missing_folder
from .blocks import NO_LABEL, cut_blocks, draw_anchors, draw_prefix_lengths
from .drafters import Trainee
from .features import compute_features
from .shards import Row, batched, read_rows, refuse_missing_rows

logger = logging.get_logger(__name__)

GRID = torch.logspace(math.log10(0.2), math.log10(5), 129)  # temperatures that are tried
_BINS = 10
_NEUTRAL = len(GRID) // 2  # the temperature 1
_PREFIX_BASE = 0.9  # of a pair's second drafter: that of `hf-d2sd train`


@dataclass
class CalibrateOptions:
    """Fit a temperature for each slot of a drafter's block; save those that help on rows they were not fitted on."""

    drafter: Path = field(metadata={"help": "folder of a drafter, or of a pair; its config.json is written anew"})
    target: str = field(metadata={"help": "folder or Hub id of the target"})
    data: list[Path] = field(metadata={"help": "folders of `hf-d2sd distill`, one or more"})
    held_out: int = field(default=50, metadata={"help": "as in training: one row in so many is held out"})
    anchors: int = field(default=64, metadata={"help": "blocks out of each row"})
    rows: int = field(default=8, metadata={"help": "rows in a forward"})
    prefix_base: float | None = field(
        default=None,
        metadata={"help": "second drafter: v kept tokens with P(v) ∝ base^v; default: 0.9 in a pair, alone none"},
    )
    dtype: str = field(default="bfloat16", metadata={"help": "of the target"})
    plot: Path | None = field(default=None, metadata={"help": "PNG file for the reliability diagram (matplotlib)"})
    seed: int = field(default=0, metadata={"help": "of the blocks, and of the rows' two halves"})

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
            raise ValueError(f"{self.drafter} is no folder of drafters, whose config.json is to be written anew.")
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
    row: Tensor  # (M,), which row it is of: what is of one row is no independent evidence


def calibrate(options: CalibrateOptions) -> dict:
    """Fit, save what helps, and say what it changed. A seed splits the held-out rows in two halves.

    The temperatures are fitted on one half; a slot's is kept if it helps on the other, and if one fitted there helps
    on the first. Where the expected calibration error on the other half would not fall, nothing is stored.

    Returns:
        `temperatures` as stored, None for nothing, and the slots that `kept` theirs; reliability on the half that they
        were not fitted on, `before` at temperature 1, `fitted` with all, and `after` with those kept. Of a pair all of
        this for `first` and `second`.

    Raises:
        ValueError: if no row is held out, or a drafter does not fit the target.
    """
    options.check_places()
    rows = [row for row in read_rows(*options.data) if row.is_held_out(options.held_out) and row.response_length >= 2]
    if len(rows) < 2:
        folders = ", ".join(map(str, options.data))
        raise ValueError(f"{folders}: {len(rows)} held-out rows; two are needed. Lower --held_out.")
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=options.dtype).eval().requires_grad_(False)
    paired = is_pair(str(options.drafter))
    model = (D2SDAssistant if paired else D2SDDrafterModel).from_pretrained(options.drafter, dtype=torch.float32)
    pair = model if paired else D2SDAssistant.from_drafters(model)
    bind(pair.requires_grad_(False), target, AutoTokenizer.from_pretrained(options.target))
    random.Random(options.seed).shuffle(rows)
    config = model.config_class.from_pretrained(options.drafter)  # as it stands there, the weights' dtype included
    if not paired:
        return _calibrate(model, target, rows, options, config, config)
    of_second = replace(options, prefix_base=_PREFIX_BASE if options.prefix_base is None else options.prefix_base)
    each = {"first": replace(options, prefix_base=None), "second": of_second}
    return {
        role: _calibrate(drafter, target, rows, _own_plot(its, role), getattr(config, role), config)
        for drafter, (role, its) in zip(pair.drafters, each.items())
    }


def _own_plot(options: CalibrateOptions, role: str) -> CalibrateOptions:
    if options.plot is None:
        return options
    return replace(options, plot=options.plot.with_name(f"{options.plot.stem}-{role}{options.plot.suffix}"))


def _calibrate(model: D2SDDrafterModel, target, rows: list[Row], options: CalibrateOptions, own, whole) -> dict:
    """One drafter, whose temperatures go into its `own` config, a part of the `whole` one in the options' folder."""
    to_fit, to_measure = (gather(model, target, half, options) for half in (rows[::2], rows[1::2]))
    result = choose(to_fit, to_measure, model.config.block_size)
    if _note(own, result["temperatures"], options.drafter):
        whole.save_pretrained(options.drafter)
    if options.plot is not None:
        draw(result["before"], result["after"], options.plot)
    return {**result, "stored": result["temperatures"] is not None}


def choose(to_fit: Evidence, to_measure: Evidence, block_size: int) -> dict:
    """The temperatures to store, fitted on `to_fit`, and what they do on `to_measure`; as `calibrate` returns it."""
    fitted, crossed = fit(to_fit, block_size), fit(to_measure, block_size)
    kept = sorted(helping(fitted, to_measure) & helping(crossed, to_fit))
    chosen = [fitted[slot - 1] if slot in kept else 1.0 for slot in range(1, block_size)]
    neutral = [1.0] * len(fitted)
    before, all_fitted, after = (reliability(to_measure, values) for values in (neutral, fitted, chosen))
    if after["expected_calibration_error"] >= before["expected_calibration_error"]:
        kept, after = [], before
    return {
        "temperatures": chosen if kept else None,
        "kept": kept,
        "tokens": len(to_measure.slot),
        "before": before,
        "fitted": all_fitted,
        "after": after,
    }


def _note(config: D2SDDrafterConfig, temperatures: list[float] | None, folder: Path) -> bool:
    """Put the temperatures, or none, in the place of those of another run; whether that changes the config."""
    if temperatures is None:
        removed = config.confidence_temperatures is not None
        logger.warning(
            "No temperature helps on rows that it was not fitted on: nothing is stored"
            + (f", and the temperatures that {folder} had are removed." if removed else ".")
        )
        if not removed:
            return False
    config.confidence_temperatures = temperatures
    return True


@torch.no_grad()
def gather(model: D2SDDrafterModel, target, rows: list[Row], options: CalibrateOptions) -> Evidence:
    """Drafts of blocks in the target's own text. A slot counts if all drafted before it are right."""
    parts = list(_evidence(model, target, rows, options))
    return Evidence(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(Evidence)))


def _evidence(model, target, rows: list[Row], options: CalibrateOptions) -> Iterator[Evidence]:
    trainee, config = Trainee(model, target), model.config
    generator = torch.Generator().manual_seed(options.seed)
    for first, batch in tqdm(list(zip(itertools.count(0, options.rows), batched(rows, options.rows))), desc="rows"):
        anchors = draw_anchors(batch, options.anchors, generator)
        prefix_lengths = draw_prefix_lengths(anchors.shape, config.block_size, options.prefix_base or 0.0, generator)
        features = compute_features(target, batch, config.target_layer_ids)
        blocks = cut_blocks(batch, features, anchors, prefix_lengths, config)
        labelled = blocks.labels != NO_LABEL
        logits, places = trainee.guesses(blocks)
        tokens = places
        if config.draft_vocab_size is not None:
            tokens = model.draft_token_ids[tokens]
        right = torch.ones_like(labelled)
        right[labelled] = tokens == blocks.labels[labelled]
        reached = torch.ones_like(right)
        reached[..., 1:] = right[..., :-1].int().cumprod(-1).bool()
        counts = reached[labelled]
        slot = torch.arange(config.block_size, device=right.device).expand_as(right)[labelled]
        row = first + torch.arange(len(batch), device=right.device)[:, None, None].expand_as(right)[labelled]
        yield Evidence(slot[counts], confidences(logits[counts], places[counts]), right[labelled][counts], row[counts])


def confidences(logits: Tensor, places: Tensor | None = None, chunk: int = 64) -> Tensor:
    """(M, temperatures): the probability of a token of each of the logits (M, V) at each temperature of GRID.

    Args:
        places: (M,), which one's; by default the best's.
        chunk: rows at a time, few enough for a processor's own memory: four times as fast as 256 of them.
    """
    places = logits.argmax(-1) if places is None else places
    columns = []
    for part, chosen in zip(logits.float().split(chunk), places[:, None].split(chunk)):
        below = part - part.gather(1, chosen)
        columns.append(torch.stack([1 / torch.exp(below / t).sum(-1) for t in GRID.tolist()], dim=1))
    return torch.cat(columns) if columns else logits.new_zeros(0, len(GRID))


def fit(evidence: Evidence, block_size: int, prior: float = 20.0) -> list[float]:
    """For each slot 1..γ-1 the temperature of GRID whose confidences are likeliest, given what was right.

    Few tokens reach the late slots: to each slot's evidence the mean of all slots is added, with the weight of
    `prior` tokens.
    """
    losses = _loss(evidence.confidence, evidence.right[:, None])
    mean = losses.mean(0)
    totals = [losses[evidence.slot == slot].sum(0) + prior * mean for slot in range(1, block_size)]
    return [round(float(GRID[total.argmin()]), 4) for total in totals]


def _loss(confidence: Tensor, right: Tensor) -> Tensor:
    """Minus the logarithm of the probability of what happened, in the shape of `confidence`."""
    confidence = confidence.clamp(1e-6, 1 - 1e-6)
    return -torch.where(right, confidence, 1 - confidence).log()


def helping(temperatures: list[float], evidence: Evidence) -> set[int]:
    """The slots whose loss on other rows than it was fitted on a temperature lowers, by more than a standard error.

    The error is that of a sum over rows: the blocks of one row resemble each other.
    """
    before, after = evidence.confidence[:, _NEUTRAL], _at(evidence, temperatures)
    gains = (_loss(before, evidence.right) - _loss(after, evidence.right)).double()
    found = set()
    for slot in range(1, len(temperatures) + 1):
        here = evidence.slot == slot
        gain, (rows, row) = gains[here], evidence.row[here].unique(return_inverse=True)
        if len(rows) < 2:
            continue
        each = torch.zeros(len(rows), dtype=torch.float64, device=gain.device).index_add_(0, row, gain - gain.mean())
        if gain.sum() > (each.square().sum() * len(rows) / (len(rows) - 1)).sqrt():
            found.add(slot)
    return found


def _at(evidence: Evidence, temperatures: list[float]) -> Tensor:
    """(M,): each token's confidence at the temperature of its slot."""
    nearest = torch.tensor([int((GRID - value).abs().argmin()) for value in temperatures], device=evidence.slot.device)
    return evidence.confidence.gather(1, nearest[evidence.slot - 1][:, None])[:, 0]


def reliability(evidence: Evidence, temperatures: list[float]) -> dict:
    """Expected calibration error over ten bins of equal width, mean loss; share, confidence, accuracy of each bin."""
    confidence = _at(evidence, temperatures)
    loss = _loss(confidence, evidence.right).mean().item()
    which = (confidence * _BINS).long().clamp(max=_BINS - 1)
    bins, error = [], 0.0
    for index in range(_BINS):
        inside = which == index
        if inside.any():
            said, was = confidence[inside].mean().item(), evidence.right[inside].float().mean().item()
            share = inside.float().mean().item()
            bins.append({"share": round(share, 4), "confidence": round(said, 4), "accuracy": round(was, 4)})
            error += share * abs(said - was)
    return {"expected_calibration_error": round(error, 4), "loss": round(loss, 4), "bins": bins}


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
