"""Cycles that are recorded once, as one CUDA graph where there is one, and replayed; the host reads a cycle late."""

import functools
import time
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.utils import logging

from .captured import Compiled, FixedShapes, buffer_size, check_limit, compile_once
from .compat import has_adapters, is_quantized, reads_logits_alone
from .cycles import (
    POLICIES,
    Choice,
    Cycle,
    CycleCache,
    CycleDrafter,
    CycleState,
    CycleTarget,
    Origin,
)
from .decoding import Batch, Observer, cycle
from .drafting import DraftContext
from .growing import plain, policy_of
from .modeling import D2SDAssistant
from .tree import HostTree

logger = logging.get_logger(__name__)

_MOST_RECORDED = 4  # what an assistant keeps: each holds buffers of its own for keys and values
# Modes of `torch.compile` that record CUDA graphs of their own, and those that fuse as they do and record none.
_WITHOUT_GRAPHS = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}


class Rerun:
    """Where there are no graphs: to replay is to run again, and what a cycle left behind is there at once."""

    ahead = 0  # how many cycles are begun before the host has read one

    def __init__(self, run: Callable[[], None], device: torch.device):
        self.replay = run
        run()

    def fetch(self, report: Tensor) -> Callable[[], list]:
        """What gives a tensor as lists, as it is now."""
        return report.clone().tolist


class Graph:
    """What a function launches on a GPU, as one CUDA graph. It must use the same tensors each time."""

    ahead = 1

    def __init__(self, run: Callable[[], None], device: torch.device):
        graph, self._device = torch.cuda.CUDAGraph(), device
        with torch.cuda.device(device):
            stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(here)
            with torch.cuda.stream(stream):  # kernels choose how they run, and libraries take their memory
                for _ in range(3):
                    run()
            here.wait_stream(stream)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                run()
        self.replay: Callable[[], None] = graph.replay
        self._pinned: list[Tensor] = []

    def fetch(self, report: Tensor) -> Callable[[], list]:
        """As `Rerun.fetch`: the copy comes after all that was launched before, and is waited for when it is read."""
        if not self._pinned:
            self._pinned = [torch.empty_like(report, device="cpu").pin_memory() for _ in range(self.ahead + 1)]
        kept = self._pinned.pop(0)  # whose last reader is done
        self._pinned.append(kept)
        kept.copy_(report, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))

        def read() -> list:
            event.synchronize()
            return kept.tolist()

        return read


