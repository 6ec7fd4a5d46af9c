"""The candidates of one cycle, merged to a tree: shared prefixes stored once, pruned to a budget of nodes."""

from dataclasses import dataclass

import torch
from torch import Tensor

FROM_TARGET, FROM_FIRST, FROM_SECOND = 0, 1, 2  # who wrote a node's token; the anchor is the target's


@dataclass(frozen=True)
class Branches:
    """The second drafter's re-drafts: row b keeps `prefix_lengths[b]` drafted tokens and goes on by itself."""

    prefix_lengths: Tensor  # (K,)
    tokens: Tensor  # (K, γ₂-1), at the kept positions whatever the drafter says
    confidence: Tensor  # (K, γ₂-1)


@dataclass(frozen=True)
class CandidateTree:
    """Nodes in an order in which every parent stands before its children; node 0 is the anchor, its parent is -1."""

    tokens: Tensor  # (N,)
    parents: Tensor  # (N,)
    depths: Tensor  # (N,), 0 for the anchor
    scores: Tensor  # (N,), log of the estimated probability that the node is reached
    ranks: Tensor  # (N,), 0: the first block, b+1: branch b; a shared node counts as its first owner's

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def sources(self) -> Tensor:
        """(N,), FROM_TARGET, FROM_FIRST or FROM_SECOND for each node."""
        return torch.where(self.depths == 0, FROM_TARGET, torch.where(self.ranks == 0, FROM_FIRST, FROM_SECOND))

    @classmethod
    def anchor_only(cls, anchor: Tensor) -> "CandidateTree":
        """The tree of plain decoding: nothing drafted. `anchor`: ()."""
        zero = torch.zeros(1, dtype=torch.long, device=anchor.device)
        return cls(anchor.view(1), zero - 1, zero, zero.float(), zero)

    @classmethod
    def merge(
        cls,
        anchor: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        branches: Branches | None = None,
        *,
        budget: int | None = None,
        max_depth: int | None = None,
    ) -> "CandidateTree":
        """Merge the first block and its branches, and keep the nodes most likely to be reached.

        A node's score is the log of the product of confidences along its path; where several rows share the node, the
        highest counts. Scores never rise along a path, so the best nodes always form a tree.

        Args:
            anchor: (), the last committed token.
            tokens, confidence: (γ-1,), the first block.
            branches: the re-drafted rows, if any.
            budget: greatest number of nodes, the anchor included; `None` keeps all.
            max_depth: deepest node kept, at least 1.
        """
        rows, log_confidence, valid = _rows(tokens, confidence, branches)
        if max_depth is not None:
            rows, log_confidence, valid = (x[:, :max_depth] for x in (rows, log_confidence, valid))
        num_rows, depth = rows.shape
        # Rows r and s share their node at depth d if they agree at every depth up to d.
        shared = (rows[:, None] == rows[None]).cumprod(-1).bool() & valid[:, None] & valid[None]  # (R, R, D)
        owner = shared.int().argmax(1)  # (R, D), the first row that shares the node
        own = valid & (owner == torch.arange(num_rows, device=rows.device)[:, None])

        reached = log_confidence.cumsum(1).cummin(1).values  # cummin: a scan must not round a child above its parent
        score = torch.where(shared, reached[None], -torch.inf).amax(1)  # (R, D)

        # Depth-major order, then a stable sort: among equal scores parents come before children.
        row_of = torch.arange(num_rows, device=rows.device).repeat(depth)  # (D·R,)
        depth_of = torch.arange(depth, device=rows.device).repeat_interleave(num_rows)
        candidates = own.T.flatten().nonzero().squeeze(1)
        best = score.T.flatten()[candidates].argsort(descending=True, stable=True)
        kept = candidates[best[: None if budget is None else max(budget - 1, 0)]].sort().values  # depth-major again
        row, at = row_of[kept], depth_of[kept]

        index = torch.zeros(num_rows, depth + 1, dtype=torch.long, device=rows.device)  # column 0: the anchor
        index[row, at + 1] = torch.arange(1, len(kept) + 1, device=rows.device)
        parent_owner = torch.where(at > 0, owner[row, (at - 1).clamp(min=0)], row)
        zero = torch.zeros(1, dtype=torch.long, device=rows.device)
        return cls(
            tokens=torch.cat([anchor.view(1), rows[row, at]]),
            parents=torch.cat([zero - 1, index[parent_owner, at]]),
            depths=torch.cat([zero, at + 1]),
            scores=torch.cat([zero.to(score.dtype), score[row, at]]),
            ranks=torch.cat([zero, row]),
        )

    def visibility(self) -> Tensor:
        """(N, N) bool: whether node q attends to node k, that is, k is q or one of its ancestors."""
        size = len(self)
        seen = torch.eye(size, dtype=torch.bool, device=self.tokens.device)
        step = torch.zeros_like(seen)
        step[torch.arange(1, size, device=self.tokens.device), self.parents[1:]] = True
        reach = seen | step
        for _ in range(max(size - 1, 1).bit_length()):  # squaring: ancestors 2, 4, 8, ... up
            reach = (reach.float() @ reach.float()) > 0
        return reach


def _rows(tokens: Tensor, confidence: Tensor, branches: Branches | None) -> tuple[Tensor, Tensor, Tensor]:
    """The first block and the branches as rows of one table: tokens, log confidences, which entries exist; (R, D)."""
    if branches is None:
        return tokens[None], confidence.log()[None], torch.ones_like(tokens, dtype=torch.bool)[None]
    num_branches, depth = branches.tokens.shape
    pad = depth - tokens.shape[0]  # γ₂ - γ: the first block is the shorter row
    tokens = _pad(tokens, pad)
    confidence = _pad(confidence, pad)
    position = torch.arange(depth, device=tokens.device)
    kept = position < branches.prefix_lengths[:, None]  # (K, D)
    rows = torch.cat([tokens[None], torch.where(kept, tokens, branches.tokens)])
    log_confidence = torch.cat([confidence[None], torch.where(kept, confidence, branches.confidence)]).log()
    valid = torch.ones(num_branches + 1, depth, dtype=torch.bool, device=tokens.device)
    valid[0] = position < depth - pad
    return rows, log_confidence, valid


def _pad(values: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, count))
