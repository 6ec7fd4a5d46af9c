"""What pays: whether a cycle drafts, whether the second drafter does too, and how many nodes the target checks.

All of it is one rule, `best`, applied to what is known at each step of a cycle. The costs that it needs are measured
(`costs.py`), the probabilities are the drafts' own, corrected by how often they were right.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from .costs import BEGINNING, FIRST, ONCE, PASS, REST, SECOND, SIZES, CostTable, Part, Savings, Stopwatch, Tally

SHARE = 0.01  # of a call's time that trying may cost, beside what it begins with
MOST = 4.0  # plain steps of gains that may be lost again
LUCK = 1 / 3  # of what a call begins with: so far it may fall short of what was expected, before that is no chance
LONGEST = 64.0  # plain steps between tries, however often they lost
LATER = 8.0  # plain steps before a call's first try, where other calls' drafts lost
FEW = 8  # nodes of a tree, up to which the drafts' surest tokens are most of it
EVERY = 4  # in the first cycles, each so many take a size that was not measured yet
LEARNING = 64  # cycles
STEEP = 8  # the power by which the row that will take longest is told from others
KNOWN = 8  # tokens of each row, before which its own pace says little

PLAIN, FREE, ONLY_FIRST, BOTH = "plain", "free", "first", "both"  # kinds of cycles
SHAPES = (PLAIN, ONLY_FIRST, BOTH)  # kinds of recorded cycles
_KINDS = {PLAIN: "plain", FREE: "the text so far", ONLY_FIRST: "first drafter", BOTH: "both drafters"}  # in words


@dataclass(frozen=True)
class Offer:
    """One way to go on: what it is, the tokens that it is expected to yield, and its cost in plain steps."""

    what: int
    tokens: float
    cost: float

    def value(self, rate: float) -> float:
        """What is left of its tokens, where its time would otherwise yield `rate` tokens a plain step."""
        return self.tokens - rate * self.cost


def best(offers: Iterable[Offer], rate: float) -> Offer:
    """The offer to take, the first of equals: the one of the greatest `tokens - rate * cost`.

    Decoding is a renewal process: cycles in situations s, each with its offers, follow each other, and what counts is
    the tokens of all cycles over the time of all. With a policy π that is R(π) = E[tokens(π(s))] / E[cost(π(s))]. Let
    R* be the greatest rate. Then E[tokens - R* cost] ≤ 0 for every policy, with equality for the best one; and this
    expectation is greatest where it is greatest in each situation by itself (Dinkelbach 1967). So the best policy
    takes in each situation the offer with the greatest tokens - R* cost, whatever other situations there are. R* is
    not known, but taking the rate of the policy so far in its place gives a better policy unless it is the best.

    Two things follow. What was spent in a cycle is no offer's, and drops out: a draft that was made is not a reason to
    check it. And of trees of the n best nodes, with 1 + p_1 + ... + p_{n-1} tokens and cost c(n), the next node pays
    if its probability is above what its time would yield elsewhere: p_n > rate * (c(n + 1) - c(n)).
    """
    return max(offers, key=lambda offer: offer.value(rate))


def trees(reach: Sequence[float], cost: Callable[[int], float], rows: int, sizes: Iterable[int]) -> list[Offer]:
    """Trees of the n best nodes a row, by their sizes n, the anchor included.

    Args:
        reach: the probability that the best, second best, ... node below the anchor is reached, summed over the rows.
        cost: of a cycle with a pass over n nodes a row, or of what is left of it.
        rows: each yields the target's own token.
    """
    found, tokens, at = [], float(rows), 0
    for size in sorted(sizes):
        tokens += sum(reach[at : size - 1])
        at = max(size - 1, at)
        if at <= len(reach) or size == 1:
            found.append(Offer(size, tokens, cost(size)))
    return found


def weights(rooms: Sequence[int] | None, emitted: Sequence[int], share: float) -> list[float]:
    """What a token of each row is worth, one on average.

    A call lasts as long as its slowest row. With c(n) = f + g n for a step of n rows, and t_b steps that row b still
    needs, what is left takes f max(t) + g (t_1 + ... + t_n): a step less of any row saves g, of the last row f more;
    and a token is a plain step less. Which row will be the last is not known; it is likely the one that has far to go
    by the pace that it had so far.

    Args:
        rooms: by row, tokens that it may still emit; `None` where that has no end.
        emitted: by row, tokens so far, all in the same number of cycles.
        share: g n / (f + g n), of a step's cost what grows with its rows.
    """
    left = [1] * len(emitted) if rooms is None else rooms
    steps = [room / (tokens + KNOWN) for room, tokens in zip(left, emitted)]
    last = [(one / max(steps)) ** STEEP for one in steps]
    return [share + (1 - share) * len(last) * one / sum(last) for one in last]


class Purse:
    """What trying may still cost a call, in plain steps: a bound of what drafts that do not pay take from it.

    A call may lose what it begins with and a share `SHARE` of the plain steps that its tokens would take; what drafts
    gained it may lose again, up to `MOST`. All that is by what was expected: tokens themselves come by luck, and a few
    unlucky cycles must not end what pays. But no call falls short of it by more than `LUCK` of what it began with,
    whatever its drafts promise. While drafts lose, those that are tried become rarer.

    Args:
        begun: what it begins with, see `Savings`.
    """

    def __init__(self, begun: float = BEGINNING):
        self.begun = self.held = self.real = begun  # `held` by what was expected, `real` by what came
        self.steps = 0.0  # plain steps' worth that came
        self.wait = 0.0  # plain steps from a try that lost to the next one
        self.waited = 0.0

    @property
    def left(self) -> float:
        """Of what it began with; less than nothing where luck was bad."""
        return min(self.held, self.real, self.begun)

    def affords(self, price: float) -> bool:
        """Whether so much may be lost."""
        return price <= min(self.held, self.real + LUCK * self.begun)

    @property
    def is_time(self) -> bool:
        """Whether to try once more what lost before."""
        return self.waited >= self.wait

    def saw(self, expected: float, cost: float = 1.0, got: float | None = None) -> None:
        """A cycle was to be worth so many plain steps, cost so many, and gave as much if nothing else is said."""
        got = expected if got is None else got
        self.held = min(self.held + SHARE * got + expected - cost, MOST)
        self.real = min(self.real + SHARE * got + got - cost, MOST)
        self.steps += got
        self.waited += got

    def expect_loss(self) -> None:
        """Before anything was tried: other calls did, and lost."""
        self.wait = LATER

    def tried(self, gained: float) -> None:
        """What was tried is expected to gain so much, or to lose it."""
        self.wait, self.waited = 0.0 if gained > 0 else min(max(4 * self.wait, 2.0), LONGEST), 0.0


@contextmanager
def purse_out_of(savings: Savings, limit: float) -> Iterator[Purse]:
    """A call's purse, of a call of at most so many tokens a row; what is left goes back, whatever becomes of it."""
    purse = Purse(savings.take(limit))
    try:
        yield purse
    finally:
        savings.give_back(purse.left, purse.steps)


