"""The candidates of one cycle as a tree: the nodes most likely to be reached, each once, under a budget."""

from dataclasses import dataclass

import torch
from torch import Tensor

FROM_TARGET, FROM_FIRST, FROM_SECOND, FROM_CONTEXT = 0, 1, 2, 3  # who proposed a node; the anchor is the target's
CONTEXT_RANK = -1  # in `ranks`, of what no draft wrote: the text so far did


@dataclass(frozen=True)
class Candidates:
    """M scored nodes below the anchor of each of B rows, parents before children: what a tree is chosen from."""

    tokens: Tensor  # (B, M)
    parents: Tensor  # (B, M), where the parent stands among these; -1 for the anchor
    depths: Tensor  # (B, M) or (M,), from 1
    scores: (
        Tensor  # (B, M), log of the estimated probability that the node is reached; no child's is above its parent's
    )
    ranks: Tensor  # (B, M), which draft wrote it, 0 the first; CONTEXT_RANK: the text so far
    exists: Tensor  # (B, M) bool
    deepest: int  # a bound of the depths
    chains: int | None = None  # a bound of the chains that the tree splits into; `None`: one a node


@dataclass(frozen=True)
class Chains:
    """A tree cut into chains, each going down from a node: what attention over sequences of all lengths can take.

    A chain's queries are its nodes; its keys are its ancestors and then its nodes, so that causal attention that is
    aligned at the end gives each node what it sees. Segment b·N + n is the chain that begins with node n of row b;
    where none begins, it has no query and one key that nobody sees.
    """

    order: Tensor | None  # (B·N,), the nodes b·N + n, chain by chain; `None`: they are
    query_starts: Tensor  # (B·N + 1,) int32, where each segment's queries begin
    keys: Tensor | None  # (T,), the nodes b·N + n that stand as keys, segment by segment; some more at the end
    key_starts: Tensor  # (B·N + 1,) int32


