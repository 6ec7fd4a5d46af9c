"""Trees that branch in tokens as well as in places: the likeliest paths by both drafters' probabilities.

A drafter gives each position of a block a distribution of its own, whatever tokens stand before it in the block. Under
one such distribution the likeliest paths are found best first (DDTree, arXiv 2604.12989). Here the second drafter goes
on after some of them, and below such a path its distributions count, which know the path's tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .tree import CandidateTree


@dataclass(frozen=True)
class Guesses:
    """The W likeliest tokens at each of D positions, in R drafts of B rows, and the logs of their probabilities.

    Draft 0 is the first drafter's; draft r re-drafts path r - 1 and speaks of the positions after it.
    """

    tokens: Tensor  # (B, R, D, W)
    log_probs: Tensor  # (B, R, D, W), best first; -inf where a draft says nothing

    def followed_by(self, other: "Guesses") -> "Guesses":
        """Both in one table, as deep as the deeper one."""
        pad = (0, 0, 0, other.tokens.shape[2] - self.tokens.shape[2])
        tokens = torch.nn.functional.pad(self.tokens, pad)
        log_probs = torch.nn.functional.pad(self.log_probs, pad, value=-torch.inf)
        return Guesses(torch.cat([tokens, other.tokens], 1), torch.cat([log_probs, other.log_probs], 1))


@dataclass(frozen=True)
class Paths:
    """K paths down from the anchor of each of B rows."""

    tokens: Tensor  # (B, K, D), what stands after the anchor; anything past the path's end
    lengths: Tensor  # (B, K)


def expand(
    anchor: Tensor,
    guesses: Guesses,
    redrafted: Paths | None = None,
    *,
    budget: int,
    max_depth: Tensor | None = None,
) -> CandidateTree:
    """The `budget` likeliest nodes, found level by level.

    A path's probability is the product of its tokens' probabilities, each by the draft of the longest re-drafted
    path above it. It never rises on the way down, so that the best nodes of all levels form a tree, and no level holds
    more than `budget` of them.

    Args:
        anchor: (B,), the last committed tokens.
        redrafted: the paths that drafts 1..R-1 begin after.
        budget: number of nodes, the anchor included, at least 2; rows with fewer are filled up.
        max_depth: (B,), the deepest node kept, at least 1.
    """
    rows, drafts, depth, width = guesses.tokens.shape
    each = torch.arange(rows, device=anchor.device)[:, None]
    score = guesses.log_probs.new_zeros(rows, 1)
    draft = anchor.new_zeros(rows, 1)  # whose guesses a node's children are
    on_path = torch.ones(rows, 1, drafts - 1, dtype=torch.bool, device=anchor.device)  # is it a node of that path?
    levels, first_parent = [], 0  # among the nodes of all levels, where the present parents begin
    for level in range(depth):
        scores = score[..., None] + guesses.log_probs[each, draft, level]  # (B, n, W)
        if max_depth is not None:
            scores = scores.masked_fill((max_depth <= level)[:, None, None], -torch.inf)
        best = scores.flatten(1).topk(min(budget - 1, scores[0].numel()), dim=1)  # (B, m)
        parent, score = best.indices // width, best.values
        token = guesses.tokens[each, draft, level].flatten(1).gather(1, best.indices)
        draft = draft.gather(1, parent)
        levels.append((token, parent + first_parent, score, draft))
        first_parent += scores.shape[1] if level else 0
        if redrafted is not None and level < redrafted.tokens.shape[2]:
            on_path = on_path[each, parent] & (redrafted.tokens[:, None, :, level] == token[..., None])
            ends = on_path & (redrafted.lengths[:, None] == level + 1)
            draft = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, draft)
    return _best_of(anchor, levels, budget)


def count_nodes(budget: int, width: int, depth: int) -> int:
    """How many nodes, fillers included, `expand` returns for drafts of that width and depth."""
    level = nodes = 1
    for _ in range(depth):
        level = min(budget - 1, level * width)
        nodes += level
    return min(budget, nodes)


def _best_of(anchor: Tensor, levels: list[tuple[Tensor, Tensor, Tensor, Tensor]], budget: int) -> CandidateTree:
    """The best nodes of all levels; among equal scores a parent comes before its children."""
    rows = len(anchor)
    tokens, parents, scores, ranks = (torch.cat(part, dim=1) for part in zip(*levels))  # (B, all)
    sizes = torch.tensor([level[0].shape[1] for level in levels])
    depths = torch.arange(1, len(levels) + 1).repeat_interleave(sizes).to(anchor.device).expand(rows, -1)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, : budget - 1]
    kept = best.sort(1).values  # level by level again
    exists = scores.gather(1, kept) > -torch.inf
    place = torch.zeros_like(tokens).scatter(
        1, kept, torch.arange(1, kept.shape[1] + 1, device=kept.device).expand_as(kept)
    )
    above = parents.gather(1, kept)
    parent = torch.where(depths.gather(1, kept) == 1, 0, place.gather(1, above))

    def column(first, values, filler):
        return torch.cat([first.view(-1, 1).expand(rows, 1), torch.where(exists, values, filler)], dim=1)

    zero = anchor.new_zeros(1)
    return CandidateTree(
        tokens=column(anchor, tokens.gather(1, kept), anchor[:, None]),
        parents=column(zero - 1, parent, -1),
        depths=column(zero, depths.gather(1, kept), 0),
        scores=column(zero.to(scores.dtype), scores.gather(1, kept), -torch.inf),
        ranks=column(zero, ranks.gather(1, kept), 0),
        max_depth=len(levels),
        max_chains=kept.shape[1],
    )


def likeliest_paths(anchor: Tensor, guesses: Guesses, count: int, longest: int) -> Paths:
    """The K = `count` likeliest nodes under the first draft alone, at most `longest` deep, as paths from the anchor.

    Where fewer exist, the rest are paths of length 0.
    """
    depth = torch.full_like(anchor, longest)
    tree = expand(anchor, guesses, budget=count + 1, max_depth=depth)
    node = torch.arange(1, len(tree), device=anchor.device).expand(len(anchor), -1)  # (B, K)
    tokens = anchor.new_zeros(*node.shape, guesses.tokens.shape[2])
    for _ in range(min(longest, guesses.tokens.shape[2])):
        at = (tree.depths.gather(1, node) - 1)[..., None]  # -1 at the anchor
        token = torch.where(at >= 0, tree.tokens.gather(1, node)[..., None], tokens[..., :1])
        tokens = tokens.scatter(2, at.clamp(min=0), token)
        node = tree.parents.gather(1, node).clamp(min=0)
    return Paths(tokens, tree.depths[:, 1:])
