"""One call of `generate`: what decoding works on is made from its arguments, and what it returns from the outcome."""

import functools
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from .cache import TreeCache, check_supported, is_recurrent, save_contexts, saved_contexts
from .choosing import Choosers, Record
from .compat import (
    CACHE_NAME,
    GenerateDecoderOnlyOutput,
    is_users_cache,
    layers_read_once,
    own_cache_class,
    pad_token,
)
from .context import ContextSource
from .costs import Place, Stopwatch, context_of, costs_of, guess
from .decoding import Batch, decode
from .drafting import DraftContext, Drafter
from .followers import Followers
from .graphs import cycles_of
from .modeling import D2SDAssistant
from .observing import Observer
from .options import MOST_NODES, DecodingOptions, settle
from .paying import Pace, manner_of, purse_out_of
from .probing import attention_for
from .prompts import Prompt, join_records, join_sequences, read_prompt, texts_of
from .stats import D2SDStats
from .target import Target


@layers_read_once()
def assisted_decode(
    assistant: D2SDAssistant,
    target,
    input_ids: Tensor,
    logits_processor,
    stopping_criteria,
    generation_config: GenerationConfig,
    **kwargs,
):
    """Decode with both drafters; takes and returns what `GenerationMixin._assisted_decoding` does.

    A cache of the user's is changed only at the end: an error on the way leaves it as it was.

    Raises:
        ValueError: for an option out of range, a cache of another kind, or what a batch cannot have.
    """
    streamer, user_cache, model_kwargs = _sorted_out(kwargs)
    if user_cache is None and (own := own_cache_class(target.config)) is not None:
        user_cache = own()
    check_supported(target.config, user_cache)
    recurrent = is_recurrent(target.config)
    prompt = read_prompt(input_ids, user_cache, generation_config, model_kwargs, pads_left=recurrent)
    if streamer is not None and prompt.rows > 1:
        raise ValueError(f"A streamer takes one sequence, got a batch of {prompt.rows}: drop `streamer`.")
    options = settle(assistant, generation_config)
    returns_cache = _is_cache_seen(prompt, generation_config, user_cache)
    sampling = logits_processor, stopping_criteria, bool(generation_config.do_sample)
    choosers = Choosers(input_ids, *sampling, lambda: _empty_record(generation_config))
    models = assistant.drafters if options.redrafts else assistant.drafters[:1]
    worker = _open_target(target, models, prompt, generation_config, user_cache, returns_cache)
    drafters = _open_drafters(assistant, models, worker, user_cache, options)
    assistant.last_stats = stats = D2SDStats(prompt_tokens=sum(prompt.counts), trace=[] if options.trace else None)
    observer = Observer(stats, streamer)
    if recurrent:
        _check_recurrent(options.compile, choosers, returns_cache)
    chunk_size = generation_config.prefill_chunk_size
    passes = worker.prefill(prompt.input_ids, prompt.width, chunk_size, prompt.counts, **prompt.model_kwargs)
    batch = _open_batch(worker, drafters, choosers, options, texts_of(input_ids, prompt.mask))
    batch.manner = manner_of(generation_config.do_sample, generation_config.temperature)
    with _deciding(assistant, batch, stats):
        decode(batch, passes, observer, cycles_of(assistant, batch))
    observer.end()
    stats.attention_backend = str(worker.attention)  # what was measured on the way included
    choosers.cut()
    output = _join_output(worker if returns_cache else None, prompt, choosers, generation_config, user_cache)
    if prompt.rows == 1:
        save_contexts(user_cache, (weakref.ref(assistant), [drafter.context for drafter in drafters]))
    return output


def _check_recurrent(compiles: bool, choosers: Choosers, returns_cache: bool) -> None:
    """Refuse what a target with recurrent states does not have."""
    reasons = {
        "d2sd_compile asks for passes of one shape, which trees cut into chains do not have": compiles,
        "a stopping criterion of the whole batch may hold for a row's earlier token, to which the returned cache "
        "cannot go back: leave return_dict_in_generate off": returns_cache and choosers.may_go_beyond,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"The target has recurrent states, and {reason}.")


