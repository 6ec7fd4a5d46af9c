"""Where a cycle's time goes, what its memory peaks at, and how right its probabilities are.

Probed calls are calls of their own: what is timed side by side has no instruments in it.
"""

import contextlib
import ctypes
import functools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import decoding
from ..drafting import Drafter
from ..stats import Cycle, D2SDStats
from ..target import Target
from .measuring import Measurement, measure, synchronize
from .strategies import Models, Strategy

STAGES = ("draft 1", "draft 2", "tree", "verify", "accept", "commit", "other")
_PLACES = (
    (Drafter, "draft", "draft 1"),
    (Drafter, "redraft", "draft 2"),
    (Drafter, "sample", "draft 2"),
    (decoding, "grow", "tree"),
    (Target, "verify", "verify"),
    (decoding.Batch, "accept", "accept"),
    (Target, "commit", "commit"),
    (Drafter, "extend", "commit"),
)
BINS = 10


class StageClock:
    """Adds up the time spent in each stage; while one calls another, the inner one's time is its alone."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stop()
        self._running.append(name)
        try:
            yield
        finally:
            self._stop()
            self._running.pop()

    def _stop(self) -> None:
        """Book what has passed since the last change for the stage that was running."""
        synchronize(self.device)
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within, the engine's functions run under this clock."""
        stock = [(owner, name, getattr(owner, name)) for owner, name, _ in _PLACES]
        try:
            for (owner, name, function), (_, _, stage) in zip(stock, _PLACES):
                setattr(owner, name, self._timed(function, stage))
            yield
        finally:
            for owner, name, function in stock:
                setattr(owner, name, function)

    def _timed(self, function, stage: str):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            with self.stage(stage):
                return function(*args, **kwargs)

        return timed


@dataclass(frozen=True)
class Probe:
    """One probed call."""

    seconds: dict[str, float]  # decoding's time by stage; empty for strategies that are not ours
    peak_bytes: int | None  # memory over what was in use before the call; None where it cannot be measured
    stats: dict  # counts of the call, see `counted`; empty for strategies that are not ours


def probe(target, strategy: Strategy, models: Models, input_ids: torch.Tensor, options: dict) -> Probe:
    """Run `generate` once more, under instruments."""
    clock = StageClock(target.device)
    extra = {"d2sd_trace": True} if strategy.ours else {}
    with PeakMemory(target.device) as memory, clock.installed():
        measured = measure(target, strategy, models, input_ids, {**options, **extra})
    if not strategy.ours:
        return Probe({}, memory.peak, {})
    stats = strategy.generate_arguments(models)["assistant_model"].last_stats
    return Probe(_with_other(clock, measured), memory.peak, counted(stats))


def _with_other(clock: StageClock, measured: Measurement) -> dict[str, float]:
    """The decoding's time by stage. The prompt's features go to the drafters before it: a little more than it took."""
    known = dict(clock.seconds)
    return {**known, "other": max(measured.decode_seconds - sum(known.values()), 0.0)}


def counted(stats: D2SDStats) -> dict:
    """Of a call's stats and trace what the reports show, as plain numbers that add up over calls."""
    return {
        "cycles": stats.cycles,
        "committed": stats.acceptance_histogram,
        "nodes": sum(stats.tree_sizes),
        "offered": dict(stats.offered_per_depth),
        "accepted": dict(stats.accepted_per_depth),
        "sources": stats.tokens_by_source,
        "reliability": reliability(stats.trace),
        "boundaries": boundaries(stats.trace),
    }


def reliability(trace: Iterable[Cycle]) -> dict[str, list[list[float]]]:
    """By source, for each of BINS equal bins of confidence: nodes, the sum of their confidences, and how many held.

    Counted are the nodes whose parent was accepted: only of these the target said whether they are right.
    """
    bins = {source: [[0, 0.0, 0] for _ in range(BINS)] for source in ("first", "second", "context")}
    for cycle in trace:
        accepted, confidences = set(cycle.path), cycle.confidences
        for node in range(1, len(cycle.tokens)):
            parent = cycle.parents[node]
            if parent not in accepted:
                continue
            entry = bins[cycle.sources[node]][min(int(confidences[node] * BINS), BINS - 1)]
            entry[0] += 1
            entry[1] += confidences[node]
            entry[2] += cycle.tokens[node] == cycle.emitted[cycle.path.index(parent)]
    return bins


def boundaries(trace: Iterable[Cycle]) -> list[list[float]]:
    """For each number i of accepted tokens: in how many cycles of a chain it was i, and the sum of r(i).

    r(i) is Eq. 4 of arXiv 2606.04446. Cycles whose tree is not one chain of the first drafter's are left out, and so
    are those in which generation ended before a token was rejected.
    """
    table: list[list[float]] = []
    for cycle in trace:
        if cycle.parents != list(range(-1, len(cycle.parents) - 1)) or set(cycle.sources[1:]) != {"first"}:
            continue
        if cycle.emitted[-1] in cycle.tokens[cycle.path[-1] + 1 :][:1]:
            continue
        confidences = cycle.confidences[1:]
        table += [[0, 0.0] for _ in range(len(confidences) + 1 - len(table))]
        table[len(cycle.path) - 1][0] += 1
        reached = 1.0
        for i, confidence in enumerate([*confidences, 0.0]):
            table[i][1] += reached * (1 - confidence)
            reached *= confidence
    return table


class PeakMemory:
    """The greatest memory in use within the block, over what was in use at its start.

    On CUDA the allocator's count; elsewhere the process's resident set, where the kernel lets its peak be reset and
    the C library gives back what was freed before (Linux with glibc).
    """

    def __init__(self, device: torch.device):
        self.device, self.peak = device, None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            try:
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")
                self._before = _status("VmRSS")
            except (OSError, AttributeError):
                self._before = None
        return self

    def __exit__(self, *error) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._before is not None:
            self.peak = max(_status("VmHWM") - self._before, 0)


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
