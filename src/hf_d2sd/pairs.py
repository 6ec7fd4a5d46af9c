"""Drafters as commands name them: a pair, a first one, or a first and a second one, folders or Hub ids; or none."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from .modeling import D2SDAssistant, D2SDConfig, D2SDDrafterConfig, D2SDDrafterModel

CONTEXT = ["context"]  # in the drafters' place: none, the text so far is the only source


def refuse_missing_folder(name: str) -> None:
    """A name that can only be a folder must be one: asking the Hub for it would give a riddle for an error."""
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ValueError(f"There is no folder {name}: name a folder with a config.json, or a Hub id like org/name.")


def read_pair_config(drafters: Sequence[str]) -> D2SDConfig:
    """Of a pair, or of drafters that `load_assistant` would join."""
    if list(drafters) == CONTEXT:
        return D2SDAssistant.from_context().config
    if is_pair(drafters[0]):
        if len(drafters) == 2:
            raise ValueError(
                f"--drafters names {drafters[0]}, which is a pair, and {drafters[1]}: name the pair alone, or two "
                "drafters."
            )
        return D2SDConfig.from_pretrained(drafters[0])
    configs = [D2SDDrafterConfig.from_pretrained(name) for name in drafters]
    return D2SDConfig(**dict(zip(("first", "second"), configs)), num_branches=4 if len(configs) == 2 else 0)


def is_pair(name: str) -> bool:
    config_dict, _ = PreTrainedConfig.get_config_dict(name)
    return config_dict.get("model_type") == D2SDConfig.model_type


def load_assistant(drafters: Sequence[str], dtype: torch.dtype) -> D2SDAssistant:
    """A pair, one or two drafters joined to an assistant, or an assistant without any."""
    if list(drafters) == CONTEXT:
        return D2SDAssistant.from_context()
    if is_pair(drafters[0]):
        return D2SDAssistant.from_pretrained(drafters[0], dtype=dtype).eval()
    return D2SDAssistant.from_drafters(*drafters, dtype=dtype)


def read_drafter_config(name: str, role: str) -> D2SDDrafterConfig:
    """Of the drafter that `load_drafter` would load.

    Raises:
        ValueError: for a pair without such a drafter.
    """
    if not is_pair(name):
        return D2SDDrafterConfig.from_pretrained(name)
    config = getattr(D2SDConfig.from_pretrained(name), role)
    if config is None:
        raise ValueError(f"{name} has no {role} drafter: its first is the only one.")
    return config


def load_drafter(name: str, role: str, **kwargs) -> D2SDDrafterModel:
    """A drafter, or of a pair the one with this role, "first" or "second"; `kwargs` go to `from_pretrained`.

    Raises:
        ValueError: for a pair without such a drafter.
    """
    if not is_pair(name):
        return D2SDDrafterModel.from_pretrained(name, **kwargs)
    read_drafter_config(name, role)
    return getattr(D2SDAssistant.from_pretrained(name, **kwargs), role)
