"""What the parts of a cycle cost on this machine, in plain steps: measured in the background of real calls.

Beside the benchmark this is the one place that takes times. Each part of a cycle, a target pass over n nodes, the
first draft, a second draft of K blocks, and the rest, is timed as it runs; on devices whose work is asynchronous by
events that are read when they are over, so nothing waits. There are no warm-up runs: before a part was measured, its
cost is guessed from the sizes of the models.
"""

import bisect
import functools
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch

FIRST, SECOND, PASS, REST = "first", "second", "pass", "rest"
PARTS = (FIRST, SECOND, PASS, REST)
ONCE = "once"  # a drafter's first draft of a call: it reads the prompt, of any length, and tells nothing of others
Part = tuple[str, int]  # name and size: of a second draft its K blocks, of a pass its nodes a row, else 1
# Of yields by the first word of their names: the ratio, its weight, and what is kept of it at each addition. Whether
# drafts pay changes with the kind of text, which is soon another one.
_PRIORS = {"gain": (0.5, 2.0, 0.97), "cycle": (1.0, 1.0, 0.97), "added": (0.25, 1.0, 0.9)}
KEPT = 16  # measurements of a part, and of a plain step, that count: the latest
FEW = 3  # measurements of a part, below which its cost may be no more than that of its first runs
HELD_UP = 2.0  # medians, above which a plain step tells nothing of the others
LONG_AGO = 32  # cycles after which plain steps of before count for little: machines get slower and faster
SIZES = (1, 2, 4, 8, 16, 32, 64)  # of passes: few, so that each is measured soon, and what products are filled up to
BEGINNING = 1.5  # plain steps that a call may lose before anything was gained, at the most
AHEAD = BEGINNING / 100  # of a call's plain steps, which it may lose before it has them
LIKELY = 100.0  # plain steps of a call, before any is known


class Costs:
    """What cycles cost, for each target, device, number of rows and so on; calls and threads share it."""

    def __init__(self):
        self._lock = threading.RLock()
        self.tables: dict[Place, CostTable] = {}
        self.savings = Savings(lock=self._lock)

    def at(self, place: "Place", guess: Callable[[], "CostTable"]) -> "CostTable":
        """The table of a place. A new one begins as `guess` says."""
        with self._lock:
            if place not in self.tables:
                self.tables[place] = table = guess()
                table.lock = self._lock
            return self.tables[place]

    def as_dict(self) -> dict:
        """What `from_dict` reads, for a JSON file."""
        with self._lock:
            return {
                "costs": [{**vars(place), **table.as_dict()} for place, table in self.tables.items()],
                "savings": self.savings.as_dict(),
            }

    @classmethod
    def from_dict(cls, saved: dict) -> "Costs":
        """As saved.

        Raises:
            ValueError: for something else.
        """
        costs = cls()
        try:
            for entry in saved["costs"]:
                place = Place(**{known.name: entry[known.name] for known in fields(Place)})
                costs.at(place, functools.partial(CostTable.from_dict, entry))
            costs.savings.load(dict(saved.get("savings", {})))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"These are no costs as `save_costs` writes them: {type(error).__name__}: {error}"
            ) from error
        return costs

    def __str__(self) -> str:
        with self._lock:
            return "\n".join(f"{place}: {table}" for place, table in self.tables.items()) or "nothing measured yet"

    def __deepcopy__(self, memo):
        return Costs.from_dict(self.as_dict())

    def __reduce__(self):
        return Costs.from_dict, (self.as_dict(),)


