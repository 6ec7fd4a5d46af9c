"""The text so far as a source of candidates: what followed, earlier in it, after the tokens that it now ends with.

Of the last n tokens each earlier occurrence is found by one look into a table for that n, the longest n first; a token
more costs one entry in each table. What follows the occurrences is a small tree, whose probabilities are those with
which such nodes turned out right in this call: what the target wrote says so of every node below the walk, whether a
pass checked it or not.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .tree import CONTEXT_RANK, Candidates

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # n: how many tokens a match can have
MOST_MATCHES = 8  # occurrences that are looked at, the longest matches first and of these the latest
DEPTH = 24  # tokens after each


class ContextIndex:
    """One row's text, and where each n-gram of it stands."""

    def __init__(self, tokens: Iterable[int] = ()):
        self.tokens: list[int] = []
        # For each n: by n-gram, the place of the token after its latest occurrence; by place, that of the one before.
        self._latest: list[dict[tuple[int, ...], int]] = [{} for _ in LENGTHS]
        self._earlier: list[list[int]] = [[] for _ in LENGTHS]
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on."""
        text = self.tokens
        for token in tokens:
            place = len(text)
            last = tuple(text[-LENGTHS[-1] :])
            for length, latest, earlier in zip(LENGTHS, self._latest, self._earlier):
                if length > place:
                    earlier.append(-1)
                    continue
                key = last[-length:]
                earlier.append(latest.get(key, -1))
                latest[key] = place
            text.append(token)
        vars(self).pop("continuations", None)

    def matches(self, most: int = MOST_MATCHES) -> Iterator[tuple[int, int]]:
        """The longest matches of the text's end, the latest first among those of one length.

        Yields:
            Which of `LENGTHS` the match has at least, and the place of the token after it; each place once.
        """
        seen: set[int] = set()
        last = tuple(self.tokens[-LENGTHS[-1] :])
        for level in reversed(range(len(LENGTHS))):
            if LENGTHS[level] > len(last):
                continue
            place = self._latest[level].get(last[-LENGTHS[level] :], -1)
            while place >= 0 and len(seen) < most:
                if place not in seen:
                    seen.add(place)
                    yield level, place
                place = self._earlier[level][place]

    def following(self, place: int, count: int = DEPTH) -> list[int]:
        """The `count` tokens from a place on; where the text ends, what it would repeat from there."""
        found = self.tokens[place : place + count]
        period = len(self.tokens) - place
        while len(found) < count:
            found.append(found[-period])
        return found

    @functools.cached_property
    def continuations(self) -> "Continuations":
        """What followed the matches of the text's end, until the text goes on."""
        found = Continuations()
        for level, place in self.matches():
            found.add(level, self.following(place))
        return found


class Cell(NamedTuple):
    """What is known of a node before the target speaks: nodes of one cell share a hit rate."""

    level: int  # which of `LENGTHS` its longest match has
    depth: int  # 1, 2, 3 for up to 4, 4 for what is deeper
    behind: int  # siblings that stand before it, at most 1
    support: int  # matches that it follows, at most 3

    @property
    def prior(self) -> float:
        """What its hit rate is thought to be before anything was counted: logistic in the log of what has matched.

        So a match of one token is right about every second time, one of sixteen nineteen times of twenty.
        """
        matched = LENGTHS[self.level] + (0, 1, 2, 8)[self.depth - 1]
        odds = 1.2 * math.log(matched) - 1.0 - 1.0 * self.behind + 0.3 * (self.support - 1)
        return 1 / (1 + math.exp(-odds))


CELLS = tuple(Cell(*values) for values in itertools.product(range(len(LENGTHS)), (1, 2, 3, 4), (0, 1), (1, 2, 3)))
PRIORS = tuple(cell.prior for cell in CELLS)
PRIOR_TRIALS = 16.0


def cell_of(level: int, depth: int, behind: int, support: int) -> int:
    """Which of `CELLS` a node is in."""
    depth = depth if depth < 3 else 3 + (depth > 4)
    return ((4 * level + depth - 1) * 2 + (behind > 0)) * 3 + min(support, 3) - 1


class HitRates:
    """How often a node is right where its parent is and the siblings before it are not, as counted in this call.

    By cell the mean of a Beta distribution: what was seen, and before it what other texts have shown.
    """

    def __init__(self):
        self.means = list(PRIORS)
        self._trials = [PRIOR_TRIALS] * len(CELLS)

    def count(self, cell: int, is_right: bool) -> None:
        """One more node of a cell that the target has spoken of."""
        self._trials[cell] += 1
        self.means[cell] += (is_right - self.means[cell]) / self._trials[cell]


