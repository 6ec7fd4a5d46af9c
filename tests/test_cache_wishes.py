"""A cache asked for in the target's own generation config, or in a call: what is served, and what is refused."""

import copy

import pytest
import torch
from tiny import prompt, tiny_assistant, tiny_target
from transformers import DynamicCache, GenerationConfig

from hf_d2sd import binding
from hf_d2sd.compat import CACHE_NAME

OPTIONS = dict(do_sample=False, max_new_tokens=12)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is said once is said each time here, so that the order of tests does not matter."""
    words: list[str] = []
    monkeypatch.setattr(binding.logger, "warning_once", words.append)
    return words


def wishing(cache_implementation: str):
    target = copy.deepcopy(tiny_target())
    target.generation_config.cache_implementation = cache_implementation
    return target


@pytest.mark.parametrize("rows", [1, 2])
def test_a_static_one_of_the_targets_own_gives_way_to_ours_and_it_says_so(said, rows):
    target, inputs = wishing("static"), torch.cat([prompt(9, seed) for seed in range(rows)])
    out = target.generate(inputs, assistant_model=tiny_assistant(4, 6), return_dict_in_generate=True, **OPTIONS)
    assert out.sequences.tolist() == tiny_target().generate(inputs, **OPTIONS).tolist()
    assert type(out[CACHE_NAME]) is DynamicCache
    assert len(said) == 1 and "cache_implementation='static'" in said[0] and "assistant.compile()" in said[0]
    assert target.generation_config.cache_implementation == "static", "the target's own config is as it was"


def test_plain_calls_of_that_target_get_the_static_cache_still(said):
    target = wishing("static")
    target.generate(prompt(), assistant_model=tiny_assistant(4, 6), **OPTIONS)
    out = target.generate(prompt(), return_dict_in_generate=True, **OPTIONS)
    assert type(out[CACHE_NAME]).__name__ == "StaticCache" and len(said) == 1


def test_it_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(binding.logger, "propagate", True)
    monkeypatch.setattr(binding.logger.parent, "propagate", True)
    target = wishing("static")
    type(binding.logger).warning_once.cache_clear()
    for _ in range(2):
        target.generate(prompt(), assistant_model=tiny_assistant(4, 6), **OPTIONS)
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1


def test_one_that_a_call_asks_for_is_refused(said):
    for asked in (
        dict(cache_implementation="static"),
        dict(generation_config=GenerationConfig(cache_implementation="static")),
    ):
        with pytest.raises(ValueError, match="got StaticCache. Drop `cache_implementation`"):
            tiny_target().generate(prompt(), assistant_model=tiny_assistant(4, 6), **asked)
    assert not said


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA says")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "quantized"])
@pytest.mark.parametrize("of_the_call", [True, False])
def test_a_wish_for_less_memory_is_refused_before_the_target_runs(kind, of_the_call, said, monkeypatch):
    """The tree's cache would not keep it. Plain decoding fails on the way there, with no word of the cache."""
    target = copy.deepcopy(tiny_target()) if of_the_call else wishing(kind)
    asked = dict(cache_implementation=kind) if of_the_call else {}
    monkeypatch.setattr(target, "forward", lambda *args, **kwargs: pytest.fail("the target ran"))
    with pytest.raises(ValueError, match=f"cache_implementation is '{kind}'.*generation_config.cache_implementation"):
        target.generate(prompt(), assistant_model=tiny_assistant(4, 6), **asked, **OPTIONS)
    assert not said
