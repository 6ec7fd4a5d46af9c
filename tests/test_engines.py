"""Engines write the same replies: a batch at a time, or in slots that are refilled."""

import pytest
import torch
import transformers as tf
from words import WORDS, save_word_target

from hf_d2sd.training.distill import DistillOptions, distill
from hf_d2sd.training.engines import Batches, Continuous, Fallback, make_engine
from hf_d2sd.training.shards import read_rows

GREEDY = dict(do_sample=False, max_new_tokens=60, eos_token_id=[0], pad_token_id=0)
PROMPTS = [[1, *range(5, 5 + length), 2] for length in (1, 7, 3, 20, 2, 5, 4, 9, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_word_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def model(folder):
    return tf.AutoModelForCausalLM.from_pretrained(folder).eval()


def lists(replies) -> list[list[int]]:
    return [reply.tolist() for reply in replies]


@pytest.mark.parametrize("name", ["auto", "batches", "continuous"])
def test_replies_are_plain_greedy_text_in_the_order_of_the_prompts(model, name):
    expected = []
    for prompt in PROMPTS:
        whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=60)
        expected.append(whole[0, len(prompt) :].tolist())
    assert len(set(map(len, expected))) > 3, "some replies end early: else no slot would be refilled"
    assert lists(make_engine(name, model, slots=3)(PROMPTS, GREEDY)) == expected


def test_what_the_checkpoint_asks_of_generate_is_done_or_refused(model):
    """Transformers would leave a repetition penalty out, or get it wrong; the fallback goes on with batches."""
    plain = lists(Batches(model)(PROMPTS, GREEDY))
    model.generation_config.repetition_penalty = 1.8
    changed = lists(Batches(model)(PROMPTS, GREEDY))
    assert changed != plain
    with pytest.raises(NotImplementedError, match="does not support RepetitionPenalty"):
        Continuous(model, 3)(PROMPTS, GREEDY)
    assert lists(Fallback(model, 3)(PROMPTS, GREEDY)) == changed


def test_sampling_is_that_of_generate(model, monkeypatch):
    """Of the likeliest 50 tokens, unless the checkpoint says otherwise; of one alone it is greedy."""
    sampled = {**GREEDY, "do_sample": True, "temperature": 1.0}
    configs, whole = [], model.generate_batch
    monkeypatch.setattr(
        model, "generate_batch", lambda *a, **k: configs.append(k["generation_config"]) or whole(*a, **k)
    )
    assert lists(Continuous(model, 3)(PROMPTS, sampled)) != lists(Batches(model)(PROMPTS, GREEDY))
    assert configs[0].top_k == 50
    model.generation_config.top_k = 1
    assert lists(Continuous(model, 3)(PROMPTS, sampled)) == lists(Batches(model)(PROMPTS, GREEDY))


def test_a_seed_decides_what_continuous_batching_samples(model):
    sampled = {**GREEDY, "do_sample": True, "temperature": 1.0}
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(lists(Continuous(model, 16)(PROMPTS, sampled)))
    assert found[0] == found[1] != found[2]


def test_where_continuous_batching_fails_batches_go_on(model, monkeypatch, caplog):
    engine, calls = Fallback(model, 3), []

    def fail(*_, **__):
        calls.append(1)
        raise NotImplementedError("no such cache")

    monkeypatch.setattr(model, "generate_batch", fail)
    expected = lists(Batches(model)(PROMPTS, GREEDY))
    assert lists(engine(PROMPTS, GREEDY)) == lists(engine(PROMPTS, GREEDY)) == expected
    assert len(calls) == 1, "tried once"
    with pytest.raises(NotImplementedError):
        Continuous(model, 3)(PROMPTS, GREEDY)


def test_replies_that_are_missing_are_an_error_and_no_short_rows(model, monkeypatch):
    whole = model.generate_batch

    def all_but_one(*args, **kwargs):
        found = whole(*args, **kwargs)
        found.popitem()
        return found

    monkeypatch.setattr(model, "generate_batch", all_but_one)
    with pytest.raises(RuntimeError, match="8 of 9 replies"):
        Continuous(model, 3)(PROMPTS, GREEDY)
    assert len(Fallback(model, 3)(PROMPTS, GREEDY)) == len(PROMPTS)


def test_the_targets_attention_is_what_it_was(folder):
    model = tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    before = lists(Batches(model)(PROMPTS, GREEDY))
    assert lists(Continuous(model, 3)(PROMPTS, GREEDY)) == before
    assert model.config._attn_implementation == "eager"
    assert lists(Batches(model)(PROMPTS, GREEDY)) == before


def test_rows_do_not_depend_on_the_engine(folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"turns": ["{a} {b}", "c"]}}\n' for a in WORDS[5:9] for b in WORDS[5:9]))
    texts = []
    for engine in ("batches", "continuous"):
        out = tmp_path / engine
        settings = dict(dtype="float32", batch_size=8, max_new_tokens=40, engine=engine, slots=3)
        distill(DistillOptions(str(folder), out, [str(path)], **settings))
        texts.append([row.tokens.tolist() for row in read_rows(out)])
    assert texts[0] == texts[1]


def test_an_engine_without_a_home(model):
    with pytest.raises(ValueError, match="auto, batches, continuous; got 'vllm'"):
        make_engine("vllm", model)
