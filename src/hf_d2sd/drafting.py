"""The drafters at work: each denoises blocks over its own cache of the committed tokens' features."""

import contextlib
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import MaskedAttention
from .cache import TreeCache
from .modeling import D2SDDrafterModel
from .target import TargetPass, execution_device
from .tree import Branches


@dataclass(frozen=True)
class Draft:
    """The drafter's own choice at the positions 1..γ-1 of each block."""

    tokens: Tensor  # (K, γ-1)
    confidence: Tensor  # (K, γ-1), its probability of that token


class Drafter:
    """One drafter, with the target's embedding and head, and its context: keys and values of committed tokens.

    Args:
        model: the network.
        target: the target model whose embedding and LM head are called.
        context: of an earlier turn, to go on from.
    """

    def __init__(self, model: D2SDDrafterModel, target, context: "DraftContext | None" = None):
        self.model = model
        self.context = context if context is not None else DraftContext(TreeCache(model.config))
        self.device, self.dtype = execution_device(model.fc), model.fc.weight.dtype
        self._embed, self._head = target.get_input_embeddings(), draft_head(model, target.get_output_embeddings())
        self._attention = MaskedAttention.for_model(model)

    def extend(self, step: TargetPass, position: int, nodes: Tensor | None = None) -> None:
        """Take in the features of tokens that the target's cache has gained; they end before `position`."""
        features = step.features(self.model.config.target_layer_ids, nodes)
        self.context.extend(features.to(self.device, self.dtype), position)
        self._head_dtype = features.dtype

    def draft(self, anchor: Tensor, block_size: int) -> Draft:
        """The first draft: one block after the anchor (), all of it masked. K is 1."""
        block = self._masked_blocks(anchor, 1, block_size)
        return self._denoise(block)

    def redraft(self, anchor: Tensor, tokens: Tensor, prefix_lengths: Tensor, block_size: int) -> Branches:
        """The second draft: K blocks in one pass, each keeping a prefix of the first block's tokens (γ-1,)."""
        blocks = self._masked_blocks(anchor, len(prefix_lengths), block_size)
        position = torch.arange(tokens.shape[0], device=tokens.device)
        kept = position < prefix_lengths[:, None]  # (K, γ-1)
        blocks[:, 1 : 1 + len(tokens)] = torch.where(kept, tokens, blocks[:, 1 : 1 + len(tokens)])
        draft = self._denoise(blocks)
        return Branches(prefix_lengths, draft.tokens, draft.confidence)

    def _masked_blocks(self, anchor: Tensor, count: int, block_size: int) -> Tensor:
        blocks = anchor.new_full((count, block_size), self.model.config.mask_token_id)
        blocks[:, 0] = anchor
        return blocks

    def _denoise(self, blocks: Tensor) -> Draft:
        """One forward for all blocks (K, γ): they are one long query over the one shared context."""
        count, block_size = blocks.shape
        context = self.context.take()  # (1, C, F)
        start, new = self.context.position, context.shape[1]
        positions = torch.cat(
            [
                torch.arange(start - new, start, device=self.device),
                torch.arange(start, start + block_size, device=self.device).repeat(count),
            ]
        )
        masks = self._masks(count, block_size, new, positions)
        with without_embed_norm(self._embed):
            embeds = self._embed(blocks.view(1, -1))
        with self._attention.active():
            hidden = self.model(
                noise_embeds=embeds.to(self.device, self.dtype),
                context_hidden_states=context,
                position_ids=positions[None],
                attention_mask=masks,
                cache=self.context.cache,
            ).last_hidden_state
        self.context.cache.crop(-count * block_size)
        hidden = hidden.view(count, block_size, -1)[:, 1:]
        return self._read(self._head(hidden.to(self._head_dtype)), blocks.device)

    def _read(self, logits: Tensor, device: torch.device) -> Draft:
        logits = logits.float()  # (K, γ-1, V)
        temperatures = self.model.config.confidence_temperatures
        if temperatures is not None:
            logits = logits / logits.new_tensor(temperatures[: logits.shape[1]])[:, None]
        best = logits.max(-1)
        confidence = (best.values - logits.logsumexp(-1)).exp()
        tokens = best.indices
        if self.model.config.draft_vocab_size is not None:
            tokens = self.model.draft_token_ids[tokens.to(self.device)]
        return Draft(tokens.to(device), confidence.to(device))

    def _masks(self, count: int, block_size: int, new: int, positions: Tensor) -> dict[str, Tensor | None]:
        """By layer type: block queries see the context, and of the blocks their own; (1, 1, K·γ, keys)."""
        lengths, windows = self.context.cache.visible_lengths(), self._attention.windows
        if count == 1 and set(windows.values()) == {None}:
            return dict.fromkeys(windows)
        block_of = torch.arange(count, device=self.device).repeat_interleave(block_size)
        own = block_of[:, None] == block_of  # (K·γ, K·γ)
        query_at = positions[new:, None]
        masks = {}
        for layer_type, window in windows.items():
            cached = torch.arange(-lengths[layer_type], 0, device=self.device) + positions[0]
            seen = torch.cat([own.new_ones(len(own), len(cached) + new), own], dim=1)
            if window is not None:
                seen &= (query_at - torch.cat([cached, positions])).abs() <= window
            masks[layer_type] = self._attention.as_mask(seen, self.dtype)
        return masks


