"""All that knows Transformers' caches: a preallocated cache that takes a tree's nodes and keeps one path of them."""

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, get_layer_types_and_kwargs

from .modeling import CACHE_NAME

_CONTEXTS = "_d2sd_contexts"  # attribute of a returned cache: the drafters' contexts of the tokens it holds


class TreeLayer(DynamicLayer):
    """Keys and values of one layer in buffers that grow geometrically; tokens are appended by writing a slice.

    A sliding layer keeps every token that was appended, so that any of them can be dropped again, and hands out only
    those that the first of the new queries may see. Shapes: (B, H, tokens, head_dim).
    """

    is_croppable = True
    is_compileable = False

    def __init__(self, window: int | None = None):
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.dropped = 0  # tokens before the first stored one: a sliding cache that was taken over has forgotten them
        self.length = 0  # tokens stored

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states)]
        self.is_initialized = True
        self._set_length(0)

    def _set_length(self, length: int) -> None:
        self.length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def _reserve(self, length: int) -> None:
        capacity = self._buffers[0].shape[2]
        frozen = self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()  # may not be written to
        if length <= capacity and not frozen:
            return
        capacity = max(length, 5 * capacity // 4, 256)  # geometric: appending stays cheap, a quarter at most is spare
        for i, old in enumerate(self._buffers):
            self._buffers[i] = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            self._buffers[i][:, :, : self.length] = old[:, :, : self.length]

    def _first_visible(self) -> int:
        """Index of the first stored token that the next query sees."""
        return 0 if self.window is None else max(self.length - self.window + 1, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, start, end = self._first_visible(), self.length, self.length + key_states.shape[2]
        self._reserve(end)
        for buffer, states in zip(self._buffers, (key_states, value_states)):
            buffer[:, :, start:end] = states
        self._set_length(end)
        return self.keys[:, :, first:], self.values[:, :, first:]

    def get_seq_length(self) -> int:
        return self.dropped + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_visible()
        return self.length - first + query_length, self.dropped + first

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (Transformers passes zero or a negative number)."""
        if self.is_initialized:
            self._set_length(self.length + tokens_to_remove)

    def keep(self, start: int, nodes: Tensor) -> None:
        """Of the tokens from `start` on, keep `nodes` (A,), in that order and next to each other."""
        if not self.is_initialized:
            return
        start -= self.dropped
        nodes = nodes.to(self.device)
        for buffer in self._buffers:
            buffer[:, :, start : start + len(nodes)] = buffer.index_select(2, start + nodes)
        self._set_length(start + len(nodes))

    def reset(self) -> None:
        self.dropped = 0
        if self.is_initialized:
            self._set_length(0)


class TreeCache(Cache):
    """A `TreeLayer` for every layer of a decoder, full or sliding.

    Raises:
        ValueError: for a layer type whose state cannot drop tokens again.
    """

    def __init__(self, config):
        super().__init__(layers=[TreeLayer(window) for window in _windows(config)])
        self._first_of_type = {}
        for layer, layer_type in zip(self.layers, _layer_types(config)):
            self._first_of_type.setdefault(layer_type, layer)

    def visible_lengths(self) -> dict[str, int]:
        """By layer type, how many stored keys a layer hands out before those of the next update."""
        return {name: layer.get_mask_sizes(0)[0] for name, layer in self._first_of_type.items()}

    def keep(self, start: int, nodes: Tensor) -> None:
        for layer in self.layers:
            layer.keep(start, nodes)

    @classmethod
    def take_over(cls, config, cache: DynamicCache) -> "TreeCache":
        """A tree cache with what `cache` holds; `give_back` returns it. The tensors are copied once."""
        tree_cache = cls(config)
        for layer, plain in zip(tree_cache.layers, cache.layers):
            if plain.is_initialized and plain.keys is not None and plain.keys.numel():
                layer.update(plain.keys, plain.values)
                layer.dropped = plain.get_seq_length() - layer.length
        return tree_cache

    def give_back(self, cache: DynamicCache) -> None:
        """Leave in `cache` what plain decoding would have: views of the buffers, and copies of sliding windows."""
        cache.layers.extend(DynamicLayer() for _ in range(len(self.layers) - len(cache.layers)))
        for layer, plain in zip(self.layers, cache.layers):
            if not layer.is_initialized:
                continue
            if not plain.is_initialized:
                plain.lazy_initialization(layer.keys, layer.values)
            plain.keys, plain.values = layer.keys, layer.values
            if type(plain) is DynamicSlidingWindowLayer:
                start = layer._first_visible()
                plain.keys, plain.values = layer.keys[:, :, start:].clone(), layer.values[:, :, start:].clone()
                plain.cumulative_length = layer.get_seq_length()


def check_supported(config, cache: Cache | None) -> None:
    """Refuse, with the reason, a cache that cannot take part in tree decoding.

    Raises:
        ValueError: for anything but a plain `DynamicCache` with layers for `config`.
    """
    windows = _windows(config)
    offloaded = getattr(cache, "offloading", False)
    if type(cache) is not DynamicCache or offloaded:
        kind = f"{'an offloaded ' if offloaded else ''}{type(cache).__name__}"
        raise ValueError(
            "D²SD decoding keeps a tree in its own preallocated cache and takes over a DynamicCache only; got "
            f"{kind}. Drop `cache_implementation` and such a `{CACHE_NAME}`, or generate without assistant_model."
        )
    for layer, window in zip(cache.layers, windows):
        fits = type(layer) is DynamicLayer or (
            type(layer) is DynamicSlidingWindowLayer and layer.sliding_window == window
        )
        if not fits:
            raise ValueError(
                f"D²SD decoding cannot take over a cache layer of type {type(layer).__name__} here: it was not made "
                "for this model. Create it with `DynamicCache(config=model.config)`, or pass none."
            )


def layer_windows(config) -> dict[str, int | None]:
    """The sliding window of each layer type of a decoder; `None` is full attention. Keys are Transformers' names."""
    return dict(zip(_layer_types(config), _windows(config)))


def _layer_types(config) -> list[str]:
    return get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0]


def _windows(config) -> list[int | None]:
    text = config.get_text_config(decoder=True)
    types, options = get_layer_types_and_kwargs(text)
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"{type(text).__name__} has layers of type {unknown}, whose state cannot return to an accepted prefix of "
            "a rejected draft. Generate without assistant_model."
        )
    return [option.get("sliding_window") for option in options]


def save_contexts(cache: Cache, contexts: object) -> None:
    """Attach the drafters' contexts to a cache the user keeps, for the next turn."""
    setattr(cache, _CONTEXTS, contexts)


def saved_contexts(cache: Cache):
    """What `save_contexts` attached to this cache, or `None`."""
    return getattr(cache, _CONTEXTS, None)
