"""The drafters' loss: cross-entropy of every masked slot, weighted by how much acceptance depends on it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import NO_LABEL

SCHEMES = ("decay", "dpace")


def slot_losses(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    chunk: int,
    teacher: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy (M,) of M slots, whether their best token is right (M,), and the cross-entropy to a teacher (M,).

    Logits exist for `chunk` slots at a time, in the backward pass too: chunk · V numbers, whatever M is.

    Args:
        hidden: (M, H).
        labels: (M,), indices of the head's outputs, NO_LABEL where the head lacks the token: the loss is 0 there.
        teacher: ids (M, k), as labels, and log-probabilities (M, k); without one the last output is 0.
    """
    if teacher is None:
        teacher = labels.new_zeros(len(labels), 0), hidden.new_zeros(len(labels), 0)

    def part(hidden: Tensor, labels: Tensor, ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = head(hidden).float()
        losses = nn.functional.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")
        weights = torch.where(ids == NO_LABEL, 0.0, log_probs.exp())
        said = logits.gather(-1, ids.clamp(min=0)) - logits.logsumexp(-1, keepdim=True)
        return losses, logits.argmax(-1) == labels, -(weights * said).sum(-1)

    parts = [
        checkpoint(part, *arguments, use_reentrant=False) if torch.is_grad_enabled() else part(*arguments)
        for arguments in zip(*(tensor.split(chunk) for tensor in (hidden, labels, *teacher)))
    ]
    losses, right, soft = map(torch.cat, zip(*parts))
    return losses, right, soft


def slot_weights(scheme: str, losses: Tensor, counted: Tensor, distance: Tensor, tau: float) -> Tensor:
    """(B, N, γ), 0 where `counted` (B, N, γ) is not; the sum of each step's weights is what the loss is divided by.

    "decay": exp(-(d - 1)/τ) at distance d from the last visible slot; Eq. 7 of arXiv 2606.04446, and DFlash.
    "dpace": the gradient of the expected accepted length Σ_i ∏_{k≤i} p_k by log p_d, which is Σ_{i≥d} ∏_{k≤i} p_k
    with p the drafter's present probability of the right token; arXiv 2605.18810. Each block's weights sum to 1.

    Args:
        losses: (B, N, γ), -log p, without gradient; `inf` where there is no label or the drafter cannot say it.
        distance: (B, N, γ), 1 at the first masked slot.
    """
    masked = distance >= 1
    if scheme == "decay":
        return torch.where(counted & masked, torch.exp(-(distance - 1) / tau), 0.0)
    reached = torch.exp(-torch.where(masked, losses, 0.0)).cumprod(-1)  # of slot i: ∏_{k≤i} p_k
    reached = torch.where(masked, reached, 0.0)
    weights = reached.flip(-1).cumsum(-1).flip(-1)
    weights = torch.where(counted & masked, weights, 0.0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