@dataclass
class DraftContext:
    """The committed tokens as one drafter knows them: some in its cache, the newest still as features."""

    cache: TreeCache
    position: int = 0  # of the token after the last known one: the anchor
    waiting: tuple[Tensor, ...] = ()  # features (1, T, F) that no forward has seen yet

    def extend(self, features: Tensor, position: int) -> None:
        """Add features of tokens that end before `position`. After a gap only what follows it is kept."""
        if position - features.shape[1] != self.position:
            self.cache.reset()
            self.waiting = ()
        self.waiting += (features,)
        self.position = position

    def take(self) -> Tensor:
        """(1, C, F): the features that are waiting, which the caller puts in the cache. C is at least 1."""
        features = torch.cat(self.waiting, dim=1)
        self.waiting = ()
        return features

    def cut(self, position: int) -> None:
        """Forget tokens from `position` on: the user cropped the target's cache between two turns."""
        excess = self.position - position
        if excess > 0:
            waiting = sum(features.shape[1] for features in self.waiting)
            cached = self.cache.get_seq_length()
            kept = torch.cat(self.waiting, dim=1)[:, : max(waiting - excess, 0)] if self.waiting else None
            self.waiting = (kept,) if kept is not None and kept.shape[1] else ()
            self.cache.crop(-min(max(excess - waiting, 0), cached))
            self.position = position


@dataclass(frozen=True)
class PrunedHead:
    """The rows of a target's LM head that belong to a pruned draft vocabulary of V' tokens."""

    weight: Tensor  # (V', H)
    bias: Tensor | None  # (V',)

    def __call__(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.to(self.weight), self.weight, self.bias)


def draft_head(model: D2SDDrafterModel, head: nn.Module) -> Callable[[Tensor], Tensor]:
    """The target's head, or for a pruned draft vocabulary its rows; these are gathered once for a target.

    Of a plain linear head the rows are read; any other head, a quantized one say, is called on the unit vectors.
    """
    if model.config.draft_vocab_size is None:
        return functools.partial(_call_where_it_is, head)
    known = getattr(model, "_pruned_head", None)
    if known is not None and known[0]() is head:
        return known[1]
    if type(head) is nn.Linear and head.weight.device.type != "meta":
        ids = model.draft_token_ids.to(head.weight.device)
        weight = head.weight.detach()[ids]
        bias = head.bias.detach()[ids] if head.bias is not None else None
    else:
        weight, bias = _rows_by_calling(head, model.draft_token_ids, model.config.hidden_size)
    device = execution_device(model.fc)
    pruned = PrunedHead(weight.to(device), bias.to(device) if bias is not None else None)
    model._pruned_head = (weakref.ref(head), pruned)
    return pruned


def _call_where_it_is(head: nn.Module, hidden: Tensor) -> Tensor:
    return head(hidden.to(execution_device(head)))


def _rows_by_calling(head: nn.Module, ids: Tensor, width: int, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """weight (V', H) and bias (V',) of a head that can only be called."""
    dtype = next((p.dtype for p in head.parameters() if p.is_floating_point()), torch.get_default_dtype())
    units = torch.eye(width, device=execution_device(head), dtype=dtype)
    bias = head(torch.zeros_like(units[:1]))[0]
    ids = ids.to(bias.device)
    columns = [(head(part) - bias)[:, ids] for part in units.split(chunk)]
    return torch.cat(columns).T.contiguous(), bias[ids]


@contextlib.contextmanager
def without_embed_norm(embed: nn.Module):
    """Some targets norm their embeddings inside the module; drafters read them before that norm, as native DFlash."""
    norm = getattr(embed, "embed_norm", None)
    if norm is None:
        yield
        return
    try:
        embed.embed_norm = nn.Identity()
        yield
    finally:
        embed.embed_norm = norm