class Continuations:
    """What followed a text's matches, as a tree: shared beginnings once, likelier siblings first."""

    def __init__(self):
        self.tokens: list[int] = []
        self.parents: list[int] = []  # before their children; -1 for the anchor
        self.depths: list[int] = []
        self._levels: list[int] = []
        self._support: list[int] = []
        self._children: dict[int, dict[int, int]] = {}  # by parent and token

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, level: int, tokens: Sequence[int]) -> None:
        """One more: what followed a match of that level. Longer matches come first."""
        node = -1
        for depth, token in enumerate(tokens, 1):
            siblings = self._children.setdefault(node, {})
            if token in siblings:
                node = siblings[token]
                self._support[node] += 1
                continue
            self.parents.append(node)
            node = siblings[token] = len(self.tokens)
            self.tokens.append(token)
            self.depths.append(depth)
            self._levels.append(level)
            self._support.append(1)

    def chances(self, rates: HitRates) -> list[float]:
        """Of each node, the probability that it is reached."""
        means, reached = rates.means, [1.0] * (len(self) + 1)  # the anchor's last, where -1 finds it
        left = [1.0] * (len(self) + 1)  # the probability that none of a node's children so far is right
        behind = [0] * (len(self) + 1)
        for node, parent in enumerate(self.parents):
            cell = cell_of(self._levels[node], self.depths[node], behind[parent], self._support[node])
            right = left[parent] * means[cell]
            reached[node] = reached[parent] * right
            left[parent] -= right
            behind[parent] += 1
        return reached[:-1]

    def learn(self, tokens: Sequence[int], rates: HitRates) -> None:
        """Count what was right of it: the text goes on with `tokens`."""
        node = -1
        for token in tokens:
            for behind, (proposed, child) in enumerate(self._children.get(node, {}).items()):
                cell = cell_of(self._levels[child], self.depths[child], behind, self._support[child])
                rates.count(cell, proposed == token)
                if proposed == token:
                    node = child
                    break
            else:
                return


@dataclass(frozen=True)
class Proposal:
    """One row's likeliest continuations, on the host: N nodes, parents before children."""

    tokens: list[int]  # (N,)
    parents: list[int]  # (N,), -1 for the anchor
    depths: list[int]  # (N,), from 1
    scores: list[float]  # (N,), log of the estimated probability that the node is reached

    def __len__(self) -> int:
        return len(self.tokens)


class ContextSource:
    """The texts of a batch's rows so far, and what they have shown of their own worth as a source.

    Args:
        texts: by row, the prompt's tokens.
    """

    def __init__(self, texts: Iterable[Iterable[int]]):
        self.rows = [ContextIndex(text) for text in texts]
        self.rates = HitRates()

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """By row, the tokens that were committed: they say what was right, and the text goes on."""
        for index, row in zip(self.rows, tokens):
            if row:
                index.continuations.learn(row, self.rates)
                index.extend(row)

    def select(self, staying: list[int]) -> None:
        """Let all rows but the given ones leave the batch."""
        self.rows = [self.rows[at] for at in staying]

    def best(self, row: int, count: int) -> Proposal:
        """A row's `count` likeliest nodes; fewer where there are fewer."""
        found = self.rows[row].continuations
        chances = found.chances(self.rates)
        # The sort is stable: among equals parents come before children, so that the best nodes are a tree.
        kept = sorted(sorted(range(len(found)), key=chances.__getitem__, reverse=True)[:count])
        place = {-1: -1, **{node: at for at, node in enumerate(kept)}}
        return Proposal(
            [found.tokens[node] for node in kept],
            [place[found.parents[node]] for node in kept],
            [found.depths[node] for node in kept],
            [math.log(chances[node]) for node in kept],
        )

    def propose(self, count: int, device: torch.device) -> Candidates | None:
        """Each row's `count` likeliest nodes; `None` where no row has any."""
        rows = [self.best(row, count) for row in range(len(self.rows))]
        size = max(map(len, rows), default=0)
        if not size:
            return None

        def column(name: str, filler: float) -> torch.Tensor:
            filled = [getattr(row, name) + [filler] * (size - len(row)) for row in rows]
            return torch.tensor(filled, device=device)

        tokens, parents, depths = (column(*field) for field in (("tokens", 0), ("parents", -1), ("depths", 1)))
        scores = column("scores", -math.inf)
        ranks = torch.full_like(tokens, CONTEXT_RANK)
        deepest = max(max(row.depths, default=1) for row in rows)
        return Candidates(tokens, parents, depths, scores, ranks, scores > -math.inf, deepest, size)
