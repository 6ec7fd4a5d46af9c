"""All that knows Transformers' `generate`: how an assistant is recognised, checked, and decoded with."""

import functools
import hashlib
import weakref

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.utils import GenerationMixin

from .cache import TreeCache, check_supported, save_contexts, saved_contexts
from .choosing import Chooser, Record
from .decoding import DecodingOptions, decode
from .drafting import DraftContext, Drafter
from .modeling import CACHE_NAME, D2SDAssistant, D2SDDrafterModel
from .stats import D2SDStats
from .target import Target

_OPTIONS = ("d2sd_num_branches", "d2sd_tree_budget", "d2sd_block_size")
_PLAIN_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)


def install() -> None:
    """Teach `GenerationMixin` to decode with a `D2SDAssistant`. Every other assistant takes the stock way."""
    for name in _OPTIONS:  # as class attributes they are accepted by `generate(...)` and stay out of saved configs
        if not hasattr(GenerationConfig, name):
            setattr(GenerationConfig, name, None)
    _wrap(GenerationConfig, "get_generation_mode", _get_generation_mode)
    _wrap(GenerationMixin, "_validate_generation_mode", _validate_generation_mode)
    _wrap(GenerationMixin, "_assisted_decoding", _dispatch)


def _wrap(owner: type, name: str, wrapper) -> None:
    """Replace a method by `wrapper(stock, ...)`, once, keeping the stock signature."""
    stock = getattr(owner, name)
    if getattr(stock, "_hf_d2sd_wrapped", False):
        return

    @functools.wraps(stock)
    def wrapped(self, *args, **kwargs):
        return wrapper(stock, self, *args, **kwargs)

    wrapped._hf_d2sd_wrapped = True
    setattr(owner, name, wrapped)


def _is_ours(assistant) -> bool:
    """By name, not by class: an assistant loaded as the Hub's remote code is another class of the same name."""
    return hasattr(type(assistant), "_d2sd_assisted_decode")


def _dispatch(stock, target, input_ids, *args, assistant_model=None, **kwargs):
    if not _is_ours(assistant_model):
        return stock(target, input_ids, *args, assistant_model=assistant_model, **kwargs)
    return assistant_model._d2sd_assisted_decode(target, input_ids, *args, **kwargs)


def _get_generation_mode(stock, config: GenerationConfig, assistant_model=None):
    """Stock only warns, and drops the assistant, where the settings ask for beams and the like."""
    if _is_ours(assistant_model):
        mode = stock(config)
        if mode not in _PLAIN_MODES:
            _refuse([f"the settings ask for {mode.value}"])
    return stock(config, assistant_model)


def _validate_generation_mode(stock, target, generation_mode, generation_config, generation_mode_kwargs):
    assistant = generation_mode_kwargs.get("assistant_model")
    if _is_ours(assistant):
        _refuse(_unsupported(target, generation_config, generation_mode_kwargs))
        bind(assistant, target, generation_mode_kwargs.get("tokenizer"))
    elif isinstance(assistant, D2SDDrafterModel) and generation_config.speculation_type != "dflash":
        raise ValueError(
            "A single D2SDDrafterModel was passed as assistant_model. Pass `D2SDAssistant.from_drafters(drafter)`, "
            "or add `speculation_type='dflash'` for Transformers' own decoding."
        )
    return stock(target, generation_mode, generation_config, generation_mode_kwargs)


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError(
            "D²SD decoding is greedy search or sampling of one sequence by a decoder with a key-value cache; here "
            f"{'; '.join(reasons)}. Change that, or call generate without assistant_model."
        )


def _unsupported(target, config: GenerationConfig, mode_kwargs: dict) -> list[str]:
    """What stands in the way, in words; empty if nothing does."""
    name = type(target).__name__
    reasons = {
        f"{name} is an encoder-decoder model": target.config.is_encoder_decoder,
        f"{name} has a recurrent state, which cannot return to an accepted prefix": target._is_stateful,
        f"num_return_sequences is {config.num_return_sequences}": (config.num_return_sequences or 1) > 1,
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
        "assistant_tokenizer was passed, and drafters share the target's tokenizer": (
            "assistant_tokenizer" in mode_kwargs
        ),
    }
    return [reason for reason, holds in reasons.items() if holds]


