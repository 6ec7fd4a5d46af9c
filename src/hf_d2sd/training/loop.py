"""A training run that can be killed after any update and goes on as if it had not been."""

import copy
import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from .. import records
from .blocks import epoch_batches
from .options import TrainOptions
from .shards import Row, read_metadata, write_tensors


class TrainingRun:
    """The loop, its log and its checkpoints. What is random is drawn from the seed and the step alone.

    A subclass says what a batch is and how a model is measured.

    Args:
        trainee: `trainee(batch)` is a tuple that begins with the loss (); `trainee.model` is what is saved. Parameters
            that want no gradient stay as they are and out of checkpoints.
        rows: to train on and to hold out.
    """

    def __init__(self, options: TrainOptions, target, accelerator: Accelerator, trainee: nn.Module, rows: list[Row]):
        self.options, self.target, self.accelerator = options, target, accelerator
        self.trainee = trainee.to(accelerator.device)
        self.rows, self.held_out = self._split(rows)
        self.parameters = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay, fused=True
        )
        if options.compile:
            trainee.model.compile(dynamic=True)  # rows differ in length
        self.wrapped, self.optimizer = accelerator.prepare(trainee, self.optimizer)
        self.averaged = [p.detach().clone() for p in self.parameters] if options.ema else None
        self.step, self.best = 0, 0.0
        self.spent = 0.0  # seconds of updates, over all starts of the run
        self._epoch: tuple[int, list[list[int]]] | None = None  # the present epoch's batches

    def batch(self, rows: list[Row], generator: torch.Generator):
        """What the trainee takes, of this device's rows in a forward."""
        raise NotImplementedError

    def measure(self, model: PreTrainedModel) -> float:
        """Tokens committed in a target pass, decoding held-out prompts with `model`, which may be changed."""
        raise NotImplementedError

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
                f"{', '.join(map(str, self.options.data))}: {len(training)} rows to train on and {len(held_out)} held "
                f"out; a batch takes {self.batch_size}, and one must be held out. Write more rows, or lower `rows` or "
                "`held_out`."
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

    def batch_of(self, forward: int):
        """This device's batch in a forward, counted from 0 over the whole run."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        rows = [self.rows[i] for i in self._row_indices(forward)[process::processes]]
        return self.batch(rows, torch.Generator().manual_seed(self._seed_of(forward)))

    def _seed_of(self, forward: int) -> int:
        """What is random in a forward on this device depends on this alone."""
        return (1_000_003 * self.options.seed + forward) * 4096 + self.accelerator.process_index

    def _row_indices(self, forward: int) -> list[int]:
        """The rows of a forward on all devices."""
        epoch, index = divmod(forward, len(self.rows) // self.batch_size)
        if self._epoch is None or self._epoch[0] != epoch:
            lengths = [len(row.tokens) for row in self.rows]
            self._epoch = epoch, epoch_batches(lengths, epoch, self.batch_size, self.options.seed)
        return self._epoch[1][index]

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by time."""
        if self.options.minutes is not None:
            return self.spent / (60 * self.options.minutes)
        return self.step / self.total_steps

    @property
    def finished(self) -> bool:
        return self.progress >= 1

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to 0."""
        progress = min(self.progress, 1.0)
        if progress < self.options.warmup:
            first = 1 / self.total_steps if self.options.minutes is None else 1e-3  # so that no step is for nothing
            return self.options.lr * (progress + first) / self.options.warmup
        share = (progress - self.options.warmup) / max(1 - self.options.warmup, 1e-9)
        return self.options.lr * 0.5 * (1 + math.cos(math.pi * share))

    def update(self) -> Tensor:
        """One update; returns its mean loss (), on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = min(self.learning_rate(), self.options.lr)
        losses = []
        for i in range(self.options.accumulation):
            with self.accelerator.accumulate(self.wrapped):
                forward = self.step * self.options.accumulation + i
                batch = self.batch_of(forward)
                torch.manual_seed(self._seed_of(forward))  # of dropout
                loss = self.wrapped(batch)[0]
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.parameters, self.options.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        self.step += 1
        if self.averaged is not None:
            torch._foreach_lerp_(self.averaged, self.parameters, 1 - self.options.ema)
        return torch.stack(losses).mean()

    # The run ---------------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        measured = {}
        started = time.monotonic()
        for window in self._windows():
            self._log(loss=window, lr=self.learning_rate())
            if self.step % self.options.eval_every == 0 or self.finished:
                measured = self._evaluate()
            if self.step % self.options.save_every == 0 or self.finished:
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
        total = self.total_steps if options.minutes is None else None
        with tqdm(total=total, initial=self.step, desc=options.role, disable=not main) as bar:
            while not self.finished:
                started = time.monotonic()
                losses.append(self.update())
                self._spend(time.monotonic() - started)
                bar.update()
                if self.finished or any(self.step % every == 0 for every in stops):
                    loss = self.accelerator.gather(torch.stack(losses).mean()[None]).mean().item()
                    if not math.isfinite(loss):
                        raise FloatingPointError(
                            f"The loss is {loss} at step {self.step}. The checkpoint in {options.out} is of an "
                            "earlier step: go on from it with a lower --lr, or look at the rows."
                        )
                    bar.set_postfix(loss=f"{loss:.3f}")
                    yield loss
                    losses.clear()

    def _spend(self, seconds: float) -> None:
        """Count the time of an update: where a schedule follows it, the slowest device's, so that all end together."""
        if self.options.minutes is not None and self.accelerator.num_processes > 1:
            seconds = self.accelerator.gather(torch.tensor([seconds], device=self.accelerator.device)).max().item()
        self.spent += seconds

    def _log(self, **values) -> None:
        if self.accelerator.is_main_process:
            records.append(self._log_file, {"step": self.step, **values})
        self.accelerator.log(values, step=self.step)

    def _evaluate(self) -> dict:
        """Tokens a target pass of real decoding on held-out prompts; the best model so far is kept in `best`."""
        measured = {}
        if self.accelerator.is_main_process:
            measured["acceptance_length"] = self.measure(self.snapshot())
            self._log(**measured)
            if measured["acceptance_length"] > self.best:
                self.best = measured["acceptance_length"]
                self._save_model("best")
        self.accelerator.wait_for_everyone()
        return measured

    def snapshot(self) -> PreTrainedModel:
        """A copy of the model as it is now, with averaged weights where there are such."""
        model = copy.deepcopy(self.trainee.model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter, averaged in zip(trained, self.averaged or []):
            parameter.data.copy_(averaged)
        return model.eval().requires_grad_(False)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @property
    def _checkpoint(self) -> Path:
        return checkpoint_of(self.options)

    @property
    def _log_file(self) -> Path:
        return self.options.out / "log.jsonl"

    def _run_options(self) -> str:
        """What must be the same for a run to go on, as JSON."""
        settings = _settings(self.options, self.accelerator.num_processes)
        return json.dumps({**settings, "training_rows": len(self.rows)})

    def _trained_state(self) -> dict[str, Tensor]:
        """The model's state without the parameters that stay as they are."""
        model = self.trainee.model
        frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
        return {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) not in frozen}

    def save(self) -> None:
        """Write the checkpoint, and the model as it is now to `last`."""
        if self.accelerator.is_main_process:
            tensors = {f"model/{name}": tensor.detach() for name, tensor in self._trained_state().items()}
            for index, moments in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in moments.items()}
            tensors |= {f"averaged/{index}": tensor for index, tensor in enumerate(self.averaged or [])}
            tensors |= {"step": torch.tensor(self.step), "best": torch.tensor(self.best, dtype=torch.float64)}
            if self.options.minutes is not None:
                tensors |= {"spent": torch.tensor(self.spent, dtype=torch.float64)}
            write_tensors(
                self._checkpoint,
                {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
                {"options": self._run_options()},
            )
            self._save_model("last")
        self.accelerator.wait_for_everyone()

    def _save_model(self, name: str) -> None:
        """In bf16, as a folder that is there whole or not at all."""
        sizes = {} if self.options.max_shard_size is None else {"max_shard_size": self.options.max_shard_size}
        model = self.snapshot().to(torch.bfloat16)
        records.write_whole(self.options.out / name, functools.partial(model.save_pretrained, **sizes))

    def load(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            ValueError: if it is of a run with other options, naming what differs.
        """
        if not self._checkpoint.exists():
            self._log_file.unlink(missing_ok=True)
            return
        there = json.loads(read_metadata(self._checkpoint)["options"])
        records.refuse_other_settings(there, json.loads(self._run_options()), self._checkpoint)
        tensors = load_file(self._checkpoint)
        self.step, self.best = int(tensors.pop("step")), float(tensors.pop("best"))
        self.spent = float(tensors.pop("spent", 0.0))
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
        self.trainee.model.load_state_dict(weights, strict=False)
        self.averaged = [averaged[index] for index in range(len(averaged))] or None
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if self.accelerator.is_main_process:
            self._forget_log_after_checkpoint()

    def _forget_log_after_checkpoint(self) -> None:
        kept = [line for line in records.read(self._log_file) if line["step"] <= self.step]
        records.write_lines(self._log_file, kept)


def checkpoint_of(options: TrainOptions) -> Path:
    return options.out / "checkpoint.safetensors"


def _settings(options: TrainOptions, processes: int) -> dict:
    """What must be the same for a run to go on, as far as the options tell."""
    free = {"stop_after", *"out data target first init".split()}
    free |= set("trackers save_every eval_rows features loss_chunk compile max_shard_size".split())
    return {name: value for name, value in asdict(options).items() if name not in free} | {"processes": processes}


def refuse_other_run(options: TrainOptions, processes: int) -> None:
    """Compare with the checkpoint, if there is one, before anything is loaded.

    Raises:
        ValueError: if it is of a run with other options, naming what differs.
    """
    path = checkpoint_of(options)
    if path.exists():
        there = json.loads(read_metadata(path)["options"])
        records.refuse_other_settings(there, json.loads(json.dumps(_settings(options, processes))), path)


def _cut(row: Row, length: int) -> Row:
    return dataclasses.replace(row, tokens=row.tokens[:length])
