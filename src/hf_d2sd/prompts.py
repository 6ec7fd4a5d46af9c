"""Batches at the door and on the way out: padded prompts in, rectangular results as plain `generate` gives them.

Inside, each row's tokens stand side by side from its start, and what fills up shorter rows comes after them: under a
causal mask it then changes nothing, wherever the padding was.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .choosing import Choosers, Record
from .compat import CACHE_NAME, cached_length, full_length

# Inputs along the tokens of the prompt: (B, L) or (B, L, H); of several axes, positions are (A, B, L).
_ALONG_TOKENS = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "inputs_embeds")


@dataclass(frozen=True)
class Prompt:
    """What is to be run of a batch's prompts: each row's first `counts[b]` of `width` tokens."""

    input_ids: Tensor  # (B, L); (B, 0) with `inputs_embeds`
    model_kwargs: dict
    width: int
    counts: list[int]
    mask: Tensor | None  # (B, columns of the cache and of the prompt) bool; `None`: no padding
    past: int  # columns of the cache
    columns: int  # of the cache and of the prompt

    @property
    def rows(self) -> int:
        return len(self.counts)

    @property
    def seen(self) -> Tensor | None:
        """(B, past) bool: which of the cached tokens count; `None`: all."""
        return None if self.mask is None else self.mask[:, : self.past]

    def lengths(self, generated: list[int]) -> list[int]:
        """By row, how many tokens its cache holds after so many generated ones: all but the last."""
        columns = [self.columns] * self.rows if self.mask is None else self.mask.sum(1).tolist()
        return [length + count - 1 for length, count in zip(columns, generated)]

    def columns_after(self, generated: int) -> list[list[int]] | None:
        """By row, the columns of its tokens in the cache of plain decoding; `None`: all of them, one by one."""
        if self.mask is None:
            return None
        behind = list(range(self.columns, self.columns + generated - 1))
        return [row.nonzero().flatten().tolist() + behind for row in self.mask]


def read_prompt(input_ids: Tensor, cache, generation_config, model_kwargs: dict, pads_left: bool = False) -> Prompt:
    """Which tokens are not in the cache yet, with each row's own ones at its start.

    Args:
        pads_left: put a new batch's own tokens at the ends of its rows, and keep a mask: so recurrent states want it.

    Raises:
        ValueError: for a prompt without a new token, a cache of another batch, or inputs that cannot be split.
    """
    embeds = model_kwargs.get("inputs_embeds")
    prompt = input_ids if embeds is None else embeds
    mask, past = model_kwargs.get("attention_mask"), cached_length(cache)
    width = _count_new_columns(prompt, mask, past, embeds is not None, generation_config)
    _check_inputs(prompt, cache, width, generation_config.prefill_chunk_size, model_kwargs)
    columns = past + width
    if mask is None or bool((mask == 1).all()):
        return Prompt(input_ids, model_kwargs, width, [width] * len(prompt), None, past, columns)

    mask = mask[:, -columns:].bool()
    own = mask[:, past:]  # (B, width)
    counts = own.sum(1).tolist()
    if not min(counts):
        raise ValueError(f"Row {counts.index(0)} of the prompt has no new token: its attention_mask is zero.")
    width = max(counts)
    pads_left = pads_left and past == 0
    order = (~own).int().argsort(dim=1, stable=True, descending=pads_left)
    order = order[:, -width:] if pads_left else order[:, :width]  # each row's own tokens last, or first
    shifted = {
        name: _shift_axes(value, order, len(own[0])) if name == "position_ids" else _shift(value, order, len(own[0]))
        for name, value in model_kwargs.items()
        if name in _ALONG_TOKENS
    }
    if not pads_left:
        shifted["attention_mask"] = None
    if input_ids.shape[1]:
        input_ids = _shift(input_ids, order, len(own[0]))
    return Prompt(input_ids, {**model_kwargs, **shifted}, width, counts, mask, past, columns)


def texts_of(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """By row, its own tokens among all that were passed.

    Args:
        input_ids: (B, L); mask: (B, at least L) bool, of whose last columns these are; `None`: no padding.
    """
    if mask is None:
        return input_ids.tolist()
    own = mask[:, mask.shape[1] - input_ids.shape[1] :].to(input_ids.device)
    return [row[seen].tolist() for row, seen in zip(input_ids, own)]


def _shift(value: Tensor | None, order: Tensor, columns: int) -> Tensor | None:
    """Of a tensor along the tokens, (B or 1, >= columns, ...), the last `columns` in another order (B, width)."""
    if value is None:
        return None
    value = value[:, -columns:].expand(len(order), *(-1,) * (value.ndim - 1))
    order = order.to(value.device)
    return value.gather(1, order.view(*order.shape, *(1,) * (value.ndim - 2)).expand(*order.shape, *value.shape[2:]))


def _shift_axes(positions: Tensor | None, order: Tensor, columns: int) -> Tensor | None:
    """The same for positions, which some targets have of several axes: (A, B or 1, >= columns)."""
    if positions is None or positions.ndim == 2:
        return _shift(positions, order, columns)
    return torch.stack([shifted for axis in positions if (shifted := _shift(axis, order, columns)) is not None])


def _count_new_columns(prompt: Tensor, mask: Tensor | None, past: int, is_embeds: bool, generation_config) -> int:
    length = full_length(generation_config, mask)
    whole = is_embeds or length == prompt.shape[1]  # else only what follows the cached tokens was passed
    new = prompt.shape[1] - past if whole else prompt.shape[1]
    if new < 1:
        raise ValueError(
            f"{CACHE_NAME} already holds {past} tokens and the prompt has {prompt.shape[1]}: at least one token "
            f"must be new. Crop the cache by one token: `{CACHE_NAME}.crop(-1)`."
        )
    return new


def _check_inputs(prompt: Tensor, cache, width: int, chunk_size: int | None, model_kwargs: dict) -> None:
    held = next((keys.shape[0] for layer in cache.layers if (keys := _keys(layer)) is not None), None)
    if held is not None and held != len(prompt):
        raise ValueError(f"{CACHE_NAME} holds {held} rows and the prompt has {len(prompt)}.")
    extra = sorted(
        name
        for name, value in model_kwargs.items()
        if name not in _ALONG_TOKENS
        and (torch.is_tensor(value) or value)
        and not isinstance(value, (bool, int, float, str))
    )
    if extra and chunk_size is not None and chunk_size < width:
        raise ValueError(f"prefill_chunk_size={chunk_size} would split the inputs {extra}; leave it unset.")
    if extra and held is not None and len(prompt) > 1:
        raise ValueError(f"A batch with a cache takes no further inputs, got {extra}: pass the whole prompts.")


def _keys(layer) -> Tensor | None:
    keys = getattr(layer, "keys", None)  # a recurrent layer has none
    return keys if getattr(layer, "is_initialized", False) and keys is not None and keys.numel() else None


def join_sequences(choosers: Choosers, pad_token: Tensor | None) -> Tensor:
    """(B, L + the longest row's new tokens): prompts and chosen tokens, filled up with padding."""
    rows = [chooser.sequence[0] for chooser in choosers.rows]
    if len(rows) == 1:
        return rows[0][None].clone()
    filling = 0 if pad_token is None else int(pad_token)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filling)


