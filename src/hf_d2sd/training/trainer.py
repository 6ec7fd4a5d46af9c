"""`hf-d2sd train`: one drafter, from the target's own text; alone, or on many devices by `accelerate launch`."""

import copy
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import tqdm

from ..integration import bind
from ..modeling import D2SDAssistant, D2SDDrafterModel
from .blocks import Blocks, cut_blocks, draw_anchors, draw_prefix_lengths, epoch_batches
from .drafters import Trainee, drafter_config, new_drafter
from .features import CachedFeatures, CachedRow, compute_features
from .losses import SCHEMES
from .shards import (
    Row,
    append_json_line,
    read_json_lines,
    read_metadata,
    read_rows,
    refuse_other_options,
    write_atomically,
)


@dataclass
class TrainOptions:
    """Train one drafter on the rows of `hf-d2sd distill`; a run that was killed goes on from its last checkpoint."""

    target: str = field(metadata={"help": "folder or Hub id of the target"})
    data: Path = field(metadata={"help": "folder of `hf-d2sd distill`"})
    out: Path = field(metadata={"help": "folder of the run: checkpoint, log, the last and the best drafter"})
    role: str = field(default="first", metadata={"help": "first, or second", "choices": ["first", "second"]})
    first: str | None = field(default=None, metadata={"help": "second: the trained first drafter, a folder or Hub id"})
    features: str = field(
        default="cache",
        metadata={
            "help": "cache: computed once, kept on disk; online: in each step",
            "choices": ["cache", "online"],
        },
    )
    block_size: int = field(default=16, metadata={"help": "γ"})
    num_layers: int = field(default=2, metadata={"help": "of the drafter"})
    target_layer_ids: list[int] | None = field(default=None, metadata={"help": "layers to read; default: spread out"})
    intermediate_size: int | None = field(default=None, metadata={"help": "of the drafter; default: the target's"})
    qk_norm: bool = field(default=True, metadata={"help": "norm queries and keys, as Qwen3 does"})
    sliding_window: int | None = field(default=None, metadata={"help": "of all the drafter's layers; default: none"})
    draft_vocab_size: int | None = field(default=None, metadata={"help": "how many frequent tokens; default: all"})
    mask_token: str | None = field(default=None, metadata={"help": "default: the tokenizer's, or one the rows lack"})
    init_layers: str = field(
        default="random", metadata={"help": "random, or target: its top layers", "choices": ["random", "target"]}
    )
    loss: str = field(default="decay", metadata={"help": "weights of the slots", "choices": list(SCHEMES)})
    tau: float | None = field(default=None, metadata={"help": "of decay; default: 7, 5, 4 from γ = 16, 10, 8 down"})
    prefix_base: float = field(default=0.9, metadata={"help": "second: v kept tokens with P(v) ∝ base^v"})
    on_policy: float = field(
        default=0.5,
        metadata={"help": "second: share of blocks kept up to where the first drafter is wrong (needs --first)"},
    )
    epochs: float = 6.0
    max_steps: int | None = field(default=None, metadata={"help": "instead of epochs"})
    rows: int = field(default=4, metadata={"help": "rows in a forward, on each device"})
    anchors: int = field(default=64, metadata={"help": "blocks out of each row"})
    max_length: int = field(default=3072, metadata={"help": "longer rows are cut"})
    accumulation: int = field(default=1, metadata={"help": "forwards in an update"})
    lr: float = 6e-4
    warmup: float = field(default=0.04, metadata={"help": "share of the steps"})
    weight_decay: float = 0.01
    clip: float = field(default=1.0, metadata={"help": "greatest norm of the gradient"})
    ema: float | None = field(default=None, metadata={"help": "decay of averaged weights, e.g. 0.999"})
    mixed_precision: str = field(default="bf16", metadata={"help": "bf16 or no", "choices": ["bf16", "no"]})
    attention: str = field(default="sdpa", metadata={"help": "sdpa, or flex_attention (CUDA): skips masked tiles"})
    loss_chunk: int = field(default=1024, metadata={"help": "slots whose logits exist at a time"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the target"})
    held_out: int = field(default=50, metadata={"help": "one row in so many is kept for evaluation"})
    eval_every: int = field(default=500, metadata={"help": "updates"})
    eval_rows: int = field(default=16, metadata={"help": "held-out prompts to decode"})
    eval_tokens: int = field(default=64, metadata={"help": "new tokens of each"})
    save_every: int = field(default=100, metadata={"help": "updates"})
    log_every: int = field(default=20, metadata={"help": "updates"})
    stop_after: float | None = field(default=None, metadata={"help": "minutes; the same command then goes on"})
    trackers: list[str] = field(default_factory=list, metadata={"help": "of accelerate: tensorboard, trackio, wandb"})
    seed: int = 0

    def __post_init__(self):
        self.data, self.out = Path(self.data), Path(self.out)
        for name in "num_layers rows anchors accumulation loss_chunk eval_every save_every log_every".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.held_out < 2:
            raise ValueError(f"held_out must be at least 2, one row in so many; got {self.held_out}.")
        if self.role == "first":
            self.prefix_base = self.on_policy = 0.0
        elif self.first is None:
            self.on_policy = 0.0
        if self.tau is None:
            self.tau = 7.0 if self.block_size >= 16 else 5.0 if self.block_size >= 10 else 4.0


def train(options: TrainOptions) -> dict:
    """Train until the last step; returns what was last measured.

    Raises:
        ValueError: for rows that are missing or damaged, or options that do not fit the target or the run.
        FloatingPointError: for a loss that is not finite; the last checkpoint is kept.
    """
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulation,
        log_with=options.trackers or None,
        project_dir=options.out,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=options.dtype).eval().requires_grad_(False)
    target.to(accelerator.device)
    trainer = Trainer(options, target, AutoTokenizer.from_pretrained(options.target), accelerator)
    trainer.load()
    return trainer.run()


class Trainer:
    """A run that can stop after any update: what is random is drawn from the seed and the step alone."""

    def __init__(self, options: TrainOptions, target, tokenizer, accelerator: Accelerator):
        self.options, self.target, self.accelerator = options, target, accelerator
        rows = read_rows(options.data)
        self.first = self._load_first()
        model = self._new_model(tokenizer, rows)
        if options.features == "cache":
            cache = CachedFeatures(options.data, model.config.target_layer_ids)
            with accelerator.main_process_first():
                cache.fill(target, batch_size=options.rows)
            rows = cache.locate()
        self.rows, self.held_out = self._split(rows)
        self.trainee = Trainee(model.to(accelerator.device), target, options.loss, options.tau, options.loss_chunk)
        self.optimizer = torch.optim.AdamW(
            self.trainee.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay, fused=True
        )
        self.wrapped, self.optimizer = accelerator.prepare(self.trainee, self.optimizer)
        self.averaged = [p.detach().clone() for p in self.trainee.parameters()] if options.ema else None
        if self.first is not None:
            self._first_trainee = Trainee(self.first, target, chunk=options.loss_chunk)
        self.step, self.best = 0, 0.0
        self._epoch: tuple[int, list[list[int]]] | None = None  # the present epoch's batches

    # What is trained -------------------------------------------------------------------------------------------------

    def _load_first(self) -> D2SDDrafterModel | None:
        if self.options.role == "first" or self.options.first is None:
            return None
        first = D2SDDrafterModel.from_pretrained(self.options.first, dtype=torch.float32)
        return first.to(self.accelerator.device).eval().requires_grad_(False)

    def _new_model(self, tokenizer, rows: list[Row]) -> D2SDDrafterModel:
        options = self.options
        changes = dict(
            block_size=options.block_size,
            num_hidden_layers=options.num_layers,
            target_layer_ids=options.target_layer_ids,
            intermediate_size=options.intermediate_size,
            qk_norm=options.qk_norm,
            sliding_window=options.sliding_window,
            layer_types=["sliding_attention"] * options.num_layers if options.sliding_window else None,
            draft_vocab_size=options.draft_vocab_size,
            mask_token_id=self._mask_token_id(tokenizer),
        )
        config = drafter_config(self.target, tokenizer, rows, **changes)
        config._attn_implementation = options.attention
        model = new_drafter(config, self.target, rows, options.init_layers, options.seed)
        if self.first is not None and config.draft_vocab_size is not None:
            if self.first.config.draft_vocab_size == config.draft_vocab_size:
                model.draft_token_ids.copy_(self.first.draft_token_ids)  # what both can say is the same
        bind(D2SDAssistant.from_drafters(model), self.target, tokenizer)
        return model

    def _mask_token_id(self, tokenizer) -> int | None:
        if self.options.mask_token is None:
            return self.first.config.mask_token_id if self.first is not None else None
        token = tokenizer.convert_tokens_to_ids(self.options.mask_token)
        if token is None or token == tokenizer.unk_token_id:
            raise ValueError(f"mask_token {self.options.mask_token!r} is no token of the target's tokenizer.")
        return token

    def _split(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """Rows to train on, and rows held out; both cut to `max_length`, with at least two response tokens."""
        parts = [], []
        for row in rows:
            held_out = row.is_held_out(self.options.held_out)
            if min(len(row.tokens), self.options.max_length) - row.prompt_length >= 2:
                parts[held_out].append(_cut(row, self.options.max_length))
        training, held_out = parts
        if len(training) < self.batch_size or not held_out:
            raise ValueError(
                f"{self.options.data} has {len(training)} rows to train on and {len(held_out)} held out; a batch "
                f"takes {self.batch_size}, and one must be held out. Write more rows, or lower `rows` or `held_out`."
            )
        return training, held_out

    @property
    def batch_size(self) -> int:
        """Rows in one forward of all devices."""
        return self.options.rows * self.accelerator.num_processes

    @property
    def total_steps(self) -> int:
        if self.options.max_steps is not None:
            return self.options.max_steps
        forwards = self.options.epochs * (len(self.rows) // self.batch_size)
        return max(1, round(forwards / self.options.accumulation))

    # One update ------------------------------------------------------------------------------------------------------

    def blocks(self, forward: int) -> Blocks:
        """This device's blocks in a forward, counted from 0 over the whole run."""
        options, process = self.options, self.accelerator.process_index
        rows = [self.rows[i] for i in self._batch(forward)[process :: self.accelerator.num_processes]]
        generator = torch.Generator().manual_seed((1_000_003 * options.seed + forward) * 4096 + process)
        anchors = draw_anchors(rows, options.anchors, generator)
        prefix_lengths = draw_prefix_lengths(anchors.shape, options.block_size, options.prefix_base, generator)
        features = self.features(rows)
        if options.on_policy:
            accepted = self._accepted_by_first(rows, features, anchors).to("cpu").clamp(max=options.block_size - 2)
            on_policy = torch.rand(anchors.shape, generator=generator) < options.on_policy
            prefix_lengths = torch.where(on_policy, accepted, prefix_lengths)
        return cut_blocks(rows, features, anchors, prefix_lengths, self.trainee.model.config)

    def _batch(self, forward: int) -> list[int]:
        """The rows of a forward on all devices."""
        epoch, index = divmod(forward, len(self.rows) // self.batch_size)
        if self._epoch is None or self._epoch[0] != epoch:
            lengths = [len(row.tokens) for row in self.rows]
            self._epoch = epoch, epoch_batches(lengths, epoch, self.batch_size, self.options.seed)
        return self._epoch[1][index]

    def features(self, rows: list[Row]) -> list[Tensor]:
        if isinstance(rows[0], CachedRow):
            return [row.read_features().to(self.accelerator.device) for row in rows]
        return compute_features(self.target, rows, self.trainee.model.config.target_layer_ids)

    @torch.no_grad()
    def _accepted_by_first(self, rows: list[Row], features: list[Tensor], anchors: Tensor) -> Tensor:
        """(B, N): how many tokens of the first drafter's block the target would take: the second's prefix lengths."""
        if self.first.config.target_layer_ids != self.trainee.model.config.target_layer_ids:
            raise ValueError(
                f"on_policy needs drafters that read the same layers; the first reads "
                f"{self.first.config.target_layer_ids}. Pass them as target_layer_ids, or --on_policy 0."
            )
        blocks = cut_blocks(rows, features, anchors, torch.zeros_like(anchors), self.first.config)
        with self.accelerator.autocast():
            _, right, _ = self._first_trainee(blocks)
        return right[..., 1:].int().cumprod(-1).sum(-1)

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to 0."""
        progress = self.step / self.total_steps
        if progress < self.options.warmup:
            return self.options.lr * (progress + 1 / self.total_steps) / self.options.warmup
        share = (progress - self.options.warmup) / max(1 - self.options.warmup, 1e-9)
        return self.options.lr * 0.5 * (1 + math.cos(math.pi * share))

    def update(self) -> Tensor:
        """One update; returns its mean loss (), on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = min(self.learning_rate(), self.options.lr)
        losses = []
        for i in range(self.options.accumulation):
            with self.accelerator.accumulate(self.wrapped):
                loss, _, _ = self.wrapped(self.blocks(self.step * self.options.accumulation + i))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trainee.parameters(), self.options.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        self.step += 1
        if self.averaged is not None:
            torch._foreach_lerp_(self.averaged, list(self.trainee.parameters()), 1 - self.options.ema)
        return torch.stack(losses).mean()

    # The run ---------------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        self.accelerator.init_trackers("hf-d2sd", config={k: str(v) for k, v in asdict(self.options).items()})
        measured = {}
        started = time.monotonic()
        for window in self._windows():
            self._log(loss=window, lr=self.learning_rate())
            if self.step % self.options.eval_every == 0 or self.step == self.total_steps:
                measured = self._evaluate()
            if self.step % self.options.save_every == 0 or self.step == self.total_steps:
                self.save()
                if self.options.stop_after is not None and time.monotonic() - started > 60 * self.options.stop_after:
                    break
        self.accelerator.end_training()
        return {"step": self.step, **measured}

    def _windows(self) -> Iterator[float]:
        """The mean loss since the last stop, at each step where there is something to log, measure or save."""
        options = self.options
        stops = (options.log_every, options.eval_every, options.save_every)
        losses = []
        main = self.accelerator.is_main_process
        with tqdm(total=self.total_steps, initial=self.step, desc=f"{options.role} drafter", disable=not main) as bar:
            while self.step < self.total_steps:
                losses.append(self.update())
                bar.update()
                if self.step == self.total_steps or any(self.step % every == 0 for every in stops):
                    loss = self.accelerator.gather(torch.stack(losses).mean()[None]).mean().item()
                    if not math.isfinite(loss):
                        raise FloatingPointError(
                            f"The loss is {loss} at step {self.step}. The checkpoint in {options.out} is of an "
                            "earlier step: go on from it with a lower --lr, or look at the rows."
                        )
                    bar.set_postfix(loss=f"{loss:.3f}")
                    yield loss
                    losses.clear()

    def _log(self, **values) -> None:
        if self.accelerator.is_main_process:
            append_json_line(self.options.out / "log.jsonl", {"step": self.step, **values})
        self.accelerator.log(values, step=self.step)

    def _evaluate(self) -> dict:
        """Mean acceptance length of real decoding on held-out prompts; the best drafter so far is kept in `best`."""
        measured = {}
        if self.accelerator.is_main_process:
            model = self.drafter()
            pair = [model] if self.first is None else [copy.deepcopy(self.first), model]
            assistant = D2SDAssistant.from_drafters(*pair).to(self.target.dtype)
            prompts = self.held_out[: self.options.eval_rows]
            alpha = acceptance_length(self.target, assistant, prompts, self.options.eval_tokens)
            measured["acceptance_length"] = alpha
            self._log(**measured)
            if measured["acceptance_length"] > self.best:
                self.best = measured["acceptance_length"]
                _save_drafter(self.drafter(), self.options.out / "best")
        self.accelerator.wait_for_everyone()
        return measured

    def drafter(self) -> D2SDDrafterModel:
        """The drafter as it is now, with averaged weights where there are such; a copy in float32."""
        model = D2SDDrafterModel(self.trainee.model.config).to(self.accelerator.device)
        model.load_state_dict(self.trainee.model.state_dict())
        for parameter, averaged in zip(model.parameters(), self.averaged or []):
            parameter.data.copy_(averaged)
        return model.eval()

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @property
    def _checkpoint(self) -> Path:
        return self.options.out / "checkpoint.safetensors"

    def _run_options(self) -> str:
        """What must be the same for a run to go on, as JSON."""
        free = {
            "out",
            "data",
            "target",
            "first",
            "trackers",
            "save_every",
            "eval_rows",
            "features",
            "loss_chunk",
            "stop_after",
        }
        settings = {name: value for name, value in asdict(self.options).items() if name not in free}
        return json.dumps({**settings, "training_rows": len(self.rows), "processes": self.accelerator.num_processes})

    def save(self) -> None:
        """Write the checkpoint, and the drafter as it is now to `last`."""
        if self.accelerator.is_main_process:
            tensors = {f"model/{name}": tensor for name, tensor in self.trainee.model.state_dict().items()}
            for index, moments in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in moments.items()}
            tensors |= {f"averaged/{index}": tensor for index, tensor in enumerate(self.averaged or [])}
            tensors |= {"step": torch.tensor(self.step), "best": torch.tensor(self.best, dtype=torch.float64)}
            write_atomically(
                {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
                self._checkpoint,
                {"options": self._run_options()},
            )
            _save_drafter(self.drafter(), self.options.out / "last")
        self.accelerator.wait_for_everyone()

    def load(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            ValueError: if it is of a run with other options, naming what differs.
        """
        if not self._checkpoint.exists():
            (self.options.out / "log.jsonl").unlink(missing_ok=True)
            return
        there = json.loads(read_metadata(self._checkpoint)["options"])
        refuse_other_options(there, json.loads(self._run_options()), self.options.out)
        tensors = load_file(self._checkpoint)
        self.step, self.best = int(tensors.pop("step")), float(tensors.pop("best"))
        moments: dict[int, dict[str, Tensor]] = {}
        weights, averaged = {}, {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            if part == "model":
                weights[rest] = tensor
            elif part == "averaged":
                averaged[int(rest)] = tensor.to(self.accelerator.device)
            else:
                index, _, moment = rest.partition("/")
                moments.setdefault(int(index), {})[moment] = tensor
        self.trainee.model.load_state_dict(weights)
        self.averaged = [averaged[index] for index in range(len(averaged))] or None
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if self.accelerator.is_main_process:
            self._forget_log_after_checkpoint()

    def _forget_log_after_checkpoint(self) -> None:
        path = self.options.out / "log.jsonl"
        kept = [line for _, line in read_json_lines(path) if line["step"] <= self.step] if path.exists() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)


def _cut(row: Row, length: int) -> Row:
    if len(row.tokens) <= length:
        return row
    if isinstance(row, CachedRow):
        return CachedRow(row.tokens[:length], row.prompt_length, *row._place)
    return Row(row.tokens[:length], row.prompt_length)


def _save_drafter(model: D2SDDrafterModel, folder: Path) -> None:
    """In bf16, as a folder that is there whole or not at all."""
    copy = D2SDDrafterModel(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


@torch.inference_mode()
def acceptance_length(target, assistant: D2SDAssistant, rows: list[Row], max_new_tokens: int) -> float:
    """Tokens committed in a target pass, over the greedy answers to all rows' prompts."""
    tokens = cycles = 0
    for row in rows:
        prompt = row.tokens[None, : row.prompt_length].to(target.device)
        target.generate(prompt, assistant_model=assistant, do_sample=False, max_new_tokens=max_new_tokens)
        tokens += sum(assistant.last_stats.committed_per_cycle)
        cycles += len(assistant.last_stats.committed_per_cycle)
    return tokens / max(cycles, 1)