@dataclass
class Decisions:
    """What was decided in a call's cycles, why, and what that was expected to cost."""

    kinds: Counter[str] = field(default_factory=Counter)  # cycles: plain, free (no drafter's pass), first, both
    nodes: Counter[int] = field(default_factory=Counter)  # cycles by nodes checked in each row
    branches: Counter[int] = field(default_factory=Counter)  # cycles by blocks of the second drafter
    reasons: Counter[str] = field(default_factory=Counter)  # cycles by why they were as they were
    tokens: float = 0.0  # that all cycles gave, a row
    predicted: float = 0.0  # cost of the cycles that were measured, in plain steps, as their decisions had it
    measured: float = 0.0  # and as it was

    def __str__(self) -> str:
        """One line: what was chosen, what it gave and cost, and why."""
        cycles = self.kinds.total()
        if not cycles:
            return "no cycles"
        kinds = ", ".join(f"{count} {_KINDS[kind]}" for kind, count in self.kinds.most_common())
        nodes = sum(size * count for size, count in self.nodes.items()) / cycles
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.reasons.most_common(2))
        return (
            f"{cycles} cycles: {kinds}; {nodes:.1f} nodes on average; {self.tokens / cycles:.2f} tokens a pass; "
            f"cost {self.measured:.1f} plain steps, {self.predicted:.1f} expected; why: {reasons}"
        )