@dataclass(frozen=True)
class Place:
    """What costs depend on."""

    target: str
    dtype: str
    device: str
    threads: int
    rows: int  # of the batch; above 4 the next power of two
    context: int  # tokens in the cache: up to so many

    @classmethod
    def of(cls, model, device: torch.device, rows: int, length: int) -> "Place":
        """Of a target at work on so many rows, the longest of `length` tokens."""
        config = model.config.get_text_config(decoder=True)
        sizes = [getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        rows = rows if rows <= 4 else 1 << (rows - 1).bit_length()
        dtype = str(model.dtype).removeprefix("torch.")
        target = f"{type(model).__name__} {'x'.join(map(str, sizes))}"
        return cls(target, dtype, name, torch.get_num_threads(), rows, context_of(length))

    def __str__(self) -> str:
        place = f"{self.target}, {self.dtype}, {self.device}, {self.threads} threads"
        return f"{place}, {self.rows} rows, {self.context} tokens"


def context_of(length: int) -> int:
    """Of a place, by the tokens in the cache."""
    context = 1024
    while context < length:
        context *= 4
    return context


@dataclass
class Tally:
    """A ratio of two sums that slowly forget, beginning as if `weight` had been seen with the ratio `prior`."""

    prior: float = 1.0
    weight: float = 4.0
    keeps: float = 0.97  # of what it knows, at each addition
    of: float = 0.0  # the sums
    to: float = 0.0

    def add(self, of: float, to: float) -> None:
        keeps = self.keeps if to else self.keeps**0.1  # nothing was seen: what is known fades, but slowly
        self.of, self.to = keeps * self.of + of, keeps * self.to + to

    @property
    def ratio(self) -> float:
        return (self.prior * self.weight + self.of) / (self.weight + self.to)

    def begun(self, most: float = 4.0) -> "Tally":
        """A copy for one call: what was known before counts for no more than `most`."""
        share = min(1.0, most / self.to) if self.to > 0 else 1.0
        return Tally(self.prior, self.weight, self.keeps, share * self.of, share * self.to)


@dataclass
class Savings:
    """What calls may begin with, in plain steps, so that short ones lose no greater share to tries than long ones.

    A try costs about a plain step, which is 1% of a call of 100 and 10% of a call of ten. So a call begins with a
    share `AHEAD` of the steps that it will likely have, and what others before it have left of theirs: several short
    calls save for one try. What a call lost that then was shorter, later ones do without.
    """

    held: float = 0.0  # less than nothing: owed
    steps: Tally = field(default_factory=lambda: Tally(LIKELY, 1.0, keeps=0.9))  # of a call
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def take(self, limit: float) -> float:
        """What a call of at most so many tokens begins with."""
        with self.lock:
            begun = min(max(self.held + AHEAD * min(limit, self.steps.ratio), 0.0), BEGINNING)
            self.held -= begun
            return begun

    def give_back(self, left: float, steps: float) -> None:
        """The call is over: what is left of that, and the plain steps that its tokens would have taken."""
        with self.lock:
            self.held = min(self.held + AHEAD * steps + left, BEGINNING)
            if steps:
                self.steps.add(steps, 1.0)

    def as_dict(self) -> dict:
        return {"held": self.held, "of": self.steps.of, "to": self.steps.to}

    def load(self, saved: dict) -> None:
        """As `as_dict` gave it, or as new where it has nothing."""
        self.held, self.steps.of, self.steps.to = (float(saved.get(name, 0.0)) for name in ("held", "of", "to"))


class Curve:
    """A part's cost by its size: measured at some sizes, never falling, linear in between; else as guessed.

    Args:
        guess: (size, cost) of at least one size, rising.
    """

    def __init__(self, guess: list[tuple[int, float]]):
        self.guess = sorted((int(size), float(cost)) for size, cost in guess)
        self.latest: dict[int, list[float]] = {}
        self.counts: dict[int, int] = {}
        self._points: list[tuple[int, float]] = []

    def add(self, size: int, cost: float) -> None:
        kept = self.latest.setdefault(size, [])
        kept.append(cost)
        del kept[:-KEPT]
        self.counts[size] = self.counts.get(size, 0) + 1
        self._fit()

    def _fit(self) -> None:
        found = [(size, median(kept), len(kept)) for size, kept in sorted(self.latest.items())]
        self._points = never_falling(found)

    def __call__(self, size: int) -> float:
        return self._along(self._points, size)

    def hoped(self, size: int) -> float:
        """The cost, where it was measured a few times at most no more than follows from the sizes that are known."""
        if self.counts.get(size, 0) >= FEW:
            return self(size)
        known = [point for point in self._points if self.counts.get(point[0], 0) >= FEW]
        return min(self(size), self._along(known, size))

    def _along(self, points: list[tuple[int, float]], size: int) -> float:
        """By these points; beyond them by how the guess goes on."""
        if not points:
            return interpolated(self.guess, size)
        (least, at_least), (most, at_most) = points[0], points[-1]
        if least <= size <= most:
            return interpolated(points, size)
        if size > most:  # as much more as guessed: a first step may be steep, and what is tried is known from then on
            return at_most + max(interpolated(self.guess, size) - interpolated(self.guess, most), 0.0)
        scale = at_least / max(interpolated(self.guess, least), 1e-9)
        return max(scale * interpolated(self.guess, size), 0.0)

    def as_dict(self) -> dict:
        return {
            "guess": self.guess,
            "latest": {str(size): [round(c, 4) for c in kept] for size, kept in self.latest.items()},
        }

    @classmethod
    def from_dict(cls, saved: dict) -> "Curve":
        curve = cls([(size, cost) for size, cost in saved["guess"]])
        curve.latest = {int(size): [float(c) for c in kept] for size, kept in saved["latest"].items()}
        curve.counts = {size: len(kept) for size, kept in curve.latest.items()}
        curve._fit()
        return curve


def median(values: list[float]) -> float:
    """The lower of the two in the middle. For plain steps as for parts: what else a machine does slows all of them."""
    return sorted(values)[(len(values) - 1) // 2]


def usual(values: list[float]) -> float:
    """The mean, where none counts for more than `HELD_UP` medians: first steps time products, and on a busy machine
    one may take thirty times as long as the next."""
    most = HELD_UP * median(values)
    return sum(min(value, most) for value in values) / len(values)


def never_falling(points: list[tuple[int, float, int]]) -> list[tuple[int, float]]:
    """The closest values that never fall: neighbours that do are pooled, by their weights.

    Args:
        points: size, value and weight, by rising size.
    """
    pools: list[list] = []  # value, weight, sizes
    for size, value, weight in points:
        pools.append([value, weight, [size]])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            value, weight, sizes = pools.pop()
            before = pools[-1]
            before[0] = (before[0] * before[1] + value * weight) / (before[1] + weight)
            before[1] += weight
            before[2] += sizes
    return [(size, value) for value, _, sizes in pools for size in sizes]


def interpolated(points: list[tuple[int, float]], size: int) -> float:
    """Linear between points of rising size; beyond the ends on the line of the last two, or constant."""
    if len(points) == 1:
        return points[0][1]
    at = min(max(bisect.bisect_left(points, (size, -1.0)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * (size - x0) / (x1 - x0)


@dataclass
class CostTable:
    """What the parts of a cycle cost at one place, in plain steps; and what drafts are worth there."""

    curves: dict[str, Curve]
    unit: list[float] = field(default_factory=list)  # seconds of plain steps, the latest
    plain_steps: int = 0  # measured
    since_plain: int = 0  # cycles
    cycles: int = 0
    last_plain: int = 0  # by number of cycles, when one was measured
    # By kind of cycle, "first" or "both", and whether its tree is large: accepted tokens to what their probabilities
    # said. By "added:S", what drafts added to the text so far in situation S, in tokens, to cycles. By "gain:K": what
    # a second draft of K blocks adds, in tokens, to the probability that the text comes to its prefixes. By
    # "cycle:K:N", of recorded cycles with trees of N nodes: tokens to cycles.
    yields: dict[str, Tally] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    @classmethod
    def guessed(cls, weight: float, slope: float, first: float, second: float, rows: int, block: int) -> "CostTable":
        """Before anything is measured.

        Args:
            weight: what each token of a pass adds to its cost, in passes over one token.
            slope: the same of a drafter's passes.
            first, second: what passes of the drafters over one token cost, in such passes of the target.
            block: slots of a drafted block.
        """

        def grown(by: float, tokens: int) -> float:
            return (1 + by * (tokens - 1)) / (1 + weight * (rows - 1))

        passes = [(size, 0.97 * grown(weight, rows * size)) for size in (1, SIZES[-1])]
        seconds = [(count, second * grown(slope, rows * block * count)) for count in (1, 8)]
        once = [(1, first * grown(slope, rows * block))]
        return cls({FIRST: Curve(once), SECOND: Curve(seconds), PASS: Curve(passes), REST: Curve([(1, 0.1)])})

    def of(self, *parts: Part) -> float:
        """What a cycle with these parts costs, the rest included; a pass over one node alone is a plain step: 1."""
        if parts == ((PASS, 1),):
            return 1.0
        return self.curves[REST](1) + sum(self.curves[name](size) for name, size in parts)

    def hoped(self, name: str, size: int) -> float:
        """What a part may cost, measured or not.

        First runs do what is done once, as gathering a head's rows and timing products. What seems too dear to be
        tried would else never be measured again.
        """
        return self.curves[name].hoped(size)

    def see(self, seconds: dict[Part, float]) -> float:
        """Take in a cycle's measured times; returns its cost in plain steps, `usual` ones."""
        with self.lock:
            parts = [part for part in seconds if part[0] not in (REST, ONCE)]
            total, plain = sum(seconds.values()), parts == [(PASS, 1)]
            self.cycles += 1
            if plain:
                # Plain steps alone are the unit. A cycle of known cost would tell it too, but costs are known in it:
                # the least bias of one would be the other's, again and again.
                kept = KEPT if self.cycles - self.last_plain < LONG_AGO else 5
                self.unit = [*self.unit, total][-kept:]
                self.last_plain, self.plain_steps = self.cycles, self.plain_steps + 1
            if not self.unit:
                return self.of(*parts)
            unit = median(self.unit)
            for (name, size), taken in seconds.items():
                if name != ONCE and (not plain or name == PASS):
                    self.curves[name].add(size, taken / unit)
            return total / usual(self.unit)

    def yielded(self, kind: str) -> Tally:
        with self.lock:
            prior, weight, keeps = _PRIORS.get(kind.partition(":")[0], (1.0, 4.0, 0.97))
            return self.yields.setdefault(kind, Tally(prior, weight, keeps))

    @property
    def share_of_rows(self) -> float:
        """Of a plain step's cost what grows with its rows; guessed, as one more token of each row costs."""
        guess = self.curves[PASS].guess
        return min(max(interpolated(guess, 2) - interpolated(guess, 1), 0.0), 1.0)

    @property
    def is_measured(self) -> bool:
        """Whether it is known how long a plain step takes."""
        return self.plain_steps >= 2

    @property
    def is_due(self) -> bool:
        """Whether that is to be measured again, after a while without plain steps."""
        return self.since_plain >= min(128, 16 * self.plain_steps)

    def as_dict(self) -> dict:
        return {
            "plain_step_seconds": median(self.unit) if self.unit else None,
            "plain_steps": self.plain_steps,
            "cycles": self.cycles,
            "yields": {kind: {"of": tally.of, "to": tally.to} for kind, tally in self.yields.items()},
            "parts": {name: curve.as_dict() for name, curve in self.curves.items()},
        }

    @classmethod
    def from_dict(cls, saved: dict) -> "CostTable":
        table = cls({name: Curve.from_dict(saved["parts"][name]) for name in PARTS})
        seconds = saved["plain_step_seconds"]
        table.unit = [] if seconds is None else [float(seconds)]
        table.plain_steps, table.cycles = saved["plain_steps"], saved["cycles"]
        table.last_plain = table.cycles
        for kind, sums in saved["yields"].items():
            tally = table.yielded(kind)
            tally.of, tally.to = sums["of"], sums["to"]
        return table

    def __str__(self) -> str:
        sizes = {FIRST: (1,), SECOND: (1, 4), PASS: (4, 16, 32, 64), REST: (1,)}

        def shown(name: str, size: int) -> str:
            guessed = "" if self.curves[name].counts.get(size) else "~"
            return f"{name}{size if len(sizes[name]) > 1 else ''} {guessed}{self.curves[name](size):.2f}"

        unit = f"{1e3 * self.as_dict()['plain_step_seconds']:.1f} ms" if self.unit else "not measured"
        costs = ", ".join(shown(name, size) for name in PARTS for size in sizes[name])
        return f"a plain step {unit}; in plain steps {costs} (~ guessed; {self.cycles} cycles)"


class Stopwatch:
    """Splits a cycle's time among its parts, and holds nothing up.

    Args:
        device: where the work runs. Other than a CPU's, it is timed by events, which are read once they are over.
        clock: seconds, on a CPU.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._device, self._clock = device, clock
        self._asynchronous = device.type != "cpu"
        self._marks: list[tuple[Part, object]] = []
        self._start: object = None
        self._running: deque = deque()  # cycles whose work may not be over

    def start(self) -> None:
        self._marks, self._start = [], self._now()

    def mark(self, name: str, size: int = 1) -> None:
        """What ran since the last mark was this part."""
        self._marks.append(((name, size), self._now()))

    def stop(self) -> None:
        """The cycle is over; what ran since the last mark was of the rest."""
        self.mark(REST)
        self._running.append((self._start, self._marks))

    def finished(self) -> list[dict[Part, float]]:
        """Seconds of each part, of cycles that are over by now and were not asked for before."""
        found = []
        while self._running and self._is_over(self._running[0][1][-1][1]):
            before, marks = self._running.popleft()
            seconds: dict[Part, float] = {}
            for part, at in marks:
                seconds[part] = seconds.get(part, 0.0) + self._between(before, at)
                before = at
            found.append(seconds)
        return found

    def _now(self):
        if not self._asynchronous:
            return self._clock()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def _is_over(self, at) -> bool:
        return not self._asynchronous or at.query()

    def _between(self, before, after) -> float:
        return before.elapsed_time(after) / 1e3 if self._asynchronous else after - before


def guess(place: Place, target, drafters: list) -> CostTable:
    """What cycles may cost at a place, before anything is measured: by the sizes of the models.

    Args:
        drafters: the networks, the first drafter's first.
    """
    on_cpu = place.device == "cpu"  # where arithmetic counts; elsewhere it is mostly how many layers there are
    weight = 0.05 if on_cpu else 0.003  # of a token more in a pass
    config = target.config.get_text_config(decoder=True)
    head = config.vocab_size * config.hidden_size
    whole = sum(parameter.numel() for parameter in target.parameters()) or 1
    shares = []
    for drafter in drafters:
        own = drafter.config
        read = (own.draft_vocab_size or config.vocab_size) * config.hidden_size
        size = (sum(parameter.numel() for parameter in drafter.parameters()) + read) / max(whole, head)
        layers = own.num_hidden_layers / config.num_hidden_layers
        shares.append(size if on_cpu else max(size, layers))
    first, second = (shares[0], shares[-1]) if shares else (0.0, 0.0)
    block = drafters[0].config.block_size if drafters else 1
    return CostTable.guessed(weight, weight, first, second, place.rows, block)


def of_whole_cycles(parts: CostTable, shapes: list[tuple[int, int]]) -> CostTable:
    """What recorded cycles may cost, which are timed as a whole: each as a pass over as many nodes as its tree has.

    Args:
        parts: what their parts may cost; shapes: nodes and branches of each, the plain step first.
    """
    points = [(1, 1.0)]
    for nodes, branches in shapes[1:]:
        second = [(SECOND, branches)] if branches else []
        points.append((max(nodes, points[-1][0] + 1), parts.of((FIRST, 1), *second, (PASS, nodes))))
    nothing = {name: Curve([(1, 0.0)]) for name in PARTS}
    return CostTable({**nothing, PASS: Curve(points)})


_opening = threading.Lock()


def costs_of(assistant) -> Costs:
    """What is known with an assistant, of its calls or as loaded."""
    with _opening:
        known = vars(assistant).get("_costs")
        if not isinstance(known, Costs):
            known = Costs() if known is None else Costs.from_dict(known)
            assistant._costs = known
        return known


def summary(path) -> str:
    """A file of `save_costs`, in words."""
    with open(path, encoding="utf-8") as file:
        return str(Costs.from_dict(json.load(file)))
