"""The drafters' configurations and networks; the same files are the Hub's remote code."""

from .compat_d2sd import CACHE_NAME
from .configuration_d2sd import D2SDConfig, D2SDDrafterConfig, default_target_layer_ids
from .modeling_d2sd import D2SDAssistant, D2SDDrafterModel

__all__ = [
    "CACHE_NAME",
    "D2SDAssistant",
    "D2SDConfig",
    "D2SDDrafterConfig",
    "D2SDDrafterModel",
    "default_target_layer_ids",
]
