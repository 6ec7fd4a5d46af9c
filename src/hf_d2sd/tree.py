"""The candidates of one cycle, merged to a tree: shared prefixes stored once, pruned to a budget of nodes."""

from dataclasses import dataclass

import torch
from torch import Tensor

FROM_TARGET, FROM_FIRST, FROM_SECOND = 0, 1, 2  # who wrote a node's token; the anchor is the target's


@dataclass(frozen=True)
class Branches:
    """The second drafter's re-drafts: branch k keeps `prefix_lengths[:, k]` drafted tokens and goes on by itself."""

    prefix_lengths: Tensor  # (B, K)
    tokens: Tensor  # (B, K, γ₂-1), at the kept positions whatever the drafter says
    confidence: Tensor  # (B, K, γ₂-1)

    def whole(self, tokens: Tensor, confidence: Tensor) -> "Branches":
        """The same with the kept tokens filled in, so that none are taken from the first block.

        Args:
            tokens, confidence: (B, 1 or K, D), the drafts that the prefixes are of.
        """
        size = min(tokens.shape[2], self.tokens.shape[2])
        kept = torch.arange(size, device=tokens.device) < self.prefix_lengths[..., None]  # (B, K, size)
        filled = [mine.clone() for mine in (self.tokens, self.confidence)]
        for mine, its in zip(filled, (tokens, confidence)):
            mine[..., :size] = torch.where(kept, its[..., :size], mine[..., :size])
        return Branches(torch.zeros_like(self.prefix_lengths), *filled)

    def followed_by(self, other: "Branches") -> "Branches":
        fields = ((getattr(self, name), getattr(other, name)) for name in ("prefix_lengths", "tokens", "confidence"))
        return Branches(*(torch.cat(pair, dim=1) for pair in fields))


@dataclass(frozen=True)
class Chains:
    """A tree cut into chains, each going down from a node: what attention over sequences of all lengths can take.

    A chain's queries are its nodes; its keys are its ancestors and then its nodes, so that causal attention that is
    aligned at the end gives each node what it sees. Segment b·N + n is the chain that begins with node n of row b;
    where none begins, it has no query and one key that nobody sees.
    """

    order: Tensor  # (B·N,), the nodes b·N + n, chain by chain
    query_starts: Tensor  # (B·N + 1,) int32, where each segment's queries begin
    keys: Tensor  # (T,), the nodes b·N + n that stand as keys, segment by segment; some more at the end
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
    ranks: Tensor  # (B, N), 0: the first block, b+1: branch b; a shared node counts as its first owner's
    max_depth: int | None = None  # a bound that is known without asking the device
    max_chains: int | None = None  # such a bound for the chains of a row, fillers aside

    def __len__(self) -> int:
        return self.tokens.shape[-1]

    @property
    def sources(self) -> Tensor:
        """(B, N), FROM_TARGET, FROM_FIRST or FROM_SECOND for each node."""
        return torch.where(self.depths == 0, FROM_TARGET, torch.where(self.ranks == 0, FROM_FIRST, FROM_SECOND))

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
    def merge(
        cls,
        anchor: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        branches: Branches | None = None,
        *,
        budget: int | None = None,
        max_depth: Tensor | None = None,
        fixed_size: bool = False,
    ) -> "CandidateTree":
        """Merge the first block and its branches, and keep the nodes most likely to be reached.

        A node's score is the log of the product of confidences along its path; where several drafts share the node,
        the highest counts. Scores never rise along a path, so the best nodes always form a tree.

        Args:
            anchor: (B,), the last committed tokens.
            tokens, confidence: (B, γ-1), the first blocks.
            branches: the re-drafts, if any.
            budget: greatest number of nodes, the anchor included; `None` keeps all.
            max_depth: (B,), the deepest node kept, at least 1.
            fixed_size: as many nodes, with fillers, whatever the drafts agree on: shapes that never change, and no
                question to the device.
        """
        drafts = _Drafts.of(tokens, confidence, branches, max_depth)
        owner, score = drafts.shared_nodes()
        num_drafts, depth = owner.shape[1:]
        kept = _likeliest(owner, score, budget, fixed_size)
        exists = kept < depth * num_drafts
        kept = torch.where(exists, kept, 0)
        draft, at = kept % num_drafts, kept // num_drafts
        parent = _parents(owner, draft, at, exists)

        def column(anchors, values, filler):
            return torch.cat([anchors.view(-1, 1).expand(len(kept), 1), torch.where(exists, values, filler)], dim=1)

        zero = anchor.new_zeros(1)
        return cls(
            tokens=column(anchor, drafts.tokens.flatten(1).gather(1, draft * depth + at), anchor[:, None]),
            parents=column(zero - 1, parent, -1),
            depths=column(zero, at + 1, 0),
            scores=column(zero.to(score.dtype), score.flatten(1).gather(1, draft * depth + at), -torch.inf),
            ranks=column(zero, draft, 0),
            max_depth=depth,
            max_chains=num_drafts,
        )

    def visibility(self) -> Tensor:
        """(B, N, N) bool: whether node q attends to node k, that is, k is q or one of its ancestors."""
        size = len(self)
        nodes = torch.arange(size, device=self.tokens.device)
        reach = (self.parents[..., None] == nodes) | (nodes[:, None] == nodes)
        for _ in range((size if self.max_depth is None else self.max_depth + 1).bit_length()):  # 2, 4, 8, ... up
            reach = (reach.float() @ reach.float()) > 0
        return reach

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


