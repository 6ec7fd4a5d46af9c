"""Counts of one `generate` call, taken from what the walk has on the host anyway: no synchronisation of their own."""

import math
from collections import Counter
from dataclasses import dataclass, field

from .paying import Decisions
from .tree import FROM_CONTEXT, FROM_FIRST, FROM_SECOND, FROM_TARGET, HostTree

_SOURCE_NAMES = {FROM_TARGET: "target", FROM_FIRST: "first", FROM_SECOND: "second", FROM_CONTEXT: "context"}


@dataclass(frozen=True)
class Cycle:
    """One row's tree and what became of it; its N nodes are those of a `CandidateTree`, fillers left out."""

    row: int  # of the batch
    tokens: list[int]  # (N,)
    parents: list[int]  # (N,), -1 for the anchor
    depths: list[int]  # (N,)
    scores: list[float]  # (N,), log of the estimated probability that the node is reached
    ranks: list[int]  # (N,), which draft wrote it: 0 the first, 1.. the branches; -1 none, the text did
    sources: list[str]  # (N,), first, second, context or target
    path: list[int]  # (A,), the accepted nodes, anchor first
    emitted: list[int]  # (A,), the tokens they led to, the bonus last

    @property
    def confidences(self) -> list[float]:
        """(N,), each node's estimated probability, given its parent; 1 for the anchor."""
        return [math.exp(s - self.scores[p]) if p >= 0 else 1.0 for s, p in zip(self.scores, self.parents)]


@dataclass
class D2SDStats:
    """What happened in one `generate` call; `assistant.last_stats` holds the latest.

    A cycle is one draft and one target pass; in a batch each row has its own, though they share the passes. Acceptance
    lengths count the tokens a cycle commits, the target's own token (the bonus) included, so that plain decoding has
    length 1.
    """

    prompt_tokens: int = 0
    cycles: int = 0
    committed_per_cycle: list[int] = field(default_factory=list)  # one entry a cycle, at least 1
    tree_sizes: list[int] = field(default_factory=list)  # nodes verified, anchor included, one entry a cycle
    token_sources: list[str] = field(default_factory=list)  # one entry a generated token: who proposed it
    offered_per_depth: Counter[int] = field(default_factory=Counter)  # cycles whose tree reached that depth
    accepted_per_depth: Counter[int] = field(default_factory=Counter)  # cycles whose path did
    branch_hits: Counter[int] = field(
        default_factory=Counter
    )  # accepted tokens by rank: 0 first block, 1.. branches, -1 context
    attention_backend: str = ""
    decisions: Decisions | None = None  # with `d2sd_auto` what was decided in each cycle, and why
    trace: list[Cycle] | None = None  # with `d2sd_trace=True` every cycle's tree

    @property
    def new_tokens(self) -> int:
        return len(self.token_sources)

    @property
    def mean_acceptance_length(self) -> float:
        """α: tokens committed for each target pass after the prefill, bonus included; nan without a cycle."""
        return sum(self.committed_per_cycle) / self.cycles if self.cycles else float("nan")

    @property
    def acceptance_histogram(self) -> dict[int, int]:
        """How many cycles committed 1, 2, ... tokens."""
        return dict(sorted(Counter(self.committed_per_cycle).items()))

    @property
    def tokens_by_source(self) -> dict[str, int]:
        counts = Counter(self.token_sources)
        return {name: counts[name] for name in _SOURCE_NAMES.values()}

    @property
    def mean_tree_size(self) -> float:
        return sum(self.tree_sizes) / self.cycles if self.cycles else float("nan")

    def add_first_tokens(self, rows: int) -> None:
        """The prefill's tokens, which the target wrote."""
        self.token_sources += [_SOURCE_NAMES[FROM_TARGET]] * rows

    def add_cycle(self, path: list[int], tree: HostTree) -> None:
        """One row's path through its tree. No path: the row had ended."""
        if not path:
            return
        self.cycles += 1
        self.committed_per_cycle.append(len(path))
        self.tree_sizes.append(len(tree))
        self.offered_per_depth.update(range(1, max(tree.depths) + 1))
        accepted = path[1:]
        self.accepted_per_depth.update(tree.depths[node] for node in accepted)
        self.branch_hits.update(tree.ranks[node] for node in accepted)
        names = [_SOURCE_NAMES[tree.sources[node]] for node in accepted]
        self.token_sources += [*names, _SOURCE_NAMES[FROM_TARGET]]

    def add_trace(self, row: int, tree: HostTree, scores: list[float], path: list[int], emitted: list[int]) -> None:
        """One row's cycle, if cycles are kept."""
        if self.trace is not None:
            size = len(tree)
            cycle = Cycle(
                row=row,
                tokens=tree.tokens[:size],
                parents=tree.parents[:size],
                depths=tree.depths[:size],
                scores=scores[:size],
                ranks=tree.ranks[:size],
                sources=[_SOURCE_NAMES[source] for source in tree.sources[:size]],
                path=path,
                emitted=emitted,
            )
            self.trace.append(cycle)

    def __str__(self) -> str:
        return (
            f"{self.new_tokens} tokens in {self.cycles} cycles: {self.mean_acceptance_length:.2f} a target pass, "
            f"trees of {self.mean_tree_size:.1f} nodes, by source {self.tokens_by_source}"
        )