def bind(assistant: D2SDAssistant, target, tokenizer=None) -> None:
    """Check that drafters were made for this target.

    Args:
        tokenizer: the target's, where known; compared with the drafters' `tokenizer_fingerprint`.

    Raises:
        ValueError: naming both values, for a mismatch of vocabulary, width, layers, special tokens or tokenizer, and
            for a missing mask token.
    """
    text = target.config.get_text_config(decoder=True)
    for role in ("first", "second"):
        drafter = getattr(assistant, role)
        if drafter is None:
            continue
        config = drafter.config
        expected = {
            "vocab_size": (config.vocab_size, text.vocab_size),
            "target_hidden_size": (config.target_hidden_size, text.hidden_size),
            "hidden_size": (config.hidden_size, text.hidden_size),
            "num_target_layers": (config.num_target_layers or text.num_hidden_layers, text.num_hidden_layers),
        }
        for name, (seen, wanted) in expected.items():
            if seen != wanted:
                raise ValueError(
                    f"The {role} drafter does not fit {type(target).__name__}: its {name} is {seen}, the target's "
                    f"is {wanted}. Use drafters that were trained for this target."
                )
        if max(config.target_layer_ids) >= text.num_hidden_layers:
            raise ValueError(
                f"The {role} drafter reads target layers {config.target_layer_ids}, but the target has "
                f"{text.num_hidden_layers} layers (ids 0 to {text.num_hidden_layers - 1})."
            )
        if config.mask_token_id is None:
            raise ValueError(
                f"The {role} drafter's config has no mask_token_id: set it to the token it was trained with."
            )
        if tokenizer is not None and config.tokenizer_fingerprint is not None:
            seen = tokenizer_fingerprint(tokenizer)
            if seen != config.tokenizer_fingerprint:
                raise ValueError(
                    f"The tokenizer passed to generate has fingerprint {seen}, the {role} drafter was trained with "
                    f"{config.tokenizer_fingerprint}: the same ids would mean other words."
                )