def manner_of(do_sample: bool, temperature: float | None) -> str:
    """How a target chooses its tokens, in names of what drafts are worth: a text that is drawn is foreseen less."""
    return f" at {1.0 if temperature is None else temperature:.1f}" if do_sample else ""


def situation(more: float) -> str:
    """Which of a few kinds a cycle is of, before anything is drafted: by the tokens that the text so far promises."""
    return "nothing" if more <= 0 else "a token" if more < 1 else "more" if more < 3 else "much more"


class Pace:
    """Decides for one call, cycle by cycle, and learns from what came of it.

    Args:
        table_at: for a number of rows and a length, what cycles cost there.
        watch: takes the times.
        most_branches, most_nodes: bounds of what is decided on.
        manner: how the target chooses, see `manner_of`: what drafts are worth depends on it.
        purse: what trying may cost the call.
    """

    def __init__(
        self,
        table_at: Callable[[int, int], CostTable],
        watch: Stopwatch,
        most_branches: int,
        most_nodes: int,
        manner: str = "",
        purse: Purse | None = None,
    ):
        self._table_at, self.watch, self._manner = table_at, watch, manner
        self._counts = [count for count in (1, 2, 4, 8, 16) if count < most_branches]
        self._counts += [most_branches] if most_branches else []
        self._sizes = [size for size in SIZES if size < most_nodes] + [most_nodes]
        self.decisions = Decisions()
        self.purse = Purse() if purse is None else purse
        self._have_run: set[str] = set()  # drafters, by their parts
        self._was_asked = False  # whether to draft
        self._rate = Tally(1.0, 4.0, keeps=0.95)  # tokens a row and plain step
        self._yields: dict[str, Tally] = {}
        self._expected: list[float] = []  # costs of the cycles whose times are not known yet
        self._where: list[CostTable] = []  # and their tables
        self.weights = [1.0]

    # A cycle, in order ----------------------------------------------------------------------------------------------

    def begin(self, emitted: Sequence[int], length: int, rooms: Sequence[int] | None = None) -> None:
        """A cycle begins, of rows that emitted so much, the longest of `length` tokens; `rooms`, see `weights`."""
        self.rows = len(emitted)
        self.table = self._table_at(self.rows, length)
        self.weights = weights(rooms, emitted, self.table.share_of_rows)
        self._parts: list[Part] = []
        self._kind, self._reason, self._measures = PLAIN, "no room for more than a token", False
        self._raw = self._before = self._prefixes = 0.0
        self.watch.start()

    def drafts(self, reach: Sequence[float], has_drafter: bool = True) -> bool:
        """Whether the first drafter shall draft. `reach`, see `trees`: of nodes that need no drafter's pass.

        Here and below probabilities of rows are summed by their `weights`.
        """
        table = self.table
        self._kind, self._reason = FREE if reach else PLAIN, ""
        if not table.is_measured:
            self._reason, self._measures = "measuring a plain step", True
            return False
        self._measures = table.is_due
        if self._measures:
            self._reason = "measuring a plain step again"
            return False
        without = self._without = self._best_tree(self._kind, reach)
        if not has_drafter:
            return False
        self._situation = situation(without.tokens / self.rows - 1)
        if not self._was_asked and self._added.ratio <= 0:
            self.purse.expect_loss()
        self._was_asked = True
        if not self.purse.affords(table.hoped(FIRST, 1) + table.curves[REST](1) + self._more):
            self._reason = "drafts do not pay here"
            return False
        if self._added.ratio <= 0 and not self.purse.is_time:
            self._reason = "the text so far does as well" if without.what > 1 else "drafts do not pay here"
            return False
        self._kind = ONLY_FIRST
        return True

    def branches(self, reach: Sequence[float]) -> int:
        """K: after how many prefixes the second drafter shall draft, 0 for not at all. `reach`: by the first draft."""
        self._before = self._best_tree(ONLY_FIRST, reach).value(self.rate)
        offers = [Offer(0, 0.0, 0.0)]
        for count in self._counts:
            cost = self.table.of(*self._parts) + self.table.hoped(SECOND, count) + self._more
            if self.purse.affords(cost):
                offers.append(Offer(count, self._gain(count) * sum(reach[:count]), self.table.curves[SECOND](count)))
        count = self._untried([offer.what for offer in offers if offer.what]) or best(offers, self.rate).what
        self._prefixes = sum(reach[:count])
        self._kind = BOTH if count else ONLY_FIRST
        return count

    def nodes(self, reach: Sequence[float]) -> int:
        """How many nodes of each row the target shall check. `reach`, see `trees`: by all sources."""
        if self._kind in (PLAIN, FREE) and (not reach or self._measures):
            self._kind, self._reason = PLAIN, self._reason or "nothing to check"
            return 1
        tree = self._without if self._kind == FREE else self._best_tree(self._kind, reach)
        if self._kind in (ONLY_FIRST, BOTH):
            added = (tree.value(self.rate) - self._without.value(self.rate)) / self.rows
            self.purse.tried(added)
            for tally in self._tallies(f"added:{self._situation}"):
                tally.add(added, 1.0)
        if self._kind == BOTH:
            gain = tree.value(self.rate) - self._before
            for tally in self._tallies(f"gain:{self._count}"):
                tally.add(gain, self._prefixes)
        size = self._unmeasured(tree.what, len(reach)) or tree.what
        self._raw = sum(reach[: size - 1])
        if not self._reason:
            self._reason = _REASONS[self._kind] if size > 1 else "no node pays for itself"
        if size == 1 and self._kind == FREE:
            self._kind = PLAIN
        return size

    def mark(self, name: str, size: int = 1) -> None:
        """What ran since the last mark was this part of the cycle."""
        if name in (FIRST, SECOND) and name not in self._have_run:
            self._have_run.add(name)
            self.watch.mark(ONCE)
        else:
            self.watch.mark(name, size)
        if name != REST:
            self._parts.append((name, size))

    def end(self, emitted: Sequence[int]) -> None:
        """The cycle is over: tokens that each row emitted, all but the last of them drafted."""
        self.watch.stop()
        table, parts = self.table, tuple(self._parts)
        cost, plain = table.of(*parts), parts == ((PASS, 1),)
        table.since_plain = 0 if plain else table.since_plain + 1
        right = self._right(self._kind, dict(parts)[PASS])
        if not plain:
            with table.lock:
                for tally in self._tallies(right):
                    tally.add(self._sum(max(count - 1, 0) for count in emitted), self._raw)
        expected = 1 + self._tally(right).ratio * self._raw / self.rows
        self.purse.saw(expected, cost, self._sum(emitted) / self.rows)
        self._rate.add(expected, cost)
        self.decisions.tokens += sum(emitted) / self.rows
        self._note(cost)

    def _sum(self, counts: Iterable[int]) -> float:
        return sum(weight * count for weight, count in zip(self.weights, counts))

    def _note(self, cost: float) -> None:
        decisions, parts = self.decisions, dict(self._parts)
        decisions.kinds[self._kind] += 1
        decisions.nodes[parts[PASS]] += 1
        decisions.branches[parts.get(SECOND, 0)] += 1
        decisions.reasons[self._reason] += 1
        self._expected.append(cost)
        self._where.append(self.table)
        for seconds in self.watch.finished():
            decisions.predicted += self._expected.pop(0)
            decisions.measured += self._where.pop(0).see(seconds)

    # What it knows --------------------------------------------------------------------------------------------------

    @property
    def rate(self) -> float:
        """Tokens of all rows that a plain step's time yields: at least those of the plain step."""
        return self.rows * max(1.0, self._rate.ratio)

    @property
    def _count(self) -> int:
        return dict(self._parts).get(SECOND, 0)

    def _tally(self, kind: str) -> Tally:
        if kind not in self._yields:
            self._yields[kind] = self._shared(kind).begun()
        return self._yields[kind]

    def _tallies(self, kind: str) -> tuple[Tally, Tally]:
        """The call's, and that of all calls."""
        return self._tally(kind), self._shared(kind)

    def _shared(self, kind: str) -> Tally:
        return self.table.yielded(f"{kind}{self._manner}")

    @property
    def _more(self) -> float:
        """What a pass over the smallest tree costs beside a plain step: drafts are for nothing without one."""
        return max(self.table.hoped(PASS, self._sizes[1]) - 1, 0.0) if self._sizes[1:] else 0.0

    @property
    def _added(self) -> Tally:
        return self._tally(f"added:{self._situation}")

    def _gain(self, count: int) -> float:
        return max(self._tally(f"gain:{count}").ratio, 0.0)

    def _best_tree(self, kind: str, reach: Sequence[float]) -> Offer:
        """Of the trees that the purse affords."""
        spent, offers = tuple(self._parts), []
        if not reach and not spent:  # most cycles of a text that cannot be drafted
            return Offer(1, float(self.rows), 1.0)

        def cost(size: int) -> float:
            return self.table.of(*spent) + self.table.hoped(PASS, size) if spent or size > 1 else 1.0

        sizes = [size for size in self._sizes if size == 1 or self.purse.affords(cost(size) - 1)]
        for name, group in itertools.groupby(sizes, lambda size: self._right(kind, size)):
            right = self._tally(name).ratio
            offers += trees([right * p for p in reach], cost, self.rows, group)
        return best(offers, self.rate)

    @staticmethod
    def _right(kind: str, size: int) -> str:
        """The tally that corrects the probabilities of such trees: large ones are chosen where much is promised."""
        return f"{kind}, {'few' if size <= FEW else 'many'} nodes"

    def _untried(self, counts: list[int]) -> int | None:
        """Now and then one of these numbers of branches, whatever it promises: else nothing would be known of it."""
        cycles, measured = self.table.cycles, self.table.curves[SECOND].counts
        if cycles < LEARNING:
            counts = [count for count in counts if measured.get(count, 0) < 2]
            due = cycles % EVERY == EVERY // 2
        else:
            due = cycles % LEARNING == 0
        if not counts or not due:
            return None
        self._reason = "trying the second drafter"
        return counts[cycles // LEARNING % len(counts)]

    def _unmeasured(self, size: int, most: int) -> int | None:
        """In a place that is new, now and then, a size next to the best one that was hardly measured."""
        table, at = self.table, self._sizes.index(size)
        if size == 1 or table.cycles >= LEARNING or table.cycles % EVERY:
            return None
        counts, spent = table.curves[PASS].counts, tuple(self._parts)
        for other in self._sizes[at + 1 : at + 2] + self._sizes[max(at - 1, 1) : at]:
            price = table.of(*spent, (PASS, other)) - 1
            if other <= most + 1 and counts.get(other, 0) < 2 and self.purse.affords(price):
                self._reason = "measuring a tree of this size"
                return other
        return None


class ShapePace:
    """Chooses among the recorded shapes of a call's cycles, by what each has yielded and cost on average.

    The host reads a cycle late, so that what it says of the next one is not known when that begins: the situations of
    `best` are all alike here.

    Args:
        shapes: nodes and branches of each, the plain step first, and each with one drafter more.
        table: costs of whole cycles, see `costs.of_whole_cycles`.
        watch: takes the times.
        manner: how the target chooses, see `manner_of`.
        purse: what trying may cost the call.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        table: CostTable,
        watch: Stopwatch,
        manner: str = "",
        purse: Purse | None = None,
    ):
        self.shapes, self.table, self.watch = shapes, table, watch
        self.decisions = Decisions()
        self.purse = Purse() if purse is None else purse
        self._rate = Tally(1.0, 4.0, keeps=0.95)  # tokens a row and plain step
        self._shared = [table.yielded(f"cycle:{branches}:{nodes}{manner}") for nodes, branches in shapes]
        self._yields = [tally.begun() for tally in self._shared]
        self._expected: list[float] = []  # costs of the cycles whose times are not known yet
        self._reasons: list[str] = []  # of the cycles that were not read yet
        self._tries = 0

    def begin(self, least: int = 0) -> int:
        """A cycle begins: its shape, one of at least so many drafters."""
        shape, reason = self._choose(range(least, len(self.shapes)))
        self._reasons.append(reason)
        self._expected.append(self._cost(shape))
        self.watch.start()
        self._mark = PASS, self.shapes[shape][0]
        return shape

    def launched(self) -> None:
        """All of it was begun."""
        self.watch.mark(*self._mark)
        self.watch.stop()

    def end(self, shape: int, counts: Sequence[int]) -> None:
        """What a cycle of this shape gave: tokens by row, 0 for one that had ended before."""
        table, (nodes, branches), cost = self.table, self.shapes[shape], self._cost(shape)
        steps = sum(counts) / max(sum(count > 0 for count in counts), 1)
        with table.lock:
            table.since_plain = table.since_plain + 1 if shape else 0
            for tally in (self._yields[shape], self._shared[shape]):
                tally.add(steps, 1.0)
        expected, reason = self._tokens(shape), self._reasons.pop(0)
        self._rate.add(expected, cost)
        if reason != _FORCED:
            self.purse.saw(expected, cost, steps)
        if shape and reason != _FORCED:
            self.purse.tried(expected - cost)
        decisions = self.decisions
        decisions.kinds[SHAPES[shape]] += 1
        decisions.nodes[nodes] += 1
        decisions.branches[branches] += 1
        decisions.reasons[reason] += 1
        decisions.tokens += steps
        for seconds in self.watch.finished():
            decisions.predicted += self._expected.pop(0)
            decisions.measured += table.see(seconds)

    def _choose(self, allowed: Sequence[int]) -> tuple[int, str]:
        """Of these shapes one, and why."""
        table, purse = self.table, self.purse
        if allowed[0]:
            return self._best(allowed), _FORCED
        if not table.is_measured:
            return 0, "measuring a plain step"
        if table.is_due:
            return 0, "measuring a plain step again"
        drafting = [shape for shape in allowed[1:] if purse.affords(self._cost(shape) - 1)]
        found = self._best([0, *drafting])
        if not drafting or not (found or purse.is_time):
            return 0, "drafts do not pay here"
        self._tries += 1
        new = [shape for shape in drafting if table.curves[PASS].counts.get(self.shapes[shape][0], 0) < 2]
        if new and self._tries % EVERY == 1:
            return new[0], "measuring this shape"
        return found or self._best(drafting), _REASONS.get(SHAPES[found], "trying whether drafts pay")

    def _best(self, shapes: Sequence[int]) -> int:
        rate = max(1.0, self._rate.ratio)
        return best([Offer(shape, self._tokens(shape), self._cost(shape)) for shape in shapes], rate).what

    def _tokens(self, shape: int) -> float:
        return self._yields[shape].ratio if shape else 1.0

    def _cost(self, shape: int) -> float:
        return self.table.of((PASS, self.shapes[shape][0]))


_FORCED = "a drafter must read on"
_REASONS = {
    FREE: "the text so far pays",
    ONLY_FIRST: "the first draft pays, the second would not",
    BOTH: "both drafts pay",
}