class Recorded:
    """A cycle for tensors of some shapes, with the buffers that it runs in: those of one call after the other.

    Args:
        batch: of these shapes, as it is after a cycle of its own.
        capacity: tokens a row that caches have room for.
        compiler: what fuses the cycle's kernels, if anything does.
        recorder: what records.
    """

    def __init__(self, batch: Batch, capacity: int, compiler: Callable | None, recorder: Callable):
        self.cycle = _cycle_of(batch, capacity)
        self.state = _blank_state(self.cycle, batch)
        report = self.cycle(self.state).report  # as it is: what is made once, and how large trees are
        self.state = replace(self.state, report=torch.zeros_like(report))
        self._function = self.cycle if compiler is None else compiler(_with_own_code(self.cycle))
        self._graph = recorder(self._run, batch.target.device)
        self.ahead = self._graph.ahead

    def _run(self) -> None:
        after = self._function(self.state)
        for here, new in zip(self.state.tensors(), after.tensors()):
            here.copy_(new)

    def load(self, batch: Batch, anchors: list[int]) -> None:
        """Go on from where a batch is; rows that have ended stay as they are."""
        self.cycle.target.cache.load(batch.target.cache)
        fresh = _origin_of(batch, [drafter.context for drafter in batch.drafters][: len(self.cycle.drafters)])
        for here, new in zip(self.cycle.origin.tensors(), fresh.tensors()):
            here.copy_(new)
        alive = torch.tensor([not chooser.finished for chooser in batch.choosers.active])
        self.state.anchors.copy_(torch.tensor(anchors))
        self.state.alive.copy_(alive)
        for tensor in (self.state.gained, self.state.counts, self.state.report):
            tensor.zero_()
        for drafter, other, waiting in zip(self.cycle.drafters, batch.drafters, self.state.waiting):
            drafter.context.cache.load(other.context.cache)
            drafter.words.load(other.words)
            features, counts = other.context.take()
            waiting.zero_()
            waiting[:, : features.shape[1]] = features
            self.state.counts.copy_(torch.tensor(counts))

    def launch(self) -> Callable[[], list]:
        """Begin a cycle; returns what waits for its report (B, 6, N)."""
        self._graph.replay()
        return self._graph.fetch(self.state.report)

    def release(self, batch: Batch, gained: list[int]) -> None:
        """Let a batch hold what its rows have gained, and nothing of cycles that were too many."""
        target = batch.target
        for layer, other in zip(self.cycle.target.cache.layers, target.cache.layers):
            layer.hand_to(other, [length + more for length, more in zip(other.lengths, gained)])
        target.positions = [position + more for position, more in zip(target.positions, gained)]
        known, counts = self.state.gained.tolist(), self.state.counts.tolist()
        pairs = zip(self.cycle.drafters, batch.drafters, self.cycle.origin.read, self.state.waiting)
        for drafter, other, read, waiting in pairs:
            cached = [first + more - count for first, more, count in zip(read.tolist(), known, counts)]
            drafter.context.cache.hand_to(other.context.cache, cached)
            other.context.positions = [position + more for position, more in zip(other.context.positions, known)]
            other.context.waiting = ((waiting[:, : max(counts)].clone(), counts),)
            if len(counts) == 1:  # of batches contexts are not gone on from
                other.context.cut(target.positions[0])


def _cycle_of(batch: Batch, capacity: int) -> Cycle:
    """Twins of a batch's pieces, with empty caches."""
    target, options = batch.target, batch.options
    drafters = batch.drafters if policy_of(options) is not plain else []
    twins = []
    for drafter, size in zip(drafters, (options.block_size, options.num_branches * options.second_block_size)):
        cache = CycleCache.like(drafter.context.cache, capacity, size)
        twins.append(CycleDrafter.like(drafter, target.model, cache, options.attention_backend))
    chooser = batch.choosers.rows[0]
    return Cycle(
        CycleTarget(target, CycleCache.like(target.cache, capacity, options.tree_size), options.tree_size),
        twins,
        options,
        Choice(chooser.logits_processor, chooser.do_sample),
        _blank(_origin_of(batch, [drafter.context for drafter in drafters])),
    )


def _origin_of(batch: Batch, contexts: list[DraftContext]) -> Origin:
    target, choosers = batch.target, batch.choosers
    assert choosers.rooms is not None

    def on_device(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=target.device)

    def known(context: DraftContext) -> list[int]:
        counts = zip(*(counts for _, counts in context.waiting))
        return [length + sum(of_row) for length, of_row in zip(context.cache.lengths, counts)]

    return Origin(
        positions=on_device(target.positions),
        rooms=on_device(choosers.rooms),
        stored={name: on_device(layer.lengths) for name, layer in target.cache.by_type().items()},
        read=tuple(on_device(known(context)) for context in contexts),
        ends=on_device(choosers.ends),
        axes=target.axes_ahead,
    )


def _blank(origin: Origin) -> Origin:
    """Of rows that hold one token, in tensors of its own: some kernels take no empty prefix."""
    stored = {name: torch.ones_like(tensor) for name, tensor in origin.stored.items()}
    positions, rooms, ends = (torch.ones_like(tensor) for tensor in (origin.positions, origin.rooms, origin.ends))
    axes = None if origin.axes is None else torch.zeros_like(origin.axes)
    return Origin(positions, rooms, stored, tuple(torch.ones_like(tensor) for tensor in origin.read), ends, axes)


