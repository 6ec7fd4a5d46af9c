"""All that knows Transformers' `generate`: how an assistant is recognised, checked, and decoded with."""

import copy
import functools
import hashlib
import math
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.utils import GenerationMixin

from .cache import TreeCache, check_supported, save_contexts, saved_contexts
from .choosing import Choosers, Record
from .decoding import DecodingOptions, decode
from .drafting import DraftContext, Drafter
from .modeling import CACHE_NAME, D2SDAssistant, D2SDDrafterConfig, D2SDDrafterModel
from .prompts import Prompt, join_records, join_sequences, read_prompt
from .stats import D2SDStats
from .target import Target

_OPTIONS = (
    "d2sd_num_branches",
    "d2sd_tree_budget",
    "d2sd_tree_width",
    "d2sd_levels",
    "d2sd_block_size",
    "d2sd_branch_source",
    "d2sd_attention_backend",
    "d2sd_compile",
    "d2sd_trace",
)
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

    vars(wrapped)["_hf_d2sd_wrapped"] = True
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
        if assistant.config.vocab_size is None:  # stock compares it with the target's
            assistant.config.vocab_size = target.config.get_text_config(decoder=True).vocab_size
        generation_config = copy.copy(generation_config)
        generation_config.num_return_sequences = 1  # stock takes one in assisted decoding
    elif isinstance(assistant, D2SDDrafterModel) and generation_config.speculation_type != "dflash":
        raise ValueError(
            "A single D2SDDrafterModel was passed as assistant_model. Pass `D2SDAssistant.from_drafters(drafter)`, "
            "or add `speculation_type='dflash'` for Transformers' own decoding."
        )
    return stock(target, generation_mode, generation_config, generation_mode_kwargs)


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError(
            "D²SD decoding is greedy search or sampling by a decoder with a key-value cache; here "
            f"{'; '.join(reasons)}. Change that, or call generate without assistant_model."
        )


def _unsupported(target, config: GenerationConfig, mode_kwargs: dict) -> list[str]:
    """What stands in the way, in words; empty if nothing does."""
    name = type(target).__name__
    reasons = {
        f"{name} is an encoder-decoder model": target.config.is_encoder_decoder,
        f"{name} has a recurrent state, which cannot return to an accepted prefix": target._is_stateful,
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
    layers = text.num_hidden_layers
    expected = (
        ("vocabulary", "vocab_size", config.vocab_size or text.vocab_size, text.vocab_size),
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
    scale = getattr(embed, "scalar_embed_scale", getattr(embed, "embed_scale", 1.0))
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
        seen = tokenizer_fingerprint(tokenizer)
        if seen != config.tokenizer_fingerprint:
            yield Misfit(
                "tokenizer",
                f"The tokenizer passed to generate has fingerprint {seen}, the {role} drafter was trained with "
                f"{config.tokenizer_fingerprint}: the same ids would mean other words.",
            )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
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
    """Decode with both drafters; takes and returns what `GenerationMixin._assisted_decoding` does.

    A cache of the user's is changed only at the end: an error on the way leaves it as it was.

    Raises:
        ValueError: for an option out of range, a cache of another kind, or what a batch cannot have.
    """
    user_cache = model_kwargs.pop(CACHE_NAME, None)
    model_kwargs.pop("output_hidden_states", None)
    check_supported(target.config, user_cache)
    prompt = read_prompt(input_ids, user_cache, generation_config, model_kwargs)
    if streamer is not None and prompt.rows > 1:
        raise ValueError(f"A streamer takes one sequence, got a batch of {prompt.rows}: drop `streamer`.")
    options = decoding_options(assistant, generation_config)
    models = assistant.drafters if options.redrafts else [assistant.first]
    returns_cache = _is_cache_seen(prompt, generation_config, user_cache)
    worker = _open_target(target, models, prompt, generation_config, user_cache, returns_cache)
    contexts = _resume_contexts(assistant, user_cache, worker.positions)
    drafters = [Drafter(model, target, context, options.attention_backend) for model, context in zip(models, contexts)]
    choosers = Choosers(
        input_ids,
        logits_processor,
        stopping_criteria,
        bool(generation_config.do_sample),
        lambda: _empty_record(generation_config),
    )
    assistant.last_stats = stats = D2SDStats(
        prompt_tokens=sum(prompt.counts),
        attention_backend=str(worker.attention),
        trace=[] if generation_config.d2sd_trace else None,
    )

    def emit(tokens: list[int]) -> None:
        if streamer is not None:
            streamer.put(torch.tensor(tokens))

    chunk_size = generation_config.prefill_chunk_size
    passes = worker.prefill(prompt.input_ids, prompt.width, chunk_size, prompt.counts, **prompt.model_kwargs)
    decode(worker, drafters, choosers, options, stats, passes, emit)
    if streamer is not None:
        streamer.end()
    choosers.cut()
    output = _join_output(worker if returns_cache else None, prompt, choosers, generation_config, user_cache)
    if prompt.rows == 1:
        save_contexts(user_cache, (weakref.ref(assistant), [drafter.context for drafter in drafters]))
    return output


def _is_cache_seen(prompt: Prompt, generation_config: GenerationConfig, user_cache) -> bool:
    """Of a batch the cache is put together only if somebody will see it."""
    given = getattr(user_cache, "_is_user_defined", False)
    return prompt.rows == 1 or generation_config.return_dict_in_generate or given


def _open_target(
    target, models: list, prompt: Prompt, generation_config: GenerationConfig, user_cache, keeps_left_rows: bool
) -> Target:
    """The target over the tokens in the user's cache, keeping the hidden states that the drafters `models` read."""
    return Target(
        target,
        TreeCache.take_over(target.config, user_cache, prompt.seen),
        {layer for model in models for layer in model.config.target_layer_ids},
        prompt.rows,
        all_hidden_states=_empty_record(generation_config).hidden_states is not None,
        backend=generation_config.d2sd_attention_backend,
        keeps_left_rows=keeps_left_rows,
    )


def _join_output(
    worker: Target | None, prompt: Prompt, choosers: Choosers, generation_config: GenerationConfig, user_cache
) -> Tensor | GenerateDecoderOnlyOutput:
    """What plain `generate` would return: (B, L) tokens, or all that `return_dict_in_generate` asks for.

    Args:
        worker: whose cache goes back to the user; `None` if nobody will see it.
    """
    sequences = join_sequences(choosers, generation_config._pad_token_tensor)
    if worker is not None:
        _give_back(worker, prompt, choosers, sequences, user_cache)
    if not generation_config.return_dict_in_generate:
        return sequences
    records = join_records([chooser.record for chooser in choosers.rows], prompt)
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE_NAME: user_cache}, **vars(records))


