"""Counts of one `generate` call, taken from what the walk has on the host anyway: no synchronisation of their own."""

from collections import Counter
from dataclasses import dataclass, field

from .tree import FROM_FIRST, FROM_SECOND, FROM_TARGET

_SOURCE_NAMES = {FROM_TARGET: "target", FROM_FIRST: "first", FROM_SECOND: "second"}


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
    token_sources: list[str] = field(default_factory=list)  # one entry a generated token: first, second or target
    offered_per_depth: Counter[int] = field(default_factory=Counter)  # cycles whose tree reached that depth
    accepted_per_depth: Counter[int] = field(default_factory=Counter)  # cycles whose path did
    branch_hits: Counter[int] = field(default_factory=Counter)  # accepted tokens by rank: 0 first block, 1.. branches
    attention_backend: str = ""

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

    def add_cycle(
        self, path: list[int], parents: list[int], depths: list[int], ranks: list[int], sources: list[int]
    ) -> None:
        """One row's path, and for each of the N nodes its parent, depth, rank and source. No path: it had ended."""
        if not path:
            return
        self.cycles += 1
        self.committed_per_cycle.append(len(path))
        self.tree_sizes.append(1 + sum(parent >= 0 for parent in parents))
        self.offered_per_depth.update(range(1, max(depths) + 1))
        accepted = path[1:]
        self.accepted_per_depth.update(depths[node] for node in accepted)
        self.branch_hits.update(ranks[node] for node in accepted)
        self.token_sources += [_SOURCE_NAMES[sources[node]] for node in accepted] + [_SOURCE_NAMES[FROM_TARGET]]

    def __str__(self) -> str:
        return (
            f"{self.new_tokens} tokens in {self.cycles} cycles: {self.mean_acceptance_length:.2f} a target pass, "
            f"trees of {self.mean_tree_size:.1f} nodes, by source {self.tokens_by_source}"
        )