@dataclass(frozen=True)
class _Drafts:
    """The R drafts of a cycle in one table: the first blocks, then the branches with the tokens that they keep."""

    tokens: Tensor  # (B, R, D)
    log_confidence: Tensor  # (B, R, D)
    exists: Tensor  # (B, R, D) bool, for each draft up to some depth

    @classmethod
    def of(cls, tokens: Tensor, confidence: Tensor, branches: Branches | None, max_depth: Tensor | None) -> "_Drafts":
        """The arguments are those of `CandidateTree.merge`."""
        depth = tokens.shape[1] if branches is None else branches.tokens.shape[2]
        pad = depth - tokens.shape[1]  # γ₂ - γ: the first block is the shorter one
        position = torch.arange(depth, device=tokens.device)
        tokens, confidence = (torch.nn.functional.pad(x, (0, pad))[:, None] for x in (tokens, confidence))
        if branches is not None:
            kept = position < branches.prefix_lengths[..., None]  # (B, K, D)
            tokens = torch.cat([tokens, torch.where(kept, tokens, branches.tokens)], dim=1)
            confidence = torch.cat([confidence, torch.where(kept, confidence, branches.confidence)], dim=1)
        exists = torch.ones_like(tokens, dtype=torch.bool)
        exists[:, 0] = position < depth - pad
        if max_depth is not None:
            exists &= position < max_depth[:, None, None]
        return cls(tokens, confidence.log(), exists)

    def shared_nodes(self) -> tuple[Tensor, Tensor]:
        """The first draft that has each node too, -1 where nothing is drafted, and the node's score; (B, R, D)."""
        # Drafts r and s share their node at depth d if they agree at every depth up to d.
        shared = (self.tokens[:, :, None] == self.tokens[:, None]).cumprod(-1).bool()  # (B, R, R, D)
        shared &= self.exists[:, :, None] & self.exists[:, None]
        owner = torch.where(self.exists, shared.int().argmax(2), -1)
        # cummin: a scan must not round a child above its parent
        reached = self.log_confidence.cumsum(-1).cummin(-1).values
        return owner, torch.where(shared, reached[:, None], -torch.inf).amax(2)


def _likeliest(owner: Tensor, score: Tensor, budget: int | None, fixed_size: bool) -> Tensor:
    """(B, M), the nodes d·R + r to keep, parents before children; rows with fewer are filled up with D·R.

    Args:
        owner, score: (B, R, D), of `_Drafts.shared_nodes`.
        budget, fixed_size: as in `CandidateTree.merge`.
    """
    num_drafts, depth = owner.shape[1:]
    own = owner == torch.arange(num_drafts, device=owner.device)[:, None]  # each node once
    # Depth-major order, then a stable sort: among equal scores parents come before children.
    own, score = own.transpose(1, 2).flatten(1), score.transpose(1, 2).flatten(1)
    score = torch.where(own, score.clamp(min=torch.finfo(score.dtype).min), -torch.inf)
    best = score.argsort(dim=1, descending=True, stable=True)
    size = depth * num_drafts if budget is None else min(budget - 1, depth * num_drafts)
    if not fixed_size:
        size = min(size, int(own.sum(1).max()))
    best = best[:, :size]
    return torch.where(own.gather(1, best), best, depth * num_drafts).sort(1).values


def _parents(owner: Tensor, draft: Tensor, at: Tensor, exists: Tensor) -> Tensor:
    """(B, M), where the parents of the kept nodes stand in a tree that begins with the anchor.

    Args:
        owner: (B, R, D), of `_Drafts.shared_nodes`.
        draft, at, exists: (B, M), the kept nodes: which draft's, at which depth below the anchor's children, or none.
    """
    num_rows, num_drafts, depth = owner.shape
    # Column 0 of `index` is the anchor, its last entry takes the fillers' writes.
    index = owner.new_zeros(num_rows, num_drafts * (depth + 1) + 1)
    place = torch.where(exists, draft * (depth + 1) + at + 1, index.shape[1] - 1)
    index.scatter_(1, place, torch.arange(1, at.shape[1] + 1, device=at.device).expand(num_rows, -1))
    above = owner.flatten(1).gather(1, draft * depth + (at - 1).clamp(min=0))
    return index.gather(1, torch.where(at > 0, above, draft) * (depth + 1) + at)
