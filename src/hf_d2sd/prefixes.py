"""From the first drafter's confidences to the prefixes worth re-drafting (Eq. 3-5 of arXiv 2606.04446)."""

import torch
from torch import Tensor


def acceptance_distribution(confidence: Tensor) -> Tensor:
    """r(i), the probability that exactly i drafted tokens are accepted, i = 0..γ-1.

    Eq. 4 of arXiv 2606.04446: r(i) = (∏_{k≤i} c_k)(1 − c_{i+1}) for i ≤ γ-2, where tokens are taken as independent;
    the last entry is ∏ c_k, "all accepted", so that the entries sum to one.

    Args:
        confidence: (..., γ-1), c_k in [0, 1] for the block positions k = 1..γ-1.

    Returns:
        (..., γ) probabilities.
    """
    one = confidence.new_ones(*confidence.shape[:-1], 1)
    reached = torch.cat([one, confidence.cumprod(-1)], dim=-1)  # (..., γ): position i is reached
    rejected_next = torch.cat([1 - confidence, one], dim=-1)  # (..., γ): nothing is left to reject after the last
    return reached * rejected_next


def select_prefix_lengths(confidence: Tensor, num_branches: int, block_size: int) -> Tensor:
    """The K prefix lengths with the largest r(i), most probable first (Eq. 5 of arXiv 2606.04446).

    A prefix must leave the second drafter a position to draft. Where its block is the longer one, "all accepted" is a
    prefix too: that branch keeps the whole first block and extends it.

    Args:
        confidence: (..., γ-1), the first drafter's confidences.
        num_branches: K; fewer lengths come back where fewer exist.
        block_size: γ₂ of the second drafter, at least 2.

    Returns:
        (..., K) prefix lengths i, each the number of drafted tokens a branch keeps after the anchor.
    """
    r = acceptance_distribution(confidence)[..., : block_size - 1]  # i ≤ γ₂ - 2 leaves position i+1 to draft
    return r.topk(min(num_branches, r.shape[-1])).indices


def select_deeper_prefixes(
    tokens: Tensor, confidence: Tensor, kept: Tensor, num_branches: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Of R re-drafts the K prefixes most likely to be all that is accepted: where another level drafts again.

    For a re-draft r(i) counts beyond what it kept: a prefix of `kept` tokens was re-drafted already. A prefix that
    several share counts once.

    Args:
        tokens, confidence: (B, R, D), whole drafts, kept tokens included.
        kept: (B, R), how many of each draft's tokens it did not write.
        num_branches: K, at most R.
        block_size: γ₂ of the drafter that drafts again.

    Returns:
        Both (B, K): which draft the prefix is of, and its length; length 0 where fewer exist.
    """
    rows, drafts, depth = tokens.shape
    r = acceptance_distribution(confidence)[..., : block_size - 1]  # (B, R, L), by length
    length = torch.arange(r.shape[-1], device=r.device)
    agree = (tokens[:, :, None] == tokens[:, None]).cumprod(-1).bool()  # (B, R, R, D): equal up to here
    earlier = torch.ones(drafts, drafts, dtype=torch.bool, device=r.device).tril(-1)
    repeated = torch.nn.functional.pad((agree & earlier[..., None]).any(2), (1, 0))[..., : r.shape[-1]]
    r = r.masked_fill((length <= kept[..., None]) | repeated, -1.0)
    best = r.flatten(1).topk(num_branches)
    lengths = torch.where(best.values >= 0, best.indices % r.shape[-1], 0)
    return best.indices // r.shape[-1], lengths
