"""One call of `generate`, timed: prefill and decoding apart, passes and verified rows counted."""

import contextlib
import time
from dataclasses import dataclass, field

import torch

from ..compat import BaseStreamer
from .strategies import Models, Strategy


@dataclass
class Clock(BaseStreamer):
    """Takes the time whenever `generate` has new tokens; the first ones end the prefill."""

    counts: list[int] = field(default_factory=list)  # tokens of each step
    first_at: float | None = None
    _prompt_seen: bool = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # `generate` shows the prompt first
            self._prompt_seen = True
            return
        if self.first_at is None:
            self.first_at = time.perf_counter()
        self.counts.append(value.numel())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Measurement:
    """What one strategy did with one prompt."""

    tokens: list[int]  # generated
    prefill_seconds: float  # to the first tokens
    decode_seconds: float  # from them to the end
    first_tokens: int  # how many came first: stock assistants draft before the prompt's pass is done
    steps: int  # after the first tokens, one for each target pass
    passes: int | None  # of the target, after the prompt's; None: not counted
    rows: int | None  # positions that these took in

    @property
    def decoded(self) -> int:
        """Tokens after the first ones: what the decoding's time and steps are for."""
        return len(self.tokens) - self.first_tokens


def measure(target, strategy: Strategy, models: Models, input_ids: torch.Tensor, options: dict) -> Measurement:
    """Run `generate` once.

    Args:
        input_ids: (1, L).
        options: further keyword arguments of `generate`.
    """
    clock, passes = Clock(), []
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    arguments = {**options, **strategy.generate_arguments(models)}
    # A hook on the target would end up in a compiled graph, and a call of ours is slower where someone follows it.
    counts_itself = strategy.compiled or strategy.ours
    with contextlib.nullcontext() if counts_itself else count_rows(target, passes):
        synchronize(target.device)
        start = time.perf_counter()
        out = target.generate(**inputs, **arguments, streamer=clock)
        synchronize(target.device)
        end = time.perf_counter()
    if strategy.ours:
        passes = [0, *arguments["assistant_model"].last_stats.tree_sizes]
    first_at = clock.first_at if clock.first_at is not None else end
    return Measurement(
        tokens=out[0, input_ids.shape[1] :].tolist(),
        prefill_seconds=first_at - start,
        decode_seconds=end - first_at,
        first_tokens=clock.counts[0] if clock.counts else 0,
        steps=max(len(clock.counts) - 1, 0),
        passes=None if strategy.compiled else len(passes) - 1,
        rows=None if strategy.compiled else sum(passes[1:]),
    )


@contextlib.contextmanager
def count_rows(target, passes: list[int]):
    """Note for each forward of the target how many positions it takes in."""

    def note(module, args, kwargs) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        passes.append(ids.shape[1] if ids is not None else kwargs["inputs_embeds"].shape[1])

    hook = target.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
