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
from .costs import Place, Stopwatch, costs_of, guess, of_whole_cycles
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
from .followers import CycleFollowers
from .growing import plain, policy_of
from .modeling import D2SDAssistant
from .options import DecodingOptions
from .paying import ShapePace
from .tree import HostTree

logger = logging.get_logger(__name__)

_MOST_RECORDED = 4  # what an assistant keeps: each holds buffers of its own for keys and values
_LISTENS = 32  # tokens that a drafter may lie behind by where cycles choose whether it drafts
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
    """Cycles of a few shapes, with the buffers that all of them run in: those of one call after the other.

    Args:
        batch: of these shapes, as it is after a cycle of its own.
        shapes: options of each, the largest last.
        capacity: tokens a row that caches have room for.
        compiler: what fuses the cycles' kernels, if anything does.
        recorder: what records.
    """

    def __init__(
        self,
        batch: Batch,
        shapes: list[DecodingOptions],
        capacity: int,
        compiler: Callable | None,
        recorder: Callable,
    ):
        self.cycles = _cycles_of(batch, shapes, capacity)
        self.cycle = self.cycles[-1]
        blank = _blank_state(self.cycle, _slots_waiting(shapes))
        self._states, self._graphs = [], []
        for one in self.cycles:
            report = one(blank).report  # as it is: what is made once, and how large trees are
            state = replace(blank, report=torch.zeros_like(report))
            function = one if compiler is None else compiler(_with_own_code(one))
            self._states.append(state)
            self._graphs.append(recorder(functools.partial(_run, function, state), batch.target.device))
        self.state, self.ahead = self._states[-1], self._graphs[-1].ahead

    def load(self, batch: Batch, anchors: list[int]) -> None:
        """Go on from where a batch is; rows that have ended stay as they are."""
        self.cycle.target.cache.load(batch.target.cache)
        fresh = _origin_of(batch, [drafter.context for drafter in batch.drafters][: len(self.cycle.drafters)])
        for here, new in zip(self.cycle.origin.tensors(), fresh.tensors()):
            here.copy_(new)
        alive = torch.tensor([not chooser.finished for chooser in batch.choosers.active])
        self.state.anchors.copy_(torch.tensor(anchors))
        self.state.alive.copy_(alive)
        for tensor in (self.state.gained, *self.state.counts, *(state.report for state in self._states)):
            tensor.zero_()
        if self.cycle.followers is not None and batch.followers is not None:
            self.cycle.followers.load(batch.followers)
        pairs = zip(self.cycle.drafters, batch.drafters, self.state.waiting, self.state.counts)
        for drafter, other, waiting, own in pairs:
            drafter.context.cache.load(other.context.cache)
            drafter.words.load(other.words)
            features, counts = other.context.take()
            waiting.zero_()
            waiting[:, : features.shape[1]] = features
            own.copy_(torch.tensor(counts))

    def launch(self, shape: int = -1) -> Callable[[], list]:
        """Begin a cycle of one of the shapes; returns what waits for its report (B, 6, N)."""
        graph = self._graphs[shape]
        graph.replay()
        return graph.fetch(self._states[shape].report)

    def release(self, batch: Batch, gained: list[int]) -> None:
        """Let a batch hold what its rows have gained, and nothing of cycles that were too many."""
        target = batch.target
        for layer, other in zip(self.cycle.target.cache.layers, target.cache.layers):
            layer.hand_to(other, [length + more for length, more in zip(other.lengths, gained)])
        target.positions = [position + more for position, more in zip(target.positions, gained)]
        known, state = self.state.gained.tolist(), self.state
        pairs = zip(self.cycle.drafters, batch.drafters, self.cycle.origin.read, state.waiting, state.counts)
        for drafter, other, read, waiting, own in pairs:
            counts = own.tolist()
            cached = [first + more - count for first, more, count in zip(read.tolist(), known, counts)]
            drafter.context.cache.hand_to(other.context.cache, cached)
            other.context.positions = [position + more for position, more in zip(other.context.positions, known)]
            other.context.waiting = ((waiting[:, : max(counts)].clone(), counts),)
            if len(counts) == 1:  # of batches contexts are not gone on from
                other.context.cut(target.positions[0])


def _run(function: Callable[[CycleState], CycleState], state: CycleState) -> None:
    """A cycle, and the state that it leaves behind in the place of the one before."""
    after = function(state)
    for here, new in zip(state.tensors(), after.tensors()):
        here.copy_(new)


def _slots_waiting(shapes: list[DecodingOptions]) -> int:
    """S: for how many tokens' features there is room before a drafter reads them."""
    return shapes[-1].depth + 1 + (_LISTENS if len(shapes) > 1 else 0)


