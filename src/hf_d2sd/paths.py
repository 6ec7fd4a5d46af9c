"""What a path head, and the text so far, make of a drafter's slots: tokens' probabilities given the token before each.

A head scores the likeliest candidates of a slot alone. What all other tokens had together, they keep as a mass that
the scores do not change: so a distribution after every token costs one small product, whatever the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OfText:
    """What the text so far says of C candidates after each of A tokens, see `followers`."""

    scores: Tensor  # (..., A, C), which it adds
    left: Tensor  # (..., A), the share that all else keeps of its logits beside it


def rest(candidates: Tensor, total: Tensor) -> Tensor:
    """(...,): log of the mass of all tokens that are no candidates.

    Args:
        candidates: (..., C), logits of the candidates.
        total: (...,), log-sum-exp of the logits of all tokens.
    """
    share = (candidates.logsumexp(-1) - total).clamp(max=0)  # log of what the candidates have of the whole
    few = torch.log1p(-torch.exp(share.clamp(max=-1e-6)))
    return torch.where(share < -1e-6, total + few, -torch.inf)


def corrected(
    candidates: Tensor, scores: Tensor, others: Tensor, of_text: OfText | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (..., A, C) of C candidates after each of A tokens, and that of all others together (..., A).

    Args:
        candidates: (..., C), their logits.
        scores: (..., A, C), what the path head adds to them.
        others: (...,), see `rest`.
        of_text: logits l of what the text speaks of become `left` · l + its scores.
    """
    logits, rest = candidates[..., None, :] + scores, others[..., None]
    if of_text is not None:
        logits, rest = of_text.left[..., None] * logits + of_text.scores, of_text.left * rest
    return logits, rest


def conditional(candidates: Tensor, scores: Tensor, others: Tensor, of_text: OfText | None = None) -> Tensor:
    """(..., A, C): log probabilities of C candidates after each of A tokens; arguments as of `corrected`."""
    logits, rest = corrected(candidates, scores, others, of_text)
    return logits - torch.logaddexp(logits.logsumexp(-1), rest)[..., None]
