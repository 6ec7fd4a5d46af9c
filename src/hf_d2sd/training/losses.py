"""The drafters' loss: cross-entropy of every masked slot, weighted by how much acceptance depends on it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import paths
from .blocks import NO_LABEL

SCHEMES = ("decay", "dpace")
_WORST = 20.0  # the loss of a token that is no candidate where nothing was left for others

Head = Callable[[Tensor], Tensor]  # hidden states (M, H) to logits (M, V)


@dataclass(frozen=True)
class Labels:
    """What M slots should say: a token each, and where a teacher is used, its k likeliest tokens."""

    tokens: Tensor  # (M,), indices of the head's outputs, NO_LABEL where the head lacks the token: its loss is 0
    teacher_ids: Tensor | None = None  # (M, k), the same kind of indices
    teacher_log_probs: Tensor | None = None  # (M, k)
    soft: float = 0.0  # share of the loss that is cross-entropy to the teacher

    def split(self, chunk: int) -> list["Labels"]:
        tokens = self.tokens.split(chunk)
        if not self.soft:
            return list(map(Labels, tokens))
        parts = zip(tokens, self.teacher_ids.split(chunk), self.teacher_log_probs.split(chunk))
        return [Labels(*part, soft=self.soft) for part in parts]


def slot_losses(hidden: Tensor, labels: Labels, head: Head, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (M,) of each of M slots, the cross-entropy (M,) of its token, and whether its best token is right (M,).

    Only the loss carries a gradient. Logits exist for `chunk` slots at a time, whatever M is, and once: the head is
    not trained, so that the gradient of each slot's loss by its own hidden state is known in the forward pass, and
    backward only scales it.

    Args:
        hidden: (M, H).
    """
    return _SlotLosses.apply(hidden, labels, head, chunk)


class _SlotLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, labels: Labels, head: Head, chunk: int):
        parts = [
            _losses_of_chunk(part, wanted, head, ctx.needs_input_grad[0])
            for part, wanted in zip(hidden.split(chunk), labels.split(chunk))
        ]
        losses, entropies, right, gradients = map(torch.cat, zip(*parts))
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(entropies, right)
        return losses, entropies, right

    @staticmethod
    def backward(ctx, scale: Tensor, *_):
        (gradients,) = ctx.saved_tensors  # (M, H)
        return gradients * scale[:, None].to(gradients.dtype), None, None, None


def _losses_of_chunk(
    hidden: Tensor, labels: Labels, head: Head, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, cross-entropy and rightness (M,) of a chunk, and the gradient (M, H) of each loss by its hidden state."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_(with_gradient)
        output = head(hidden)  # (M, V)
    known = labels.tokens != NO_LABEL
    token = torch.where(known, labels.tokens, 0)[:, None]
    logits = output.detach().to(torch.float32, copy=True)
    best = logits.amax(-1, keepdim=True)
    right = known & (logits.gather(1, token) == best)[:, 0]
    right[right.clone()] = logits[right].argmax(-1) == token[right, 0]  # of equal logits the first is drafted

    probabilities = logits.sub_(best)  # everything below is in place: this is the largest tensor of the step
    said = probabilities.gather(1, token)
    taught = probabilities.gather(1, labels.teacher_ids.clamp(min=0)) if labels.soft else None
    total = probabilities.exp_().sum(-1, keepdim=True)
    log_total = total.log()
    entropies = torch.where(known, (log_total - said)[:, 0], 0.0)

    # d(loss)/d(logits) = mass · softmax - target, where `mass` is the target's sum
    target = (1 - labels.soft) * known.float()[:, None]
    losses, mass = (1 - labels.soft) * entropies, target
    if labels.soft:
        weights = labels.soft * torch.where(labels.teacher_ids == NO_LABEL, 0.0, labels.teacher_log_probs.exp())
        losses = losses + (weights * (log_total - taught)).sum(-1)
        mass = mass + weights.sum(-1, keepdim=True)
    if not with_gradient:
        return losses, entropies, right, hidden.new_empty(0, hidden.shape[1])
    gradient = probabilities.mul_(mass / total).scatter_add_(1, token, -target)
    if labels.soft:
        gradient.scatter_add_(1, labels.teacher_ids.clamp(min=0), -weights)
    (by_hidden,) = torch.autograd.grad(output, hidden, gradient.to(output.dtype))
    return losses, entropies, right, by_hidden


def path_losses(
    hidden: Tensor,
    previous: Tensor,
    labels: Tensor,
    parts: "PathParts",
    chunk: int,
    of_text: Callable[[slice, Tensor], paths.OfText] | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss (M,) of each of M slots, given the token before it, and whether the likeliest token is then right (M,).

    The loss is the cross-entropy of what decoding reads: the candidates' corrected logits, and all other tokens as
    one. Its gradient is the path head's alone.

    Args:
        hidden: (M, H); previous: (M, H), embeddings of the true tokens before; labels: (M,), as `Labels.tokens`.
        of_text: what the text says of candidates (m, C) of some of the slots, A being 1.
    """
    losses, right = [], []
    for start, slots, before, label in zip(
        itertools.count(0, chunk), hidden.split(chunk), previous.split(chunk), labels.split(chunk)
    ):
        with torch.no_grad():
            logits = parts.head(slots).float()
            best = logits.topk(min(parts.candidates, logits.shape[-1]), dim=-1)
            others = paths.rest(best.values, logits.logsumexp(-1))  # (m,)
        rows = parts.rows(best.indices)
        scores = parts.path_head(slots, before[:, None], rows.to(slots.dtype))  # (m, 1, C)
        said = None if of_text is None else of_text(slice(start, start + len(slots)), best.indices)
        given, left = (x[:, 0] for x in paths.corrected(best.values, scores, others, said))  # (m, C), (m,)
        total = torch.logaddexp(given.logsumexp(-1), left)
        log_probs, missed = given - total[:, None], (left - total).clamp(min=-_WORST)
        here = best.indices == label[:, None]
        log_prob = torch.where(here.any(-1), torch.where(here, log_probs, 0.0).sum(-1), missed)
        losses.append(torch.where(label != NO_LABEL, -log_prob, 0.0))
        right.append((best.indices.gather(1, log_probs.argmax(-1, keepdim=True)) == label[:, None])[:, 0])
    return torch.cat(losses), torch.cat(right)


@dataclass(frozen=True)
class PathParts:
    """What a path head is trained with."""

    path_head: Callable  # see `D2SDPathHead.forward`
    head: Head
    rows: Callable[[Tensor], Tensor]  # vectors (..., R) of candidates at places (...) of the draft vocabulary
    candidates: int  # how many of a slot's likeliest tokens are scored


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