def _give_back(worker: Target, prompt: Prompt, choosers: Choosers, sequences: Tensor, user_cache) -> None:
    """Leave in the user's cache what plain decoding would have: for rows that ended early also their padding."""
    generated = [chooser.length - choosers.prompt_length for chooser in choosers.rows]
    if prompt.rows > 1:
        worker.rejoin()
        worker.crop(prompt.lengths(generated))
        missing = [max(generated) - count for count in generated]
        if any(missing):
            behind = [row[len(row) - count - 1 : -1] for row, count in zip(sequences, missing)]
            worker.append(torch.nn.utils.rnn.pad_sequence(behind, batch_first=True), missing)
    worker.cache.give_back(user_cache, prompt.columns_after(max(generated)))


def _empty_record(config: GenerationConfig) -> Record:
    """With an empty tuple for everything that `return_dict_in_generate` shall return."""
    wanted = {
        "scores": config.output_scores,
        "logits": config.output_logits,
        "hidden_states": config.output_hidden_states,
    }
    return Record(**{name: () for name, on in wanted.items() if on and config.return_dict_in_generate})


def decoding_options(assistant: D2SDAssistant, generation_config: GenerationConfig) -> DecodingOptions:
    """The call's options where given, else the assistant's.

    Raises:
        ValueError: for values out of range, or branches without a second drafter.
    """
    config = assistant.config
    first, second = config.first.block_size, config.second.block_size if config.second is not None else None
    given = {name: getattr(generation_config, name, None) for name in _OPTIONS}

    def either(name: str, default):
        value = given[f"d2sd_{name}"]
        return default if value is None else value

    block_size = either("block_size", first)
    options = DecodingOptions(
        num_branches=either("num_branches", config.num_branches),
        tree_budget=either("tree_budget", config.tree_budget),
        block_size=block_size,
        second_block_size=(second or first) - (first - block_size),
        levels=either("levels", 2),
        tree_width=either("tree_width", config.tree_width),
        branch_source=either("branch_source", "second"),
        attention_backend=given["d2sd_attention_backend"],
        compiler=_compiler(assistant, given["d2sd_compile"]),
    )
    if options.block_size > first:
        raise ValueError(f"d2sd_block_size is {options.block_size}; the first drafter was made for at most {first}.")
    if options.redrafts and assistant.second is None:
        raise ValueError(
            f"d2sd_num_branches is {options.num_branches}, but the assistant has no second drafter. Set it to 0, or "
            "load a pair: D2SDAssistant.from_drafters(first, second)."
        )
    return options


class _Compiled(dict):
    """What was compiled of a function or module, by options. Kept with it, but never copied or saved with it."""

    def __deepcopy__(self, memo):
        return _Compiled()

    def __reduce__(self):
        return _Compiled, ()


def compile_once(options: dict, function: Callable) -> Callable:
    """A function, or a module's forward, compiled: always the same one for the same options."""
    known = vars(function).setdefault("_d2sd_compiled", _Compiled())
    key = repr(sorted(options.items()))
    if key not in known:
        known[key] = torch.compile(getattr(function, "forward", function), **options)
    return known[key]


def _compiler(assistant: D2SDAssistant, compiled: bool | None) -> Callable | None:
    """What compiles a function, once, if `d2sd_compile` or `assistant.compile()` asks for it.

    Raises:
        ValueError: if `d2sd_compile` is neither True nor False.
    """
    if compiled not in (None, True, False):
        raise ValueError(f"d2sd_compile is {compiled!r}; it must be True or False.")
    if compiled is False or (compiled is None and assistant.compile_options is None):
        return None
    return functools.partial(compile_once, {"dynamic": False, **(assistant.compile_options or {})})


def _resume_contexts(assistant: D2SDAssistant, cache, positions: list[int]) -> list[DraftContext | None]:
    """For each drafter, what it knows of the tokens in a cache that an earlier call returned; `None`: nothing."""
    owner, contexts = saved_contexts(cache) or (None, [])
    if owner is None or owner() is not assistant or len(positions) > 1:
        contexts = []
    for context in contexts:
        context.cut(positions[0])
    return [*contexts, None, None][:2]


install()