def _blank_state(cycle: Cycle, batch: Batch) -> CycleState:
    """In which all rows have ended: nothing that a cycle does then counts."""
    zeros = torch.zeros_like(cycle.origin.positions)
    shape = len(zeros), batch.options.depth + 1
    waiting = []
    for drafter in cycle.drafters:
        width = drafter.model.fc.in_features
        waiting.append(torch.zeros(*shape, width, dtype=drafter.dtype, device=drafter.device))
    alive = torch.zeros_like(zeros, dtype=torch.bool)
    return CycleState(zeros.clone(), zeros.clone(), alive, tuple(waiting), zeros.clone(), zeros.clone())


def _with_own_code(cycle: Cycle) -> Callable:
    """The cycle as a function whose code is no other's: torch counts how often it compiles a piece of code."""
    function = type(cycle).__call__
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return types.MethodType(own, cycle)


@dataclass
class StayingBatch(Batch):
    """A batch whose rows stay until all have ended."""

    def leave(self, anchors: list[int]) -> list[int]:
        return anchors if self.choosers.staying() else super().leave(anchors)


class WholeCycles:
    """Decodes a batch by recorded cycles: what `decoding.decode` takes.

    Args:
        known: what was recorded before, by what it depends on; a call takes one out while it decodes by it.
        compile_options: for `torch.compile`; `None`: nothing is compiled.
        recorder: of the device.
    """

    def __init__(self, known: dict, compile_options: dict | None, recorder: Callable):
        self.known, self.compile_options, self.recorder = known, compile_options, recorder

    def __call__(self, batch: Batch, anchors: list[int], observer: Observer) -> None:
        """Decode until each row has ended.

        Raises:
            ValueError: without a limit of the length, or where the cycle cannot be recorded.
        """
        check_limit(batch.choosers)
        staying = StayingBatch(batch.target, batch.drafters, batch.choosers, batch.options)
        anchors = cycle(staying, anchors, observer)  # it reads the prompt, which is of any length
        if not anchors:
            return
        batch.choosers.follow()
        key, recorded = self._take(staying)
        try:
            recorded.load(staying, anchors)
            gained = self._replay(staying, recorded, observer)
            recorded.release(staying, gained)
        finally:
            self._put(key, recorded)
        staying.choosers.select([])

    def _replay(self, batch: StayingBatch, recorded: Recorded, observer: Observer) -> list[int]:
        """Cycles until all rows have ended; returns how many tokens each has gained."""
        gained, begun = [0] * len(batch.choosers.active), deque[Callable[[], list]]()
        while batch.choosers.staying():
            # Each cycle gives a row a token at least: what surely comes to nothing is not begun.
            room = max(chooser.room or 0 for chooser in batch.choosers.active if not chooser.finished)
            while len(begun) <= min(recorded.ahead, room - 1):
                begun.append(recorded.launch())
            trees = [HostTree(*row) for row in begun.popleft()()]
            accepted = batch.walk(trees)
            gained = [before + len(path) for before, path in zip(gained, accepted.paths)]
            for drafter in recorded.cycle.drafters:
                drafter.words.add([token for row in accepted.emitted for token in row])
            observer.count(accepted)
        return gained

    def _take(self, batch: StayingBatch) -> tuple[tuple, Recorded]:
        """A recorded cycle that fits, and what it depends on."""
        options, choosers = batch.options, batch.choosers
        assert choosers.rooms is not None
        caches = batch.target.cache, *(drafter.context.cache for drafter in batch.drafters)
        longest = max(max(cache.lengths) for cache in caches)
        capacity = buffer_size(longest + max(choosers.rooms) + 2 * (options.depth + 1))
        key = _key(batch, capacity)
        recorded = self.known.pop(key, None)
        return key, self._record(batch, capacity) if recorded is None else recorded

    def _put(self, key: tuple, recorded: Recorded) -> None:
        self.known[key] = recorded
        for oldest in list(self.known)[:-_MOST_RECORDED]:
            self.known.pop(oldest, None)

    def _record(self, batch: StayingBatch, capacity: int) -> Recorded:
        start = time.perf_counter()
        compiler = None
        if self.compile_options is not None:
            compiler = functools.partial(torch.compile, fullgraph=True, **self.compile_options)
        device = batch.target.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # what is tried draws as well
                recorded = Recorded(batch, capacity, compiler, self.recorder)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"A whole cycle with {type(batch.target.model).__name__} cannot be recorded: {error} Let its passes "
                "be compiled one by one: assistant.compile(whole=False); or let nothing be: d2sd_compile=False."
            ) from error
        seconds = time.perf_counter() - start
        logger.warning(
            f"D²SD recorded a cycle in {seconds:.1f} s, for {len(batch.choosers.active)} rows of {capacity} tokens. "
            "Later calls of these shapes and options replay it."
        )
        return recorded


