"""All that knows Transformers' caches: a preallocated cache that takes a tree's nodes and keeps one path of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .compat import (
    ATTENDING_TYPES,
    CACHE_NAME,
    NO_CACHE,
    STATE_TYPES,
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    States,
    copy_state_flags,
    give_states,
    has_states,
    is_without_cache,
    layer_types_of,
    own_cache_class,
    set_states,
    state_obstacle,
    states_of,
)

_CONTEXTS = "_d2sd_contexts"  # attribute of a returned cache: the drafters' contexts of the tokens it holds


@dataclass(frozen=True)
class Place:
    """Where a pass's tokens stand in the layers of one type, as its cache was before the pass."""

    start: int  # slot of the first of them, the same in all rows
    # By row, how many stored tokens they see; the other slots before `start` count for nothing. A tensor (B,) where
    # cycles do not ask the host.
    lengths: list[int] | Tensor

    def ends(self, device: torch.device) -> Tensor:
        """(B,), the lengths there."""
        return per_row(self.lengths, device)


class TreeLayer(DynamicLayer):
    """Keys and values of one layer in buffers that grow geometrically; tokens are appended by writing a slice.

    Rows of a batch may hold different numbers of tokens: row b's are the first `lengths[b]`, and all rows append
    after the longest. A sliding layer keeps every token that was appended, so that any of them can be dropped again,
    and hands out only those that the first of the new queries may see. Shapes: (B, H, tokens, head_dim).
    """

    is_croppable = True
    is_compileable = False
    is_known = True  # whether the host knows the lengths at each pass, and launches it call by call

    def __init__(self, window: int | None = None):
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.dropped = [0]  # by row, tokens before the first stored one: a sliding cache taken over has forgotten them
        self.length = 0  # tokens stored in the longest row, and those appended since: where the next ones go
        self._lengths: list[int] | None = None  # by row; `None`: `length` in all
        self.slots: Tensor | None = None  # (n,) or (B, n), where the next update goes instead; see `TreeCache.place`
        self.slots_end = 0
        self._buffers: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [empty_buffer(states, 0) for states in (key_states, value_states)]
        self.dropped = self.dropped * (key_states.shape[0] // len(self.dropped))
        self.is_initialized = True
        self._set_length(0)

    @property
    def lengths(self) -> list[int]:
        """By row, how many tokens are stored."""
        if self._lengths is not None:
            return self._lengths
        return [self.length] * (self._buffers[0].shape[0] if self.is_initialized else 1)

    def _set_length(self, length: int) -> None:
        self.length = length
        keys, values = self._buffers
        self.keys, self.values = keys.narrow(2, 0, length), values.narrow(2, 0, length)

    def set_lengths(self, lengths: list[int]) -> None:
        """Let each row end after its first `lengths[b]` tokens."""
        self._lengths = lengths if min(lengths) < max(lengths) else None
        if self.is_initialized:
            self._set_length(max(lengths))

    def _reserve(self, length: int) -> None:
        capacity = self.capacity_for(length)
        frozen = self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()  # may not be written to
        if capacity == self._buffers[0].shape[2] and not frozen:
            return
        for i, old in enumerate(self._buffers):
            self._buffers[i] = empty_buffer(old, capacity)
            self._buffers[i][:, :, : self.length] = old[:, :, : self.length]

    def place(self) -> Place:
        """Where the next pass's tokens are going to stand."""
        return Place(self.length, self.lengths)

    def bound(self, lengths: list[int]) -> int:
        """At least the greatest of these lengths; a number that stays where shapes must."""
        return max(lengths)

    def capacity_for(self, length: int) -> int:
        """Slots of the buffers once `length` are in use: geometric, so that appending stays cheap."""
        capacity = self._buffers[0].shape[2] if self.is_initialized else 0
        return capacity if length <= capacity else max(length, 5 * capacity // 4, 256)

    def row_spacing(self, end: int) -> int:
        """How far apart rows are, in tokens, in what is handed out once `end` slots are in use; see `tokens_of`."""
        if self.is_initialized and has_heads_side_by_side(self._buffers[0]):
            return self.capacity_for(end)
        return end - self.first_handed_out

    @property
    def first_handed_out(self) -> int:
        """Index of the first stored token that the next query of some row sees."""
        return 0 if self.window is None else max(min(self.lengths) - self.window + 1, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = self._buffers[0].shape[0]
        if len(key_states) > rows:
            key_states, value_states = (side_by_side(states, rows) for states in (key_states, value_states))
        if self.slots is not None:
            return self._update_slots(self.slots, key_states, value_states)
        first, start, end = self.first_handed_out, self.length, self.length + key_states.shape[2]
        self._reserve(end)
        new = [buffer.narrow(2, start, end - start) for buffer in self._buffers]
        torch._foreach_copy_(new, [key_states, value_states])
        self._set_length(end)
        return self._handed_out(first)

    def _handed_out(self, first: int) -> tuple[Tensor, Tensor]:
        if first == 0:
            return self.keys, self.values
        return self.keys[:, :, first:], self.values[:, :, first:]

    def _update_slots(self, slots: Tensor, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first_handed_out
        self._reserve(self.slots_end)
        self._set_length(self.slots_end)
        self._write(slots, key_states, value_states)
        return self._handed_out(first)

    def _write(self, slots: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        """Put the states (B, H, n, D) into slots (n,) or (B, n)."""
        slots = slots.to(key_states.device)
        for buffer, states in zip(self._buffers, (key_states, value_states)):
            if slots.ndim == 1:
                buffer.index_copy_(2, slots, states)
            else:
                _put(buffer, slots, states)

    def get_seq_length(self) -> int:
        return self.dropped[0] + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self.first_handed_out
        return self.length - first + query_length, self.dropped[0] + first

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (Transformers passes zero or a negative number)."""
        if self.is_initialized:
            self._set_length(self.length + tokens_to_remove)

    def keep(self, place: Place, nodes: Tensor, counts: list[int], targets: Tensor | None = None) -> None:
        """Of the tokens that stand there, move each row's first `counts[b]` of `nodes` (B, A) behind its own.

        Entries of `nodes` beyond a row's count may be any node. `targets`: (B, A), `targets_of` them, where known.
        """
        if not self.is_initialized:
            return
        nodes, start = nodes.to(self._buffers[0].device), place.start
        if len(nodes) == 1:
            behind = [buffer[:, :, start:] for buffer in self._buffers]
            kept = [states.index_select(2, nodes[0]) for states in behind]
            torch._foreach_copy_([states[:, :, : nodes.shape[1]] for states in behind], kept)
        else:
            move(self._buffers, start + nodes, targets_of(place, nodes) if targets is None else targets)
        self.set_lengths([length + count for length, count in zip(place.lengths, counts)])

    def rows(self, rows: list[int]) -> "TreeLayer":
        """A copy with some of the rows, in the given order."""
        layer = TreeLayer(self.window)
        self._copy_rows(layer, rows)
        return layer

    def _copy_rows(self, layer: "TreeLayer", rows: list[int]) -> None:
        if self.is_initialized:
            lengths = [self.lengths[row] for row in rows]
            index = torch.tensor(rows, device=self._buffers[0].device)
            chosen = [buffer[:, :, : max(lengths)].index_select(0, index) for buffer in self._buffers]
            layer.update(*chosen)
            layer.dropped = [self.dropped[row] for row in rows]
            layer.set_lengths(lengths)

    def reset(self) -> None:
        self.dropped = [0] * len(self.dropped)
        self._lengths = None
        if self.is_initialized:
            self._set_length(0)


def side_by_side(states: Tensor, rows: int) -> Tensor:
    """(B, H, C·L, D): what came as C chains of each row, (B·C, H, L, D)."""
    if len(states) == rows:
        return states
    apart = states.unflatten(0, (rows, len(states) // rows))
    return apart.transpose(1, 2).flatten(2, 3)


class StateLayer(LinearAttentionLayer, TreeLayer):
    """A layer with a recurrent state, of a convolution's inputs or of a scan, and keys and values if it attends too.

    The state is that after all tokens; what a pass did to it is undone, and done again for what is kept of the pass,
    by `recurrent.Chains`. A layer that does not attend has keys and values of no heads: they count the tokens.
    """

    is_croppable = False
    is_compileable = False

    def __init__(self, window: int | None = None, number_of_states: int = 1, attends: bool = False):
        LinearAttentionLayer.__init__(self, number_of_states)
        TreeLayer.__init__(self, window)
        self.attends = attends
        self.on_update: Callable[[], None] | None = None  # called when a module changes the state

    def lazy_initialization(self, *args, **kwargs) -> None:
        if args:
            TreeLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        self._tell()
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs) -> Tensor:
        self._tell()
        return super().update_recurrent_state(*args, **kwargs)

    def _tell(self) -> None:
        if self.on_update is not None:
            self.on_update()

    def count(self, rows: int, size: int, device: torch.device) -> None:
        """Note that `size` tokens of each row came by."""
        if not self.attends:
            nothing = torch.empty(rows, 0, size, 0, device=device)
            self.update(nothing, nothing)

    @property
    def states(self) -> States:
        return states_of(self)

    @states.setter
    def states(self, states: States) -> None:
        set_states(self, states)

    def rows(self, rows: list[int]) -> "StateLayer":
        layer = StateLayer(self.window, self.number_of_states, self.attends)
        self._copy_rows(layer, rows)
        copy_state_flags(layer, self)
        layer.states = choose_rows(self.states, rows)
        return layer

    def put(self, conv: Tensor, recurrent: Tensor) -> None:
        """Let these be the states, of a module that does not know of caches."""
        self._tell()
        self.conv_states[0], self.recurrent_states[0], self.has_previous_state[0] = conv, recurrent, True
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True
        self.dtype, self.device = conv.dtype, conv.device

    def take_states(self, other: LinearAttentionLayer) -> None:
        """Go on from a copy of another layer's states."""
        copy_state_flags(self, other)
        self.states = map_states(Tensor.clone, states_of(other))

    def reset(self) -> None:
        TreeLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("A recurrent state cannot forget tokens.")


def map_states(change: Callable[..., Tensor], *states: States) -> States:
    """`change` of the same tensor of each of the states."""
    first = states[0]
    return {
        name: {i: None if value is None else change(*(one[name][i] for one in states)) for i, value in values.items()}
        for name, values in first.items()
    }


def choose_rows(states: States, rows: list[int] | None) -> States:
    """Copies of some rows' states, or of all."""
    if rows is None:
        return map_states(Tensor.clone, states)
    return map_states(lambda state: state[torch.tensor(rows, dtype=torch.long, device=state.device)], states)


def per_row(values: list[int] | Tensor, device: torch.device) -> Tensor:
    """(B,): numbers on a device, where those of the host that are the same in all rows need no copy."""
    if isinstance(values, Tensor):
        return values.to(device)
    if min(values) == max(values):
        return torch.full((len(values),), values[0], device=device)
    return torch.tensor(values, device=device)


def targets_of(place: Place, nodes: Tensor) -> Tensor:
    """(B, A): the slots behind each row's own tokens that kept nodes (B, A) move to."""
    return per_row(place.lengths, nodes.device)[:, None] + torch.arange(nodes.shape[1], device=nodes.device)


def move(buffers: list[Tensor], sources: Tensor, targets: Tensor) -> None:
    """In each of the buffers, copy the tokens in slots `sources` (B, A) to slots `targets` (B, A)."""
    for buffer in buffers:
        at, to = sources.to(buffer.device), targets.to(buffer.device)
        if has_heads_side_by_side(buffer):
            shape = buffer.shape[0], buffer.shape[1], at.shape[1], buffer.shape[3]
            _put(buffer, to, buffer.gather(2, at[:, None, :, None].expand(shape)))
        else:
            _put(buffer, to, buffer.transpose(1, 2)[_each_row(at), at].transpose(1, 2))


def _put(buffer: Tensor, slots: Tensor, states: Tensor) -> None:
    """Write states (B, H, n, D) to slots (B, n)."""
    if has_heads_side_by_side(buffer):
        buffer.scatter_(2, slots[:, None, :, None].expand_as(states), states)
    else:  # a CPU's scatter in half precision takes as long as the buffer is large
        buffer.transpose(1, 2)[_each_row(slots), slots] = states.transpose(1, 2)


def _each_row(slots: Tensor) -> Tensor:
    """(B, 1), what goes with slots (B, n) as an index of rows."""
    return torch.arange(len(slots), device=slots.device)[:, None]


def has_heads_side_by_side(states: Tensor) -> bool:
    """Whether a buffer for such states is to hold a token's heads one behind the other."""
    return states.is_cuda


def empty_buffer(like: Tensor, capacity: int) -> Tensor:
    """(B, H, capacity, D). On a GPU a token's heads lie side by side, as FlashAttention's packed sequences want it.

    Of a batch it is zero: slots behind shorter rows' ends are hidden by masks, which do not hide what is no number.
    """
    rows, heads, _, width = like.shape
    make = like.new_empty if rows == 1 else like.new_zeros
    if has_heads_side_by_side(like):
        return make(rows, capacity, heads, width).transpose(1, 2)
    return make(rows, heads, capacity, width)


class TreeCache(Cache):
    """A `TreeLayer` for every layer of a decoder, full or sliding; a `StateLayer` for one with a recurrent state.

    Those that cache nothing of their own stay empty.

    Raises:
        ValueError: for a layer type whose state cannot drop tokens again.
    """

    def __new__(cls, config=None):  # copies are made without
        own = own_cache_class(config) if config is not None else None
        # For a model that insists on a class of its own: one that is both.
        return super().__new__(cls if own is None else type(cls.__name__, (cls, own), {"linear_cache": ()}))

    def __init__(self, config):
        self.config, self.layer_types = config, _layer_types(config)
        Cache.__init__(self, layers=_new_layers(config))
        self._first_of_type = {name: self.layer_types.index(name) for name in self.layer_types if name != NO_CACHE}

    def by_type(self) -> dict[str, TreeLayer]:
        """One layer of each layer type: all of a type hold as many tokens."""
        return {name: self.layers[at] for name, at in self._first_of_type.items()}

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """A layer's state, as MiniMax's modules ask for it."""
        layer = self.layers[layer_idx]
        return layer.recurrent_states[0] if has_states(layer) else None

    def set_linear_cache(self, layer_idx: int, state: Tensor) -> None:
        """As MiniMax's modules leave a state; (B, ...)."""
        self.layers[layer_idx].update_recurrent_state(state)
        self.layers[layer_idx].has_previous_state[0] = True

    @property
    def state_layers(self) -> list[StateLayer]:
        return [layer for layer in self.layers if isinstance(layer, StateLayer)]

    def count(self, rows: int, size: int, device: torch.device) -> None:
        """Let layers that see no keys know that a pass over `size` tokens of each row is over."""
        for layer in self.state_layers:
            layer.count(rows, size, device)

    @property
    def lengths(self) -> list[int]:
        """By row, how many tokens are stored in the layers that have forgotten least."""
        return max((layer.lengths for layer in self.by_type().values()), key=sum)

    def set_lengths(self, lengths: list[int]) -> None:
        """Let each row end after `lengths[b]` tokens, forgotten ones included."""
        for layer in self.layers:
            layer.set_lengths([length - dropped for length, dropped in zip(lengths, layer.dropped)])

    def place(self, slots: Tensor | None, end: int = 0) -> None:
        """Write the next update of each layer to slots (n,) or (B, n), all below `end`; `None`: append again."""
        for layer in self.layers:
            layer.slots, layer.slots_end = slots, end

    def keep(self, places: dict[str, Place], nodes: Tensor, counts: list[int]) -> None:
        """Of the tokens of a pass, keep each row's first `counts[b]` of `nodes` (B, A), in order."""
        targets = {name: targets_of(place, nodes) for name, place in places.items()} if len(nodes) > 1 else {}
        for layer, layer_type in zip(self.layers, self.layer_types):
            if layer_type in places:
                layer.keep(places[layer_type], nodes, counts, targets.get(layer_type))

    def places(self) -> dict[str, Place]:
        """By layer type, where the next pass's tokens are going to stand."""
        return {name: layer.place() for name, layer in self.by_type().items()}

    def rows(self, rows: list[int]) -> "TreeCache":
        """A copy with some of the rows, in the given order."""
        cache = TreeCache(self.config)
        cache.layers = [layer.rows(rows) for layer in self.layers]
        return cache

    @classmethod
    def stack(cls, caches: list["TreeCache"]) -> "TreeCache":
        """The rows of several caches, one below the other."""
        stacked = cls(caches[0].config)
        for layer, *parts in zip(stacked.layers, *(cache.layers for cache in caches)):
            if not parts[0].is_initialized:
                continue
            longest = max(part.length for part in parts)
            layer.update(*(_stack_rows(states, longest) for states in zip(*((p.keys, p.values) for p in parts))))
            layer.dropped = [dropped for part in parts for dropped in part.dropped]
            layer.set_lengths([length for part in parts for length in part.lengths])
            if isinstance(layer, StateLayer):
                copy_state_flags(layer, parts[0])
                layer.states = map_states(lambda *rows: torch.cat(rows), *(part.states for part in parts))
        return stacked

    @classmethod
    def take_over(cls, config, cache: DynamicCache, seen: Tensor | None = None) -> "TreeCache":
        """A tree cache with what `cache` holds; `give_back` returns it. The tensors are copied once.

        Args:
            seen: (B, tokens) bool, which of the cached tokens count; `None` for all.

        Raises:
            ValueError: where a row's window reaches back to tokens that sliding layers have forgotten.
        """
        tree_cache = cls(config)
        for layer, plain in zip(tree_cache.layers, cache.layers):
            if has_states(plain):
                layer.take_states(plain)
            if getattr(plain, "is_initialized", False) and plain.keys is not None and plain.keys.numel():
                dropped = plain.get_seq_length() - plain.keys.shape[2]
                if seen is None or bool(seen.all()):
                    layer.update(plain.keys, plain.values)
                    layer.dropped = [dropped] * plain.keys.shape[0]
                else:
                    _take_seen(layer, plain, seen.to(plain.keys.device), dropped)
        tree_cache._count_as_attention()
        return tree_cache

    def _count_as_attention(self) -> None:
        """Let layers that do not attend hold as many tokens as those that do."""
        attending = [layer for layer in self.layers if layer.is_initialized]
        if attending:
            lengths, first = full_lengths(attending[0]), attending[0]
            for layer in self.state_layers:
                if not layer.attends:
                    layer.count(len(lengths), max(lengths), first.device)
                    layer.set_lengths(lengths)

    def give_back(self, cache: DynamicCache, columns: list[list[int]] | None = None) -> None:
        """Leave in `cache` what plain decoding would have: views of the buffers, and copies of sliding windows.

        Args:
            columns: for rows that are padded or of several lengths, where each of a row's tokens stands among the
                columns of plain decoding; columns without a token become zeros.
        """
        cache.layers.extend(DynamicLayer() for _ in range(len(self.layers) - len(cache.layers)))
        for at, (layer, plain) in enumerate(zip(self.layers, cache.layers)):
            if has_states(layer):
                give_states(cache, at, layer)
            if not layer.is_initialized or getattr(layer, "attends", True) is False:
                continue
            if not plain.is_initialized:
                plain.lazy_initialization(layer.keys, layer.values)
            keys, values, total = layer.keys, layer.values, layer.get_seq_length()
            if columns is not None:
                total = 1 + max(row[-1] for row in columns)
                keys, values = (_spread(layer, states, columns, total) for states in (keys, values))
            plain.keys, plain.values = keys, values
            if type(plain) is DynamicSlidingWindowLayer:
                start = max(keys.shape[2] - layer.window + 1, 0)
                plain.keys, plain.values = keys[:, :, start:].clone(), values[:, :, start:].clone()
                plain.cumulative_length = total


def full_lengths(layer: TreeLayer) -> list[int]:
    """By row, how many tokens were ever put in a layer."""
    return [length + dropped for length, dropped in zip(layer.lengths, layer.dropped)]


def _new_layers(config) -> list[TreeLayer]:
    types, options = layer_types_of(config)
    return [
        StateLayer(window, option.get("number_of_states", 1), kind in ATTENDING_TYPES)
        if kind in STATE_TYPES
        else TreeLayer(window)
        for kind, option, window in zip(types, options, _windows(config))
    ]


def _stack_rows(states: tuple[Tensor, ...], longest: int) -> Tensor:
    """(rows of all, H, longest, D) of keys or values of several lengths, zeros behind the shorter ones."""
    return torch.cat([nn.functional.pad(part, (0, 0, 0, longest - part.shape[2])) for part in states])


def _take_seen(layer: TreeLayer, plain: DynamicLayer, seen: Tensor, dropped: int) -> None:
    """Put the cached tokens that count at the front of each row."""
    stored = seen[:, dropped:]  # (B, stored tokens)
    forgotten, lengths = seen[:, :dropped].sum(1).tolist(), stored.sum(1).tolist()
    for row, (missing, length) in enumerate(zip(forgotten, lengths)):
        if missing and layer.window is not None and length < layer.window - 1:
            raise ValueError(
                f"{CACHE_NAME} holds {length} tokens of row {row} in its sliding layers; their window reaches back "
                f"{layer.window - 1}, to tokens that gave way to padding. Pass the whole prompts without {CACHE_NAME}."
            )
    order = (~stored).int().argsort(dim=1, stable=True)[:, : max(lengths), None]  # (B, longest, 1)
    for_all = order[:, None].expand(*plain.keys.shape[:2], -1, -1)
    layer.update(*(s.gather(2, for_all.expand(-1, -1, -1, s.shape[3])) for s in (plain.keys, plain.values)))
    layer.dropped = forgotten
    layer.set_lengths(lengths)


def _spread(layer: TreeLayer, states: Tensor, columns: list[list[int]], total: int) -> Tensor:
    """(B, H, total, D): each row's tokens in its columns, zeros elsewhere."""
    spread = states.new_zeros(*states.shape[:2], total, states.shape[3])
    for row, (places, dropped, length) in enumerate(zip(columns, layer.dropped, layer.lengths)):
        places = torch.tensor(places[dropped : dropped + length], device=states.device)
        spread[row, :, places] = states[row, :, :length]
    return spread


def check_supported(config, cache: Cache) -> None:
    """Refuse, with the reason, a cache that cannot take part in tree decoding.

    Raises:
        ValueError: for anything but a plain `DynamicCache` with layers for `config`.
    """
    windows, types = _windows(config), _layer_types(config)
    if cache is None:
        name = type(config.get_text_config(decoder=True)).__name__
        raise ValueError(
            f"D²SD decoding keeps a tree in a cache beside its prefix; a model of {name} has none, got NoneType. "
            "Generate without assistant_model."
        )
    offloaded = getattr(cache, "offloading", False)
    own = own_cache_class(config)
    if own is not None and type(cache) is own:
        if cache.layers:
            raise ValueError(
                f"{own.__name__} does not say how many tokens it holds. Pass the whole prompt without {CACHE_NAME}."
            )
        return
    if type(cache) is not DynamicCache or offloaded:
        kind = f"{'an offloaded ' if offloaded else ''}{type(cache).__name__}"
        raise ValueError(
            "D²SD decoding keeps a tree in its own preallocated cache and takes over a DynamicCache only; got "
            f"{kind}. Drop `cache_implementation` and such a `{CACHE_NAME}`, or generate without assistant_model."
        )
    for layer, window, kind in zip(cache.layers, windows, types):
        if kind in STATE_TYPES:
            fits = isinstance(layer, DynamicLayer) == (kind == "hybrid")
        else:
            fits = type(layer) is DynamicLayer or is_without_cache(layer)
            fits = fits or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window == window)
        if not fits:
            raise ValueError(
                f"D²SD decoding cannot take over a cache layer of type {type(layer).__name__} here: it was not made "
                "for this model. Create it with `DynamicCache(config=model.config)`, or pass none."
            )


def layer_windows(config) -> dict[str, int | None]:
    """The sliding window of each layer type that attends; `None` is full attention. Keys are Transformers' names."""
    found: dict[str, int | None] = {}
    for name, window in zip(_layer_types(config), _windows(config)):
        if name in ATTENDING_TYPES:
            found.setdefault(name, window)  # the first of a type has keys and values of its own, and so a window
    return found


def is_recurrent(config) -> bool:
    """Whether some layer of a decoder keeps a recurrent state."""
    return not STATE_TYPES.isdisjoint(_layer_types(config))


def _layer_types(config) -> list[str]:
    return layer_types_of(config)[0]


def _windows(config) -> list[int | None]:
    types, options = layer_types_of(config)
    unknown = sorted(set(types) - ATTENDING_TYPES - STATE_TYPES - {NO_CACHE})
    name, obstacle = type(config.get_text_config(decoder=True)).__name__, state_obstacle(config)
    if obstacle is not None:
        raise ValueError(f"{name} has a recurrent state, and {obstacle}. Generate without assistant_model.")
    if unknown:
        raise ValueError(
            f"{name} has layers of type {unknown}, whose state cannot return to an accepted prefix of a rejected "
            "draft. Generate without assistant_model."
        )
    return [option.get("sliding_window") for option in options]


def save_contexts(cache: Cache, contexts: object) -> None:
    """Attach the drafters' contexts to a cache the user keeps, for the next turn."""
    setattr(cache, _CONTEXTS, contexts)


def saved_contexts(cache: Cache):
    """What `save_contexts` attached to this cache, or `None`."""
    return getattr(cache, _CONTEXTS, None)


def keep_prefix(cache: Cache, length: int) -> bool:
    """Crop the user's cache to its first `length` tokens; `False`, and no change, where some layer cannot.

    Past its window a sliding layer has let go of the tokens that it would have to show again; a recurrent state never
    goes back.
    """
    removed = cache.get_seq_length() - length
    if removed <= 0:
        return removed == 0
    if any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers):
        return False
    windows = (getattr(layer, "sliding_window", None) for layer in cache.layers)
    if any(window is not None and cache.get_seq_length() >= window for window in windows):
        return False
    cache.crop(-removed)
    return True
