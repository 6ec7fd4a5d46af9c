"""Does this pair fit this target, and can D²SD decode such a call at all?"""

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .compat import (
    adapters_by_token,
    embedding_scale,
    has_several_streams,
    is_static,
    owner_of_inputs,
    target_state_obstacle,
)
from .modeling import D2SDAssistant, D2SDDrafterConfig

logger = logging.get_logger(__name__)


def refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError(
            "D²SD decoding is greedy search or sampling by a decoder with a key-value cache; here "
            f"{'; '.join(reasons)}. Change that, or call generate without assistant_model."
        )


def unsupported(target, config: GenerationConfig, mode_kwargs: dict) -> list[str]:
    """What stands in the way, in words; empty if nothing does."""
    name, obstacle = type(target).__name__, target_state_obstacle(target)
    by_token = adapters_by_token(target)
    reasons = {
        f"{name} is an encoder-decoder model": target.config.is_encoder_decoder,
        f"{name} has a recurrent state, and {obstacle}": obstacle,
        f"{name} has its inputs prepared by {type(owner_of_inputs(target)).__name__}, for virtual tokens of prompt "
        "or prefix tuning, which a tree does not have": owner_of_inputs(target) is not target,
        "adapter_names gives each row an adapter, and rows leave the batch (use set_adapter)": (
            "adapter_names" in by_token
        ),
        "an activated LoRA (alora_invocation_tokens) counts tokens from the end, and a tree has several ends": (
            "alora_offsets" in by_token
        ),
        f"cache_implementation is {config.cache_implementation!r}, and the cache of a tree is neither offloaded nor "
        "quantized (unset it, in the call or in the target's generation_config.cache_implementation)": (
            (config.cache_implementation or "").startswith(("offloaded", "quantized"))
        ),
        "use_cache is False": config.use_cache is False,
        "synced_gpus (ZeRO-3 or FSDP) is on": mode_kwargs.get("synced_gpus"),
        "prompt_lookup_num_tokens is set": config.prompt_lookup_num_tokens is not None,
        "assistant_early_exit is set": config.assistant_early_exit is not None,
        "use_mtp is on": getattr(config, "use_mtp", False),
        "speculation_type is set, for which a single drafter is passed (assistant.first)": (
            getattr(config, "speculation_type", None) is not None
        ),
        "output_attentions is on, which a tree does not give": (
            config.output_attentions and config.return_dict_in_generate
        ),
        f"output_hidden_states is on, and {name} has several for each token and layer": (
            config.output_hidden_states and config.return_dict_in_generate and has_several_streams(target)
        ),
        "assistant_tokenizer was passed, and drafters share the target's tokenizer": (
            "assistant_tokenizer" in mode_kwargs
        ),
    }
    return [reason for reason, holds in reasons.items() if holds]


def take_wish_for_speed(target, config: GenerationConfig) -> None:
    """A static cache of the target's own generation config gives way to the tree's; one that is passed does not."""
    wish = config.cache_implementation
    if is_static(wish) and target.generation_config.cache_implementation == wish:
        logger.warning_once(
            f"The target's generation config has cache_implementation={wish!r}. D²SD decoding uses a preallocated "
            "cache of its own in its place; for cycles of fixed shapes call assistant.compile()."
        )
        config.cache_implementation = None


def bind(assistant: D2SDAssistant, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Check that drafters were made for this target.

    Args:
        tokenizer: the target's, where known; compared with the drafters' `tokenizer_fingerprint`.

    Raises:
        ValueError: naming both values, for a mismatch of vocabulary, width, layers, special tokens or tokenizer, and
            for a missing mask token.
    """
    for misfit in find_misfits(assistant, target, tokenizer):
        raise ValueError(misfit.words)


# A target may have grown since its drafters were made, by so many added or padding tokens, or by a tenth: what it
# has more is never drafted. One that grew by more is taken for another.
_GROWTH = 1024


class Misfit(NamedTuple):
    """One way in which drafters are not a target's."""

    subject: str  # vocabulary, width, layers, mask token or tokenizer
    words: str  # with both values


def find_misfits(
    assistant: D2SDAssistant, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[Misfit]:
    """All that `bind` refuses; of models their configs alone are read."""
    for role in ("first", "second"):
        drafter = getattr(assistant, role)
        if drafter is not None:
            yield from _sizes_that_differ(role, drafter.config, target)
            yield from _wrong_tokens(role, drafter.config, tokenizer)


def _sizes_that_differ(role: str, config: D2SDDrafterConfig, target) -> Iterator[Misfit]:
    text = target.config.get_text_config(decoder=True)
    layers, known = text.num_hidden_layers, config.vocab_size or text.vocab_size
    has_grown = known <= text.vocab_size <= known + max(known // 10, _GROWTH)
    expected = (
        ("vocabulary", "vocab_size", known, known if has_grown else text.vocab_size),
        ("width", "target_hidden_size", config.target_hidden_size, text.hidden_size),
        ("width", "hidden_size", config.hidden_size, text.hidden_size),
        ("width", "input_embedding_scale", *_embedding_scales(config, target)),
        ("layers", "num_target_layers", config.num_target_layers or layers, layers),
    )
    for subject, name, seen, wanted in expected:
        if seen != wanted:
            yield Misfit(
                subject,
                f"The {role} drafter does not fit {type(target).__name__}: its {name} is {seen}, the target's "
                f"is {wanted}. Use drafters that were trained for this target.",
            )
    if max(config.target_layer_ids) >= layers:
        yield Misfit(
            "layers",
            f"The {role} drafter reads target layers {config.target_layer_ids}, but the target has "
            f"{layers} layers (ids 0 to {layers - 1}).",
        )


def _embedding_scales(config: D2SDDrafterConfig, target) -> tuple[float, float]:
    """The scale of the target's embedding that a drafter wants, and the one it has; alike where nothing is known."""
    embed = target.get_input_embeddings()
    scale = embedding_scale(embed)
    wanted = config.input_embedding_scale
    if wanted is None or (isinstance(scale, Tensor) and scale.is_meta) or math.isclose(wanted, scale, rel_tol=0.01):
        return 1.0, 1.0
    return wanted, float(scale)


def _wrong_tokens(role: str, config: D2SDDrafterConfig, tokenizer) -> Iterator[Misfit]:
    if config.mask_token_id is None:
        yield Misfit(
            "mask token",
            f"The {role} drafter's config has no mask_token_id: set it to the token it was trained with.",
        )
    if tokenizer is not None and config.tokenizer_fingerprint is not None:
        *before, seen = _fingerprints(tokenizer)
        if config.tokenizer_fingerprint not in (seen, *before):
            yield Misfit(
                "tokenizer",
                f"The tokenizer passed to generate has fingerprint {seen}, the {role} drafter was trained with "
                f"{config.tokenizer_fingerprint}: the same ids would mean other words.",
            )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that differ for tokenizers whose vocabularies differ in any token or id."""
    return _fingerprints(tokenizer)[-1]


def _fingerprints(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the fingerprint was before each of the latest tokens was added, in the order of their ids; its own last."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    kept = max(len(entries) - max(len(entries) // 10, _GROWTH), 0)
    whole = hashlib.sha256(f"[{', '.join(map(repr, entries[:kept]))}".encode())
    found = []
    for at in range(kept, len(entries)):
        whole.update((", " if at else "").encode() + repr(entries[at]).encode())
        closed = whole.copy()
        closed.update(b"]")
        found.append(closed.hexdigest()[:16])
    return found or [hashlib.sha256(b"[]").hexdigest()[:16]]
