"""The dispatch: how `generate` finds its way to D²SD decoding, and every other assistant to the stock one."""

import copy

from transformers import GenerationConfig

from . import options
from .binding import bind, refuse, take_wish_for_speed, unsupported
from .calling import assisted_decode
from .compat import (
    PLAIN_MODES,
    forget_told_adapters,
    mode_to_validate,
    wrap_assisted_decoding,
    wrap_mode,
    wrap_validation,
)
from .modeling import D2SDDrafterModel


def install() -> None:
    """Teach `GenerationMixin` to decode with a `D2SDAssistant`. Every other assistant takes the stock way."""
    options.register()
    wrap_mode(_get_generation_mode)
    wrap_validation(_validate_generation_mode)
    wrap_assisted_decoding(_dispatch)


def _is_ours(assistant) -> bool:
    """By a mark, not by class: an assistant loaded as the Hub's remote code is another class of the same name."""
    return getattr(type(assistant), "is_d2sd_assistant", False)


def _dispatch(stock, target, input_ids, *args, assistant_model=None, **kwargs):
    if not _is_ours(assistant_model):
        return stock(target, input_ids, *args, assistant_model=assistant_model, **kwargs)
    return assisted_decode(assistant_model, target, input_ids, *args, **kwargs)


def _get_generation_mode(stock, config: GenerationConfig, assistant_model=None):
    """Stock only warns, and drops the assistant, where the settings ask for beams and the like."""
    if _is_ours(assistant_model):
        mode = stock(config)
        if mode not in PLAIN_MODES:
            refuse([f"the settings ask for {mode.value}"])
    return stock(config, assistant_model)


def _validate_generation_mode(stock, target, generation_mode, generation_config, generation_mode_kwargs):
    assistant = generation_mode_kwargs.get("assistant_model")
    if _is_ours(assistant):
        try:
            refuse(unsupported(target, generation_config, generation_mode_kwargs))
            bind(assistant, target, generation_mode_kwargs.get("tokenizer"))
        except ValueError:
            forget_told_adapters(target)
            raise
        take_wish_for_speed(target, generation_config)  # of the call's own copy
        # Stock wants vocabularies of the same size, and a target may have grown: it is shown one that fits.
        generation_mode_kwargs = {**generation_mode_kwargs, "assistant_model": target}
        generation_config = copy.copy(generation_config)
        generation_config.num_return_sequences = 1  # stock takes one in assisted decoding
        generation_mode = mode_to_validate(target, generation_mode)
    elif isinstance(assistant, D2SDDrafterModel) and generation_config.speculation_type != "dflash":
        raise ValueError(
            "A single D2SDDrafterModel was passed as assistant_model. Pass `D2SDAssistant.from_drafters(drafter)`, "
            "or add `speculation_type='dflash'` for Transformers' own decoding."
        )
    return stock(target, generation_mode, generation_config, generation_mode_kwargs)