def _sorted_out(kwargs: dict) -> tuple:
    """The streamer, the user's cache, and what is left for the model."""
    streamer, user_cache = kwargs.pop("streamer", None), kwargs.pop(CACHE_NAME, None)
    for name in ("synced_gpus", "inputs_tensor", "tokenizer", "assistant_tokenizer", "output_hidden_states"):
        kwargs.pop(name, None)
    return streamer, user_cache, kwargs


def _open_drafters(
    assistant: D2SDAssistant, models: list, worker: Target, user_cache, options: DecodingOptions
) -> list[Drafter]:
    contexts = _resume_contexts(assistant, user_cache, worker.positions)
    backend = options.attention_backend
    return [Drafter(model, worker.model, context, backend) for model, context in zip(models, contexts)]


def _open_batch(
    worker: Target, drafters: list[Drafter], choosers: Choosers, options: DecodingOptions, texts: list[list[int]]
) -> Batch:
    """The rows of a call, with what reads their texts so far."""
    context = ContextSource(texts) if options.context_nodes else None
    followers = Followers.wanted(texts, drafters, options, worker.device)
    return Batch(worker, drafters, choosers, options, context=context, followers=followers)


@contextmanager
def _deciding(assistant: D2SDAssistant, batch: Batch, stats: D2SDStats) -> Iterator[None]:
    """While a call decodes: where its options leave it open, give it what decides, and what that may lose."""
    if not batch.options.auto:
        yield
        return
    rooms = batch.choosers.rooms
    with purse_out_of(costs_of(assistant).savings, math.inf if rooms is None else max(rooms)) as batch.purse:
        if not batch.options.compile:  # recorded shapes have a pace of their own
            batch.pace = _open_pace(assistant, batch)
            stats.decisions = batch.pace.decisions
        yield


def _open_pace(assistant: D2SDAssistant, batch: Batch) -> Pace:
    """What decides in each cycle, with what earlier calls measured."""
    worker, options = batch.target, batch.options
    costs, networks = costs_of(assistant), [drafter.model for drafter in batch.drafters]

    @functools.cache
    def table_for(rows: int, context: int):
        place = Place.of(worker.model, worker.device, rows, context)
        return costs.at(place, lambda: guess(place, worker.model, networks))

    def table_at(rows: int, length: int):
        return table_for(rows, context_of(length))

    branches = options.num_branches if options.redrafts else 0
    nodes = options.tree_budget or MOST_NODES
    return Pace(table_at, Stopwatch(worker.device), branches, nodes, batch.manner, batch.purse)


def _is_cache_seen(prompt: Prompt, generation_config: GenerationConfig, user_cache) -> bool:
    """Of a batch the cache is put together only if somebody will see it."""
    given = is_users_cache(user_cache)
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
        backend=attention_for(target, generation_config.d2sd_attention_backend),
        keeps_left_rows=keeps_left_rows,
    )


def _join_output(
    worker: Target | None, prompt: Prompt, choosers: Choosers, generation_config: GenerationConfig, user_cache
) -> Tensor | GenerateDecoderOnlyOutput:
    """What plain `generate` would return: (B, L) tokens, or all that `return_dict_in_generate` asks for.

    Args:
        worker: whose cache goes back to the user; `None` if nobody will see it.
    """
    sequences = join_sequences(choosers, pad_token(generation_config))
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
            worker.append(pad_sequence(behind, batch_first=True), missing)
    worker.cache.give_back(user_cache, prompt.columns_after(max(generated)))


def _empty_record(config: GenerationConfig) -> Record:
    """With an empty tuple for everything that `return_dict_in_generate` shall return."""
    wanted = {
        "scores": config.output_scores,
        "logits": config.output_logits,
        "hidden_states": config.output_hidden_states,
    }
    return Record(**{name: () for name, on in wanted.items() if on and config.return_dict_in_generate})


def _resume_contexts(assistant: D2SDAssistant, cache, positions: list[int]) -> list[DraftContext | None]:
    """For each drafter, what it knows of the tokens in a cache that an earlier call returned; `None`: nothing."""
    owner, contexts = saved_contexts(cache) or (None, [])
    if owner is None or owner() is not assistant or len(positions) > 1:
        contexts = []
    for context in contexts:
        context.cut(positions[0])
    return [*contexts, None, None][:2]
