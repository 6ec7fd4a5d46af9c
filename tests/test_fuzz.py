"""Random calls: whatever is asked of `generate`, the answer is that of plain greedy decoding, or its error."""

import functools
import types

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from test_auto import by_chance
from tiny import VOCAB, OracleDrafts, prompt, tiny_drafter, tiny_target
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from hf_d2sd import D2SDAssistant
from hf_d2sd.modeling import CACHE_NAME

FAMILIES = ("llama", "qwen3", "mistral", "gemma3_text", "gpt_oss")
TOKEN = st.integers(0, VOCAB - 1)
FLAGS = ("output_scores", "output_logits", "output_hidden_states")


def maybe(strategy):
    return st.none() | strategy


CALLS = st.fixed_dictionaries(
    dict(
        family=st.sampled_from(FAMILIES),
        length=st.integers(1, 26),
        prompt_seed=st.integers(0, 30),
        blocks=st.sampled_from([(2, 2), (4, 4), (4, 6), (3, 8), (7, 7)]),
        dtypes=st.sampled_from([("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]),
        pruned=st.booleans(),
        heads=st.booleans(),
        accuracy=maybe(st.sampled_from([0.3, 0.6, 0.8, 0.9, 1.0])),
        confidence=maybe(st.sampled_from([0.05, 0.5, 0.99])),
        warm=maybe(st.integers(1, 25)),  # tokens of the prompt that a forward pass has put in a cache before
        warm_with_config=st.booleans(),
        stop=maybe(st.tuples(st.integers(2, 9), st.integers(0, 8), st.integers(1, 30))),
        returned=maybe(st.sets(st.sampled_from(FLAGS))),
        options=st.fixed_dictionaries(
            dict(max_new_tokens=st.integers(1, 20)),
            optional=dict(
                eos_token_id=TOKEN | st.lists(TOKEN, min_size=1, max_size=4),
                min_new_tokens=st.integers(0, 12),
                min_length=st.integers(0, 30),
                repetition_penalty=st.sampled_from([0.7, 1.1, 1.6, 3.0]),
                no_repeat_ngram_size=st.integers(1, 3),
                bad_words_ids=st.lists(st.lists(TOKEN, min_size=1, max_size=3), min_size=1, max_size=4),
                suppress_tokens=st.lists(TOKEN, min_size=1, max_size=8),
                begin_suppress_tokens=st.lists(TOKEN, min_size=1, max_size=8),
                prefill_chunk_size=st.integers(1, 12),
            ),
        ),
        ours=st.fixed_dictionaries(
            {},
            optional=dict(
                d2sd_num_branches=st.integers(0, 9),
                d2sd_tree_budget=st.integers(1, 24),
                d2sd_tree_width=st.integers(1, 5),
                d2sd_block_size=st.integers(2, 8),
                d2sd_auto=st.booleans(),
            ),
        ),
    )
)


class StopAt(StoppingCriteria):
    """Ends with a token of some residue, or at a length."""

    def __init__(self, modulus: int, residue: int, extra: int, prompt_length: int):
        self.modulus, self.residue, self.limit = modulus, residue, prompt_length + extra

    def __call__(self, input_ids, scores, **kwargs):
        done = input_ids[:, -1] % self.modulus == self.residue
        return done | (input_ids.shape[1] >= self.limit)


@functools.cache
def pair(blocks, dtypes, pruned, heads) -> D2SDAssistant:
    changes = dict(draft_vocab_size=9) if pruned else {}
    changes |= dict(path_rank=4, path_candidates=5, path_text_weight=4.0) if heads else {}
    sliding = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=6)
    first, second = (
        tiny_drafter(block_size, seed, **changes, **(sliding if seed else {})).to(getattr(torch, dtype))
        for seed, (block_size, dtype) in enumerate(zip(blocks, dtypes))
    )
    for drafter in (first, second) if heads else ():
        torch.nn.init.normal_(drafter.path_head.candidate.weight, std=0.6)
    return D2SDAssistant.from_drafters(first, second)


def call(case, assistant=None):
    """What `generate` returns or raises, for a case without or with an assistant."""
    target, input_ids = tiny_target(case.family), prompt(case.length, case.prompt_seed)
    options = dict(case.options, do_sample=False, pad_token_id=0)
    if case.warm is not None and case.warm < case.length:
        cache = DynamicCache(config=target.config) if case.warm_with_config else DynamicCache()
        with torch.no_grad():
            target(input_ids[:, : case.warm], **{CACHE_NAME: cache}, use_cache=True)
        options[CACHE_NAME] = cache
    if case.stop is not None:
        options["stopping_criteria"] = StoppingCriteriaList([StopAt(*case.stop, case.length)])
    if case.returned is not None:
        options |= dict.fromkeys(case.returned, True) | dict(return_dict_in_generate=True)
    if assistant is None:
        options.pop("prefill_chunk_size", None)  # it changes nothing; stock 5.20 reads a warm prompt twice with it
    else:
        options |= dict(case.ours, assistant_model=assistant)
        if options.get("d2sd_tree_width", 1) > 1:
            options.setdefault("d2sd_tree_budget", 12)  # such a tree needs one
    try:
        return target.generate(input_ids, **options), None
    except Exception as error:
        return None, error


def check(case):
    case = types.SimpleNamespace(**case)
    expected, error = call(case)
    assistant = pair(case.blocks, case.dtypes, case.pruned, case.heads)
    with pytest.MonkeyPatch.context() as patch:
        if case.accuracy is not None and error is None:
            sequence = expected if torch.is_tensor(expected) else expected.sequences
            OracleDrafts(patch, sequence[0], case.accuracy, case.confidence, seed=case.length)
        got, our_error = call(case, assistant)

    if case.ours.get("d2sd_block_size", 0) > case.blocks[0]:
        event("refused option")
        assert isinstance(our_error, ValueError)
        assert "d2sd_block_size" in str(our_error)
        return
    if error is not None:
        event("refused by plain generate")
        assert type(our_error) is type(error), our_error
        assert str(our_error) == str(error)
        return
    if our_error is not None:
        raise our_error
    event("decoded")
    event(f"several tokens a cycle: {assistant.last_stats.mean_acceptance_length > 1.5}")
    if torch.is_tensor(expected):
        assert got.tolist() == expected.tolist()
        return
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert got[CACHE_NAME].get_seq_length() == expected[CACHE_NAME].get_seq_length()
    for name in FLAGS:
        ours, plain = (getattr(out, name.removeprefix("output_")) for out in (got, expected))
        assert (ours is None) == (plain is None) == (name not in case.returned)
        if ours is not None and name != "output_hidden_states":
            torch.testing.assert_close(torch.stack(ours), torch.stack(plain), atol=1e-3, rtol=1e-3)
        elif ours is not None and "prefill_chunk_size" not in case.options:
            assert [x[-1].shape for x in ours] == [x[-1].shape for x in plain]
            for one, other in zip(ours, plain):
                torch.testing.assert_close(one[-1], other[-1], atol=5e-3, rtol=5e-3)


def check_switching(case):
    """With cycles that are on and off by chance, in rows that are also plain now and then."""
    case = {**case, "ours": {"d2sd_auto": True, **{n: v for n, v in case["ours"].items() if n == "d2sd_tree_budget"}}}
    with pytest.MonkeyPatch.context() as patch:
        by_chance(patch, case["length"])
        check(case)


PROFILE = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True)


@settings(max_examples=150, **PROFILE)
@given(CALLS)
def test_any_call_answers_as_plain_generate_does(case):
    check(case)


@settings(max_examples=80, **PROFILE)
@given(CALLS)
def test_any_call_whose_drafts_go_on_and_off_answers_as_plain_generate_does(case):
    check_switching(case)


@pytest.mark.slow
@settings(max_examples=2000, **PROFILE)
@given(CALLS)
def test_any_of_2000_calls_whose_drafts_go_on_and_off_does(case):
    check_switching(case)


@pytest.mark.slow
@settings(max_examples=2000, **PROFILE)
@given(CALLS)
def test_any_of_2000_calls_answers_as_plain_generate_does(case):
    check(case)


BROKEN = st.sampled_from(
    [
        dict(d2sd_num_branches=-1),
        dict(d2sd_num_branches=1.5),
        dict(d2sd_num_branches=True),
        dict(d2sd_tree_budget=0),
        dict(d2sd_tree_budget="8"),
        dict(d2sd_block_size=1),
        dict(d2sd_block_size=0),
        dict(d2sd_block_size=99),
    ]
)


@settings(max_examples=24, **PROFILE)
@given(CALLS, BROKEN)
def test_an_option_out_of_range_is_named_in_the_error(case, broken):
    case = types.SimpleNamespace(**{**case, "ours": broken})
    _, error = call(case, pair(case.blocks, case.dtypes, case.pruned, case.heads))
    assert isinstance(error, ValueError)
    assert next(iter(broken)) in str(error)