def join_records(records: list[Record], prompt: Prompt) -> Record:
    """Of all rows one record, as plain `generate` returns it; zeros stand where a row had ended, or has padding."""
    if len(records) == 1 and prompt.mask is None:
        return records[0]
    joined = Record()
    for name in ("scores", "logits"):
        if getattr(records[0], name) is not None:
            setattr(joined, name, _join_steps([getattr(record, name) for record in records]))
    steps = [record.hidden_states for record in records if record.hidden_states is not None]  # of each row
    if steps:
        first = [_spread(of_row[0], row, prompt) for row, of_row in enumerate(steps)]
        layers = range(len(first[0]))
        prefill = tuple(torch.cat([row[layer] for row in first]) for layer in layers)
        by_layer = [_join_steps([tuple(step[layer] for step in of_row[1:]) for of_row in steps]) for layer in layers]
        joined.hidden_states = (prefill, *zip(*by_layer))
    return joined


def _join_steps(rows: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """From each row's steps (1, ...) to the batch's (B, ...)."""
    steps = max(map(len, rows))
    if not steps:
        return ()
    zero = torch.zeros_like(next(row[0] for row in rows if row))
    return tuple(torch.cat([row[at] if at < len(row) else zero for row in rows]) for at in range(steps))


def _spread(layers: tuple[Tensor, ...], row: int, prompt: Prompt) -> tuple[Tensor, ...]:
    """A row's hidden states of the prompt (1, T, H), put back to the columns they come from."""
    if prompt.mask is None or layers[0].shape[1] != prompt.width:  # chunks: the last one's, as they came
        return layers
    own = prompt.mask[row, prompt.past :]
    spread = tuple(layer.new_zeros(1, len(own), layer.shape[2]) for layer in layers)
    for layer, full in zip(layers, spread):
        full[0, own.to(layer.device)] = layer[0, : prompt.counts[row]]
    return spread
