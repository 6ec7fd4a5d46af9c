"""Attention over a candidate tree: which keys each node sees, and the implementation that can be told so."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import logging

from .cache import layer_windows
from .tree import CandidateTree

logger = logging.get_logger(__name__)

_MASKABLE = ("sdpa", "eager")  # implementations of Transformers that take a 4-D mask


@dataclass(frozen=True)
class MaskedAttention:
    """An attention implementation that takes arbitrary masks, and why it is the one for a model."""

    implementation: str
    reason: str
    windows: dict[str, int | None]  # the sliding window of each layer type
    text_config: object

    @classmethod
    def for_model(cls, model) -> "MaskedAttention":
        """Choose once for a model: its own implementation where that takes a 4-D mask, else SDPA or eager."""
        text_config = model.config.get_text_config(decoder=True)
        own = text_config._attn_implementation or "eager"
        if own in _MASKABLE:
            implementation, reason = own, "the model's own implementation takes tree masks"
        else:
            implementation = "sdpa" if getattr(_decoder(model), "_supports_sdpa", False) else "eager"
            reason = f"the model's own {own!r} takes no tree mask and runs only the prefill"
            logger.warning_once(f"D²SD runs candidate trees with {implementation!r} attention: {reason}.")
        return cls(implementation, reason, layer_windows(model.config), text_config)

    def __str__(self) -> str:
        return f"{self.implementation}: {self.reason}"

    @contextlib.contextmanager
    def active(self):
        """Within, the model's forward uses this implementation; afterwards its own again, also after an error."""
        own = self.text_config._attn_implementation_internal
        try:
            self.text_config._attn_implementation_internal = self.implementation
            yield
        finally:
            self.text_config._attn_implementation_internal = own

    def as_mask(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """From which keys are seen, (Q, keys) bool, to the mask (1, 1, Q, keys) that the implementation takes."""
        if self.implementation == "sdpa":
            return seen[None, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]

    def tree_masks(self, tree: CandidateTree, position: int, lengths: dict[str, int], dtype: torch.dtype):
        """What a target's forward takes as `attention_mask` for the tree's nodes.

        Args:
            tree: N nodes.
            position: of the anchor; the cached tokens stand before it.
            lengths: for each layer type, how many cached keys its layers hand out before the nodes' own.
            dtype: of the target's activations; an additive mask is made in it.

        Returns:
            (1, 1, N, keys) for a target with one kind of layer, else a dict of these by layer type.
        """
        visible = tree.visibility()
        masks = {
            layer_type: self.as_mask(tree_mask(visible, tree.depths, position, lengths[layer_type], window), dtype)
            for layer_type, window in self.windows.items()
        }
        by_type = getattr(self.text_config, "layer_types", None) is not None  # as `create_masks_for_generate` decides
        return masks if by_type else next(iter(masks.values()))


def tree_mask(visible: Tensor, depths: Tensor, position: int, cached: int, window: int | None) -> Tensor:
    """Which keys each node sees: cached ones within its window, and its ancestors and itself.

    Args:
        visible: (N, N) bool, `CandidateTree.visibility`.
        depths: (N,).
        position: of the anchor.
        cached: how many keys stand before the nodes' own; they are the last ones before `position`.
        window: a node at position p sees positions above p - window; `None` for all.

    Returns:
        (N, cached + N) bool.
    """
    device = depths.device
    if window is None:
        return torch.cat([visible.new_ones(len(depths), cached), visible], dim=1)
    oldest = position + depths - window  # (N,), the last position that is out of sight
    keys = torch.arange(position - cached, position, device=device)
    near = keys > oldest[:, None]
    return torch.cat([near, visible & (position + depths > oldest[:, None])], dim=1)


def _decoder(model):
    """The text decoder inside a causal LM; a drafter is its own."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if decoder is not None else model