def _key(batch: Batch, capacity: int) -> tuple:
    """All that a recorded cycle depends on: whatever differs needs another one."""
    target, choosers = batch.target, batch.choosers
    chooser, device = choosers.rows[0], target.device.type
    models = [target.model, *(drafter.model for drafter in batch.drafters)]
    processors = [(type(one).__name__, repr(sorted(vars(one).items()))) for one in chooser.logits_processor]
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    tensors += [tensor for drafter in batch.drafters for tensor in drafter.gathered()]
    return (
        id(target.model),  # which the recorded cycle holds
        len(choosers.active),
        capacity,
        repr(batch.options),
        str(target.attention),
        (chooser.do_sample, repr(processors), len(choosers.ends), target.axes_ahead is None),
        (torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        tuple(tensor.data_ptr() for tensor in tensors),  # a graph reads where they were
    )


def obstacle(batch: Batch) -> str | None:
    """Why the cycles of a batch cannot be recorded whole; `None` if they can."""
    options, choosers, model = batch.options, batch.choosers, batch.target.model
    record = choosers.rows[0].record
    readers = [one for one in choosers.rows[0].logits_processor if not reads_logits_alone(one)]
    models = [model, *(drafter.model for drafter in batch.drafters)]
    devices = {str(tensor.device) for each in models for tensor in each.parameters()}
    reasons = {
        f"d2sd_acceptance is {options.acceptance!r}": options.acceptance != "walk",
        f"the policy {policy_of(options).__name__!r} asks the host": policy_of(options) not in POLICIES,
        "d2sd_trace keeps every tree": options.trace,
        "output_scores, output_logits and output_hidden_states keep what every cycle computes": any(
            kept is not None for kept in vars(record).values()
        ),
        f"{', '.join(type(one).__name__ for one in readers)} may look at the text so far": bool(readers),
        f"weights are on {', '.join(sorted(devices))}": len(devices) > 1,
        "the target is quantized": is_quantized(model),
        "the target has adapters": has_adapters(model),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def cycles_of(assistant: D2SDAssistant, batch: Batch) -> Callable[[Batch, list[int], Observer], None] | None:
    """What a call decodes by: `None`, one cycle after the other; or cycles of fixed shapes, if it asks for them."""
    if not batch.options.compile:
        return None
    options = {"dynamic": False, **(assistant.compile_options or {})}
    whole, fuses = options.pop("whole", True), options.get("backend", "inductor") is not None
    reason = obstacle(batch) if whole else None
    if whole and reason is None:
        mode = options.pop("mode", None)
        options["mode"] = _WITHOUT_GRAPHS.get(mode, mode)
        known = vars(assistant).setdefault("_recorded", Compiled())
        cuda = batch.target.device.type == "cuda"
        return WholeCycles(known, options if fuses else None, Graph if cuda else Rerun)
    if reason is not None:
        logger.warning_once(f"D²SD compiles the passes of its cycles one by one and records no whole cycle: {reason}.")
    return FixedShapes(functools.partial(compile_once, assistant, options)).run if fuses else None