def _cycles_of(batch: Batch, shapes: list[DecodingOptions], capacity: int) -> list[Cycle]:
    """By shape, twins of a batch's pieces: the same drafters and caches, which are empty."""
    target, options = batch.target, shapes[-1]
    drafters = batch.drafters if policy_of(options) is not plain else []
    twins = []
    for drafter, size in zip(drafters, (options.block_size, options.num_branches * options.second_block_size)):
        cache = CycleCache.like(drafter.context.cache, capacity, size)
        twins.append(CycleDrafter.like(drafter, target.model, cache, options.attention_backend))
    chooser, cache = batch.choosers.rows[0], CycleCache.like(target.cache, capacity, options.tree_size)
    choice = Choice(chooser.logits_processor, chooser.do_sample)
    origin = _blank(_origin_of(batch, [drafter.context for drafter in drafters]))
    followers = None
    if batch.followers is not None and twins:
        followers = CycleFollowers(len(batch.choosers.active), target.device)
        for twin in twins:
            twin.followers = followers if twin.reads_text else None
    targets = [CycleTarget(target, cache, shape.tree_size) for shape in shapes]
    return [
        Cycle(its, twins, shape, choice, origin, options.depth + 1, followers) for its, shape in zip(targets, shapes)
    ]


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


def _blank_state(cycle: Cycle, slots: int) -> CycleState:
    """In which all rows have ended: nothing that a cycle does then counts."""
    zeros = torch.zeros_like(cycle.origin.positions)
    shape, waiting = (len(zeros), slots), []
    for drafter in cycle.drafters:
        width = drafter.model.fc.in_features
        waiting.append(torch.zeros(*shape, width, dtype=drafter.dtype, device=drafter.device))
    alive = torch.zeros_like(zeros, dtype=torch.bool)
    counts = tuple(zeros.clone() for _ in waiting)
    return CycleState(zeros.clone(), zeros.clone(), alive, tuple(waiting), counts, zeros.clone())


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
        pace_at: for a capacity, what chooses among the options' shapes; `None`: there is one.
    """

    def __init__(
        self,
        known: dict,
        compile_options: dict | None,
        recorder: Callable,
        pace_at: Callable[[int], ShapePace] | None = None,
    ):
        self.known, self.compile_options, self.recorder, self.pace_at = known, compile_options, recorder, pace_at

    def __call__(self, batch: Batch, anchors: list[int], observer: Observer) -> None:
        """Decode until each row has ended.

        Raises:
            ValueError: without a limit of the length, or where the cycle cannot be recorded.
        """
        check_limit(batch.choosers)
        shapes = batch.options.shapes
        rows = batch.target, batch.drafters, batch.choosers, shapes[-1]
        staying = StayingBatch(*rows, followers=batch.followers)
        anchors = cycle(staying, anchors, observer)  # it reads the prompt, which is of any length
        if not anchors:
            return
        batch.choosers.follow()
        key, recorded = self._take(staying, shapes)
        try:
            recorded.load(staying, anchors)
            turns = Turns(recorded, self.pace_at(recorded.cycle.target.cache.capacity) if self.pace_at else None)
            gained = self._replay(staying, recorded, turns, observer)
            recorded.release(staying, gained)
        finally:
            self._put(key, recorded)
        staying.choosers.select([])

    def _replay(self, batch: StayingBatch, recorded: Recorded, turns: "Turns", observer: Observer) -> list[int]:
        """Cycles until all rows have ended; returns how many tokens each has gained."""
        gained, begun = [0] * len(batch.choosers.active), deque[Callable[[], list]]()
        while batch.choosers.staying():
            # Each cycle gives a row a token at least: what surely comes to nothing is not begun.
            room = max(chooser.room or 0 for chooser in batch.choosers.active if not chooser.finished)
            while len(begun) <= min(recorded.ahead, room - 1):
                begun.append(turns.launch())
            trees = [HostTree(*row) for row in begun.popleft()()]
            accepted = batch.walk(trees)
            turns.saw(accepted.paths)
            gained = [before + len(path) for before, path in zip(gained, accepted.paths)]
            for drafter in recorded.cycle.drafters:
                drafter.words.add([token for row in accepted.emitted for token in row])
            observer.count(accepted)
        return gained

    def _take(self, batch: StayingBatch, shapes: list[DecodingOptions]) -> tuple[tuple, Recorded]:
        """Recorded cycles that fit, and what they depend on."""
        choosers, spare = batch.choosers, batch.options.depth + 1 + _slots_waiting(shapes)
        assert choosers.rooms is not None
        caches = batch.target.cache, *(drafter.context.cache for drafter in batch.drafters)
        longest = max(max(cache.lengths) for cache in caches)
        capacity = buffer_size(longest + max(choosers.rooms) + spare)
        key = _key(batch, shapes, capacity)
        recorded = self.known.pop(key, None)
        return key, self._record(batch, shapes, capacity) if recorded is None else recorded

    def _put(self, key: tuple, recorded: Recorded) -> None:
        self.known[key] = recorded
        for oldest in list(self.known)[:-_MOST_RECORDED]:
            self.known.pop(oldest, None)

    def _record(self, batch: StayingBatch, shapes: list[DecodingOptions], capacity: int) -> Recorded:
        start = time.perf_counter()
        compiler = None
        if self.compile_options is not None:
            compiler = functools.partial(torch.compile, fullgraph=True, **self.compile_options)
        device = batch.target.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # what is tried draws as well
                recorded = Recorded(batch, shapes, capacity, compiler, self.recorder)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"A whole cycle with {type(batch.target.model).__name__} cannot be recorded: {error} Let its passes "
                "be compiled one by one: assistant.compile(whole=False); or let nothing be: d2sd_compile=False."
            ) from error
        seconds = time.perf_counter() - start
        what = "a cycle" if len(shapes) == 1 else f"cycles of {len(shapes)} shapes"
        logger.warning(
            f"D²SD recorded {what} in {seconds:.1f} s, for {len(batch.choosers.active)} rows of {capacity} tokens. "
            "Later calls of these shapes and options replay it."
        )
        return recorded


class Turns:
    """Which of its recorded shapes each cycle of a call has.

    A drafter that does not draft only listens, and there is not room for much that it has not read: before it is full,
    a shape has its turn in which it drafts.
    """

    def __init__(self, recorded: Recorded, pace: ShapePace | None):
        self.recorded, self.pace = recorded, pace
        self._begun = deque[int]()  # shapes of the cycles that the host has not read
        self._behind = [recorded.cycle.width] * len(recorded.cycle.drafters)  # at most, by drafter, of cycles read

    def launch(self) -> Callable[[], list]:
        """As `Recorded.launch`, of the shape whose turn it is."""
        if self.pace is None:
            return self.recorded.launch()
        shape = self.pace.begin(self._least())
        self._begun.append(shape)
        read = self.recorded.launch(shape)
        self.pace.launched()
        return read

    def _least(self) -> int:
        """How many drafters must draft now: all that could not hear another cycle."""
        width, least = self.recorded.cycle.width, 0
        for drafter, (behind, waiting) in enumerate(zip(self._behind, self.recorded.state.waiting)):
            for shape in self._begun:
                behind = (0 if shape > drafter else behind) + width
            if behind + width > waiting.shape[1]:
                least = drafter + 1
        return least

    def saw(self, paths: list[list[int]]) -> None:
        """The paths of the oldest cycle that was not read."""
        if self.pace is None:
            return
        shape, counts = self._begun.popleft(), list(map(len, paths))
        self._behind = [
            (0 if shape > drafter else behind) + max(counts) for drafter, behind in enumerate(self._behind)
        ]
        self.pace.end(shape, counts)


def _key(batch: Batch, shapes: list[DecodingOptions], capacity: int) -> tuple:
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
        repr(shapes),
        str(target.attention),
        (chooser.do_sample, repr(processors), len(choosers.ends), target.axes_ahead is None),
        (torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        tuple(drafter.model.config.path_text_weight for drafter in batch.drafters),
        tuple(tensor.data_ptr() for tensor in tensors),  # a graph reads where they were
    )


def obstacle(batch: Batch) -> str | None:
    """Why the cycles of a batch cannot be recorded whole; `None` if they can."""
    options, choosers, model = batch.options.shapes[-1], batch.choosers, batch.target.model
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


def _open_shapes(assistant: D2SDAssistant, batch: Batch) -> Callable[[int], ShapePace]:
    """What chooses among the shapes of a call, once it is known how large they are, by what earlier calls measured."""
    target, options = batch.target, batch.options
    costs, stats, rows = costs_of(assistant), assistant.last_stats, len(batch.choosers.active)
    shapes = [(shape.tree_size, shape.num_branches) for shape in options.shapes]

    def pace_at(capacity: int) -> ShapePace:
        place = Place.of(target.model, target.device, rows, capacity)
        parts = guess(place, target.model, [drafter.model for drafter in batch.drafters])
        place = replace(place, device=f"{place.device}, recorded")
        table = costs.at(place, lambda: of_whole_cycles(parts, shapes))
        pace = ShapePace(shapes, table, Stopwatch(target.device), batch.manner, batch.purse)
        stats.decisions = pace.decisions
        return pace

    return pace_at


def cycles_of(assistant: D2SDAssistant, batch: Batch) -> Callable[[Batch, list[int], Observer], None] | None:
    """What a call decodes by: `None`, one cycle after the other; or cycles of fixed shapes, if it asks for them."""
    if not batch.options.compile:
        return None
    options = {"dynamic": False, **(assistant.compile_options or {})}
    whole, fuses = options.pop("whole", True), options.get("backend", "inductor") is not None
    reason = obstacle(batch) if whole else None
    pace_at = _open_shapes(assistant, batch) if whole and reason is None and len(batch.options.shapes) > 1 else None
    if whole and reason is None:
        mode = options.pop("mode", None)
        options["mode"] = _WITHOUT_GRAPHS.get(mode, mode)
        known = vars(assistant).setdefault("_recorded", Compiled())
        cuda = batch.target.device.type == "cuda"
        return WholeCycles(known, options if fuses else None, Graph if cuda else Rerun, pace_at)
    batch.options = batch.options.shapes[-1]  # what would be chosen from is not there
    if reason is not None:
        logger.warning_once(f"D²SD compiles the passes of its cycles one by one and records no whole cycle: {reason}.")
    return FixedShapes(functools.partial(compile_once, assistant, options)).run if fuses else None