@dataclass(frozen=True)
class CandidateTree:
    """Trees of B rows. A parent stands before its children; node 0 is the anchor, its parent is -1.

    Rows with fewer nodes than others are filled up at the end by nodes that belong to nothing: their parent is -1 and
    their depth 0, so no walk comes to them. The fields may also stand for one tree alone, (N,).
    """

    tokens: Tensor  # (B, N)
    parents: Tensor  # (B, N)
    depths: Tensor  # (B, N), 0 for the anchor
    scores: Tensor  # (B, N), log of the estimated probability that the node is reached
    # (B, N), 0: the first block, b+1: branch b, CONTEXT_RANK: the context; a shared node counts as its first owner's
    ranks: Tensor
    max_depth: int | None = None  # a bound that is known without asking the device
    max_chains: int | None = None  # such a bound for the chains of a row, fillers aside

    def __len__(self) -> int:
        return self.tokens.shape[-1]

    @property
    def sources(self) -> Tensor:
        """(B, N), FROM_TARGET, FROM_FIRST, FROM_SECOND or FROM_CONTEXT for each node."""
        by_rank = torch.where(self.ranks < 0, FROM_CONTEXT, torch.where(self.ranks == 0, FROM_FIRST, FROM_SECOND))
        return torch.where(self.depths == 0, FROM_TARGET, by_rank)

    def row(self, row: int) -> "CandidateTree":
        """One row's tree alone, without its fillers."""
        size = 1 + int((self.parents[row] >= 0).sum())
        fields = (self.tokens, self.parents, self.depths, self.scores, self.ranks)
        return CandidateTree(*(field[row, :size] for field in fields))

    @classmethod
    def anchor_only(cls, anchor: Tensor) -> "CandidateTree":
        """The tree of plain decoding: nothing drafted. `anchor`: (B,)."""
        return cls.chain(anchor[:, None])

    @classmethod
    def chain(cls, tokens: Tensor) -> "CandidateTree":
        """Each node the only child of the one before it. `tokens`: (B, N)."""
        depths = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        zeros = torch.zeros_like(depths)
        return cls(tokens, depths - 1, depths, zeros.float(), zeros, max_depth=tokens.shape[1] - 1, max_chains=1)

    @classmethod
    def from_candidates(
        cls,
        anchor: Tensor,
        candidates: Candidates,
        *,
        budget: int | None = None,
        max_depth: Tensor | None = None,
        fixed_size: bool = False,
    ) -> "CandidateTree":
        """The candidates most likely to be reached, under the anchors.

        Scores never rise along a path and a parent comes before its children, so the best nodes always form a tree.

        Args:
            anchor: (B,), the last committed tokens.
            budget: greatest number of nodes, the anchor included; `None` keeps all.
            max_depth: (B,), the deepest node kept, at least 1.
            fixed_size: as many nodes, with fillers, whatever exists: shapes that never change, and no question to the
                device.
        """
        kept, exists = _likeliest(candidates, budget, max_depth, fixed_size)

        def column(of_anchor: Tensor, values: Tensor, filler) -> Tensor:
            return torch.cat([of_anchor.view(-1, 1).expand(len(kept), 1), torch.where(exists, values, filler)], dim=1)

        zero, scores = anchor.new_zeros(1), candidates.scores
        return cls(
            tokens=column(anchor, candidates.tokens.gather(1, kept), anchor[:, None]),
            parents=column(zero - 1, _parents(candidates, kept, exists), -1),
            depths=column(zero, candidates.depths.expand_as(scores).gather(1, kept), 0),
            scores=column(zero.to(scores.dtype), scores.gather(1, kept), -torch.inf),
            ranks=column(zero, candidates.ranks.gather(1, kept), 0),
            max_depth=candidates.deepest,
            max_chains=kept.shape[1] if candidates.chains is None else candidates.chains,
        )

    def visibility(self) -> Tensor:
        """(B, N, N) bool: whether node q attends to node k, that is, k is q or one of its ancestors."""
        size = len(self)
        nodes = torch.arange(size, device=self.tokens.device)
        reach = ((self.parents[..., None] == nodes) | (nodes[:, None] == nodes)).float()
        for _ in range((size if self.max_depth is None else self.max_depth + 1).bit_length()):  # 2, 4, 8, ... up
            reach = (reach @ reach).clamp(max=1)
        return reach > 0

    def chains(self, visible: Tensor) -> Chains:
        """Cut the trees into chains: a node's first child goes on with its chain, every other child begins one.

        Args:
            visible: (B, N, N), `visibility()`.
        """
        num_rows, size = self.tokens.shape
        nodes = torch.arange(size, device=self.tokens.device).expand(num_rows, -1)
        has_parent, parent = self.parents >= 0, self.parents.clamp(min=0)
        first_child = torch.full_like(nodes, size).scatter_reduce(
            1, parent, torch.where(has_parent, nodes, size), reduce="amin"
        )
        goes_on = has_parent & (first_child.gather(1, parent) == nodes)
        head = torch.where(goes_on, parent, nodes)
        for _ in range(size.bit_length()):
            head = head.gather(1, head)

        segment = head + size * torch.arange(num_rows, device=head.device)[:, None]  # (B, N)
        flat = (nodes + size * torch.arange(num_rows, device=head.device)[:, None]).flatten()
        order = (segment * size + self.depths).flatten().argsort(stable=True)
        query_count = torch.zeros_like(flat).scatter_add(0, segment.flatten(), torch.ones_like(flat))

        is_last = first_child == size  # a leaf: the last node of its chain
        seen = visible & is_last[..., None]  # (B, leaves, nodes)
        nowhere = num_rows * size * size
        place = torch.where(seen, segment[..., None] * size + self.depths[:, None], nowhere).flatten()
        unused = torch.where(query_count == 0, flat * size, nowhere)  # the one key of a segment without queries
        sorted_place = torch.cat([place, unused]).sort(stable=True)
        node = torch.cat([flat.view(num_rows, 1, size).expand(-1, size, -1).flatten(), flat])
        count = self._count_keys(sorted_place.values, nowhere)
        key_count = (
            (query_count == 0)
            .long()
            .scatter_add(0, segment.flatten(), torch.where(is_last, seen.sum(-1), 0).flatten())
        )
        return Chains(order, _starts(query_count), node[sorted_place.indices[:count]], _starts(key_count))

    def _count_keys(self, places: Tensor, nowhere: int) -> int:
        """How many keys the chains of all rows have: a bound where one is known, else asked of the device."""
        num_rows, size = self.tokens.shape
        if self.max_depth is None or self.max_chains is None:
            return int((places < nowhere).sum())
        return min(num_rows * (self.max_chains * (self.max_depth + 1) + size), places.shape[0])


