"""What a path head makes of a drafter's slots: their tokens' probabilities given the token before each.

A head scores the likeliest candidates of a slot alone. What all other tokens had together, they keep as a mass that
the scores do not change: so a distribution after every token costs one small product, whatever the vocabulary.
"""

import torch
from torch import Tensor


def rest(candidates: Tensor, total: Tensor) -> Tensor:
    """(...,): log of the mass of all tokens that are no candidates.

    Args:
        candidates: (..., C), logits of the candidates.
        total: (...,), log-sum-exp of the logits of all tokens.
    """
    share = (candidates.logsumexp(-1) - total).clamp(max=0)  # log of what the candidates have of the whole
    few = torch.log1p(-torch.exp(share.clamp(max=-1e-6)))
    return torch.where(share < -1e-6, total + few, -torch.inf)


def conditional(candidates: Tensor, scores: Tensor, others: Tensor) -> Tensor:
    """(..., A, C): log probabilities of C candidates after each of A tokens.

    Args:
        candidates: (..., C), their logits.
        scores: (..., A, C), what the path head adds to them.
        others: (...,), see `rest`.
    """
    logits = candidates[..., None, :] + scores
    total = torch.logaddexp(logits.logsumexp(-1), others[..., None])
    return logits - total[..., None]
