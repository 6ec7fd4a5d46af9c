"""Blocks to train on: many out of each row, side by side in one forward, none of which sees another."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..compat import attention_of
from ..modeling import D2SDDrafterConfig
from .features import Teacher
from .shards import Row

NO_LABEL = -100


@dataclass(frozen=True)
class Blocks:
    """N blocks of γ slots out of each of B rows; S = N·γ, T the longest row, F the features' width."""

    context: Tensor  # (B, T, F)
    tokens: Tensor  # (B, S), the mask token at slots that are not visible
    position_ids: Tensor  # (B, T + S)
    anchors: Tensor  # (B, N)
    labels: Tensor  # (B, N, γ), NO_LABEL at visible slots and past the row's end
    distance: Tensor  # (B, N, γ), from the last visible slot
    texts: Tensor | None = None  # (B, T), the rows' tokens, for drafters that read what stands before the anchors
    teacher_ids: Tensor | None = None  # (B, N, γ, k), the target's likeliest tokens at each slot
    teacher_log_probs: Tensor | None = None  # (B, N, γ, k), theirs


def draw_anchors(rows: Sequence[Row], count: int, generator: torch.Generator) -> Tensor:
    """(B, N): a response position from each of N equal parts of every response, its last token left out."""
    first = torch.tensor([row.prompt_length for row in rows])[:, None]
    span = torch.tensor([row.response_length - 1 for row in rows])[:, None]
    part = (torch.arange(count) + torch.rand(len(rows), count, generator=generator)) / count
    return first + (part * span).long().clamp(max=span - 1)


def draw_prefix_lengths(shape: tuple[int, ...], block_size: int, base: float, generator: torch.Generator) -> Tensor:
    """v = 0..γ-2 kept tokens after the anchor, with P(v) ∝ base^v: the truncated geometric prior of Eq. 6.

    Base 0 is the first drafter's case: the anchor alone is visible.
    """
    weights = torch.tensor(base) ** torch.arange(block_size - 1)
    return torch.multinomial(weights, math.prod(shape), replacement=True, generator=generator).view(shape)


def cut_blocks(
    rows: Sequence[Row],
    features: Sequence[Tensor],
    anchors: Tensor,
    prefix_lengths: Tensor,
    config: D2SDDrafterConfig,
    teachers: Sequence[Teacher] = (),
) -> Blocks:
    """Blocks at `anchors` (B, N) that show the anchor and the `prefix_lengths` (B, N) tokens after it.

    Args:
        features: (T, F) of each row, on the device where the blocks shall be.
        teachers: of each row, for distillation.
    """
    context = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    device = context.device
    tokens = nn.utils.rnn.pad_sequence([row.tokens for row in rows], batch_first=True).to(device)  # (B, T)
    lengths = torch.tensor([len(row.tokens) for row in rows], device=device)[:, None, None]
    anchors, prefix_lengths = anchors.to(device), prefix_lengths.to(device)

    slot = torch.arange(config.block_size, device=device)
    position = anchors[..., None] + slot  # (B, N, γ)
    exists = position < lengths
    real = tokens.gather(1, position.clamp(max=tokens.shape[1] - 1).flatten(1)).view_as(position)
    visible = exists & (slot <= prefix_lengths[..., None])
    past = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    return Blocks(
        context=context,
        tokens=torch.where(visible, real, config.mask_token_id).flatten(1),
        position_ids=torch.cat([past, position.flatten(1)], dim=1),
        anchors=anchors,
        labels=torch.where(exists & ~visible, real, NO_LABEL),
        distance=slot - prefix_lengths[..., None],
        texts=tokens,
        teacher_ids=_at(position, [teacher.ids for teacher in teachers], 0),
        teacher_log_probs=_at(position, [teacher.log_probs for teacher in teachers], -torch.inf),
    )


def true_tokens(blocks: Blocks) -> Tensor:
    """(B, N, γ): what stands at each slot, hidden or not; the mask token past a row's end."""
    return torch.where(blocks.labels != NO_LABEL, blocks.labels, blocks.tokens.view(blocks.labels.shape))


def _at(position: Tensor, values: Sequence[Tensor], padding: float) -> Tensor | None:
    """(B, N, γ, k): the rows' values (T, k) at `position` (B, N, γ); `None` without values."""
    if not values:
        return None
    table = nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=padding).to(position.device)
    rows = torch.arange(len(table), device=table.device)[:, None, None]
    return table[rows, position.clamp(max=table.shape[1] - 1)]


def sees(
    query,
    key,
    anchors: Tensor,
    context_length: int,
    block_size: int,
    window: int | None = None,
    causal: bool = False,
) -> Tensor:
    """The one rule: a block sees the context before its anchor, and itself in both directions.

    Args:
        query: index tensor into the S slots.
        key: index tensor into the T context tokens, then the S slots.
        anchors: (N,), of one row.
        window: in sliding layers, the greatest distance at which a key is seen.
        causal: a block's slots see only earlier ones of it.
    """
    own_block = query // block_size
    anchor = anchors[own_block]
    in_context = key < context_length
    key_slot = (key - context_length).clamp(min=0)
    seen = torch.where(in_context, key < anchor, key_slot // block_size == own_block)
    if causal:
        seen = seen & (in_context | (key_slot <= query))
    if window is not None:
        key_at = torch.where(in_context, key, anchor + key_slot % block_size)
        seen = seen & ((anchor + query % block_size - key_at).abs() <= window)
    return seen


def dense_mask(anchors: Tensor, context_length: int, block_size: int, *rule: int | bool | None) -> Tensor:
    """(B, 1, S, T + S), bool: `sees` for every pair; `rule` are its window and whether it is causal."""
    slots = anchors.shape[1] * block_size
    query = torch.arange(slots, device=anchors.device)[:, None]
    key = torch.arange(context_length + slots, device=anchors.device)[None]
    rows = [sees(query, key, row, context_length, block_size, *rule) for row in anchors]
    return torch.stack(rows)[:, None]


def sparse_mask(anchors: Tensor, context_length: int, block_size: int, *rule: int | bool | None):
    """The same rule as a BlockMask of flex_attention, which skips what no query sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(row, _, query, key):
        return sees(query, key, anchors[row], context_length, block_size, *rule)

    slots = anchors.shape[1] * block_size
    return create_block_mask(seen, len(anchors), None, slots, context_length + slots, device=anchors.device)


def masks_by_layer_type(blocks: Blocks, config: D2SDDrafterConfig) -> dict:
    """What `D2SDDrafterModel.forward` takes as `attention_mask`, for its attention implementation."""
    create = sparse_mask if attention_of(config) == "flex_attention" else dense_mask
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    causal = config.causal_layer_types or ()
    return {
        kind: create(blocks.anchors, blocks.context.shape[1], config.block_slots, windows[kind], kind in causal)
        for kind in set(config.layer_types)
    }


def epoch_batches(lengths: Sequence[int], epoch: int, size: int, seed: int) -> list[list[int]]:
    """The rows of an epoch's batches, each of about the same length; every row once, but for what is left over."""
    rng = random.Random(f"{seed}-{epoch}")
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] * rng.uniform(0.8, 1.25))
    skipped = rng.randrange(len(lengths) % size + 1)  # which rows are left over changes from epoch to epoch
    batches = [order[start : start + size] for start in range(skipped, len(lengths) - size + 1, size)]
    rng.shuffle(batches)
    return batches