def _starts(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _likeliest(
    candidates: Candidates, budget: int | None, max_depth: Tensor | None, fixed_size: bool
) -> tuple[Tensor, Tensor]:
    """(B, m), which candidates are kept, in their order, and whether each exists; fillers come last.

    Args:
        budget, max_depth, fixed_size: as in `CandidateTree.from_candidates`.
    """
    exists, scores = candidates.exists, candidates.scores
    if max_depth is not None:
        exists = exists & (candidates.depths <= max_depth[:, None])
    # A stable sort: among equal scores parents come before children.
    scores = torch.where(exists, scores.clamp(min=torch.finfo(scores.dtype).min), -torch.inf)
    count = scores.shape[1]
    size = count if budget is None else min(budget - 1, count)
    if not fixed_size:
        size = min(size, int(exists.sum(1).max()))
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :size]
    kept = torch.where(exists.gather(1, best), best, count).sort(1).values
    exists = kept < count
    return torch.where(exists, kept, 0), exists


def _parents(candidates: Candidates, kept: Tensor, exists: Tensor) -> Tensor:
    """(B, m), where the parents of the kept candidates stand in a tree that begins with the anchor."""
    count = candidates.tokens.shape[1]
    # Column 0 of `place` is the anchor, the last one takes the fillers' writes.
    place = kept.new_zeros(len(kept), count + 2)
    order = torch.arange(1, kept.shape[1] + 1, device=kept.device).expand_as(kept)
    place.scatter_(1, torch.where(exists, kept + 1, count + 1), order)
    return place.gather(1, candidates.parents.gather(1, kept) + 1)


@dataclass(frozen=True)
class HostTree:
    """One row's tree on the host, and the target's choice at each node: what a cycle's one transfer brings."""

    tokens: list[int]  # (N,), fillers included, as all fields
    parents: list[int]  # (N,), -1 for the anchor and for fillers
    depths: list[int]  # (N,)
    ranks: list[int]  # (N,)
    sources: list[int]  # (N,)
    choices: list[int]  # (N,), 0 where the choice is made on the walk

    def __len__(self) -> int:
        """Nodes, the anchor included and fillers aside."""
        return 1 + sum(parent >= 0 for parent in self.parents)

    @classmethod
    def transfer(cls, tree: CandidateTree, choices: Tensor) -> list["HostTree"]:
        """Each row's, of a tree and the target's choices (B, N)."""
        if len(tree) == 1:  # a plain step: hundreds of these are what a text may be made of
            rows = torch.cat((tree.tokens, choices), dim=1).tolist()
            return [cls([token], [-1], [0], [0], [FROM_TARGET], [choice]) for token, choice in rows]
        return [cls(*row) for row in cls.columns(tree, choices).tolist()]

    @staticmethod
    def columns(tree: CandidateTree, choices: Tensor) -> Tensor:
        """(B, 6, N), the fields of all rows."""
        return torch.stack((tree.tokens, tree.parents, tree.depths, tree.ranks, tree.sources, choices), dim=1)