def tokenizer_fingerprint(tokenizer) -> str:
    """16 hex digits that differ for tokenizers whose vocabularies differ in any token or id."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def assisted_decode(
    assistant: D2SDAssistant,
    target,
    input_ids: Tensor,
    logits_processor,
    stopping_criteria,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer=None,
    inputs_tensor: Tensor | None = None,
    tokenizer=None,
    assistant_tokenizer=None,
    **model_kwargs,
):
    """Decode one sequence with both drafters; takes and returns what `GenerationMixin._assisted_decoding` does.

    A cache of the user's is changed only at the end: an error on the way leaves it as it was.

    Raises:
        ValueError: for a batch, padding, an option out of range, or a cache of another kind.
    """
    user_cache = model_kwargs.pop(CACHE_NAME, None)
    model_kwargs.pop("output_hidden_states", None)
    check_supported(target.config, user_cache)
    new_tokens = _count_new_tokens(input_ids, user_cache, generation_config, model_kwargs)
    options = decoding_options(assistant, generation_config)
    record = _empty_record(generation_config)
    models = assistant.drafters if options.num_branches else [assistant.first]

    layer_ids = {layer for model in models for layer in model.config.target_layer_ids}
    cache = TreeCache.take_over(target.config, user_cache)
    worker = Target(target, cache, layer_ids, all_hidden_states=record.hidden_states is not None)
    contexts = _resume_contexts(assistant, user_cache, worker.position)
    drafters = [Drafter(model, target, context) for model, context in zip(models, contexts)]
    chooser = Chooser(input_ids, logits_processor, stopping_criteria, bool(generation_config.do_sample), record)
    stats = D2SDStats(prompt_tokens=new_tokens, attention_backend=str(worker.attention))
    assistant.last_stats = stats

    def emit(tokens: list[int]) -> None:
        if streamer is not None:
            streamer.put(torch.tensor(tokens))

    prompt_passes = worker.prefill(input_ids, new_tokens, generation_config.prefill_chunk_size, **model_kwargs)
    decode(worker, drafters, chooser, options, stats, prompt_passes, emit)
    if streamer is not None:
        streamer.end()
    cache.give_back(user_cache)
    save_contexts(user_cache, (weakref.ref(assistant), [drafter.context for drafter in drafters]))
    if not generation_config.return_dict_in_generate:
        return chooser.sequence.clone()
    return GenerateDecoderOnlyOutput(sequences=chooser.sequence.clone(), **{CACHE_NAME: user_cache}, **vars(record))


def _empty_record(config: GenerationConfig) -> Record:
    """With an empty tuple for everything that `return_dict_in_generate` shall return."""
    wanted = {
        "scores": config.output_scores,
        "logits": config.output_logits,
        "hidden_states": config.output_hidden_states,
    }
    return Record(**{name: () for name, on in wanted.items() if on and config.return_dict_in_generate})


def _count_new_tokens(input_ids: Tensor, cache, generation_config: GenerationConfig, model_kwargs: dict) -> int:
    """How many tokens of the prompt are not in the cache yet; refuses batches and padding."""
    embeds = model_kwargs.get("inputs_embeds")
    prompt = input_ids if embeds is None else embeds
    if prompt.shape[0] > 1:
        raise ValueError(
            f"D²SD decoding takes one sequence at a time for now; got a batch of {prompt.shape[0]}. Call generate "
            "once for each prompt, or without assistant_model."
        )
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError(
            "D²SD decoding takes prompts without padding for now; the attention_mask has zeros. Pass the prompt "
            "without its padding, or call generate without assistant_model."
        )
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.ndim != 2:
        raise ValueError(
            f"D²SD decoding takes position_ids of shape (1, length); this target uses {positions.ndim} dimensions "
            "(multimodal rotary positions). Call generate without assistant_model."
        )
    past = cache.get_seq_length()
    length = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", -1)
    whole = embeds is not None or length == prompt.shape[1]  # else only what follows the cached tokens was passed
    new_tokens = prompt.shape[1] - past if whole else prompt.shape[1]
    if new_tokens < 1:
        raise ValueError(
            f"{CACHE_NAME} already holds {past} tokens and the prompt has {prompt.shape[1]}: at least one token "
            f"must be new. Crop the cache by one token: `{CACHE_NAME}.crop(-1)`."
        )
    divisible = ("attention_mask", "position_ids", "token_type_ids", "inputs_embeds")
    extra = sorted(
        name
        for name, value in model_kwargs.items()
        if name not in divisible and not isinstance(value, (type(None), bool, int, float, str))
    )
    chunk_size = generation_config.prefill_chunk_size
    if extra and chunk_size is not None and chunk_size < new_tokens:
        raise ValueError(f"prefill_chunk_size={chunk_size} would split the inputs {extra}; leave it unset.")
    return new_tokens


def decoding_options(assistant: D2SDAssistant, generation_config: GenerationConfig) -> DecodingOptions:
    """The call's options where given, else the assistant's.

    Raises:
        ValueError: for values out of range, or branches without a second drafter.
    """
    config = assistant.config
    first, second = config.first.block_size, config.second.block_size if config.second is not None else None
    num_branches, tree_budget, block_size = (getattr(generation_config, name, None) for name in _OPTIONS)
    options = DecodingOptions(
        num_branches=config.num_branches if num_branches is None else num_branches,
        tree_budget=config.tree_budget if tree_budget is None else tree_budget,
        block_size=first if block_size is None else block_size,
        second_block_size=(second or first) - (first - block_size if block_size is not None else 0),
    )
    if options.block_size > first:
        raise ValueError(f"d2sd_block_size is {options.block_size}; the first drafter was made for at most {first}.")
    if options.num_branches and assistant.second is None:
        raise ValueError(
            f"d2sd_num_branches is {options.num_branches}, but the assistant has no second drafter. Set it to 0, or "
            "load a pair: D2SDAssistant.from_drafters(first, second)."
        )
    return options


def _resume_contexts(assistant: D2SDAssistant, cache, position: int) -> list[DraftContext | None]:
    """For each drafter, what it knows of the tokens in a cache that an earlier call returned; `None`: nothing."""
    owner, contexts = saved_contexts(cache) or (None, [])
    if owner is None or owner() is not assistant:
        contexts = []
    for context in contexts:
        context.cut(position)
    return [*contexts, None, None][:2]


install()
