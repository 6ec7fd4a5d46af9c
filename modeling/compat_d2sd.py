# Copyright 2026 The hf-d2sd authors. Licensed under the Apache License, Version 2.0.
"""What the networks take of Transformers beside its public names; what decoding takes is in `hf_d2sd.compat`."""

from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import Cache, DFlashCache
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, load_state_dict
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

# What Transformers calls the argument and the output that hold keys and values: `cache` from 5.24 on.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def attention_function(config) -> Callable:
    """The attention implementation that a model with this config uses."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)


def block_mask(config, layer_type: str, embeds: Tensor, attention_mask, cache: Cache, rule: Callable | None):
    """The mask by which a layer of that type lets blocks see the context and themselves, as `rule` narrows it."""
    create = {
        "full_attention": create_bidirectional_mask,
        "sliding_attention": create_bidirectional_sliding_window_mask,
    }[layer_type]
    given = {CACHE_NAME: cache, "attention_mask": attention_mask, "and_mask_function": rule}
    return create(config=config, inputs_embeds=embeds, **given)


def drafted(last_hidden_state: Tensor, cache: Cache | None) -> BaseModelOutputWithPast:
    """What a drafter's forward returns."""
    return BaseModelOutputWithPast(last_hidden_state=last_hidden_state, **{CACHE_NAME: cache})


__all__ = [
    "CACHE_NAME",
    "SAFE_WEIGHTS_INDEX_NAME",
    "SAFE_WEIGHTS_NAME",
    "BaseModelOutputWithPast",
    "Cache",
    "DFlashCache",
    "Qwen3MLP",
    "Qwen3RMSNorm",
    "Qwen3RotaryEmbedding",
    "attention_function",
    "block_mask",
    "cached_file",
    "drafted",
    "load_state_dict",
    "rotate_half",
]
