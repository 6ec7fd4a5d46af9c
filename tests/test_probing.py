"""A small tree is tried once for each target: what cannot verify trees is refused by name before anything runs."""

import copy

import pytest
import torch
import transformers as tf
from tiny import _SIZES, OracleDrafts, prompt, tiny_assistant, tiny_target

from hf_d2sd import probing
from hf_d2sd.modeling import CACHE_NAME


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(probing, "_known", {})
    monkeypatch.setattr(probing, "_seen", type(probing._seen)())


class CountsByCache(tf.LlamaForCausalLM):
    """Positions are those of the cache, whatever the caller says."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids, position_ids=None, **kwargs)


class MixesTokens(tf.LlamaForCausalLM):
    """The tokens of a pass bear on each other, as where experts have room for so many of them."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits + 0.5 * output.logits.roll(1, dims=1)
        return output


class KeepsNoCache(tf.LlamaForCausalLM):
    def forward(self, input_ids=None, use_cache=None, **kwargs):
        kwargs.pop(CACHE_NAME, None)
        return super().forward(input_ids, use_cache=False, **kwargs)


class WantsFlatMasks(tf.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is not None:
            rows, columns = attention_mask.shape
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


def tiny(model_class, dtype=torch.float32, **changes):
    torch.manual_seed(5)
    model = model_class(tf.LlamaConfig(**{**_SIZES, **changes})).to(dtype).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def decode(model, **options):
    return model.generate(prompt(), assistant_model=tiny_assistant(), do_sample=False, max_new_tokens=8, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [CountsByCache, MixesTokens, KeepsNoCache, WantsFlatMasks])
def test_a_target_that_cannot_verify_a_tree_is_refused_by_name(kind, dtype):
    model, lengths = tiny(kind, dtype), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot verify a tree.*Generate without assistant_model"):
        decode(model)
    assert prompt().shape[1] not in lengths, "the prompt was run"
    assert len(model.generate(prompt(), do_sample=False, max_new_tokens=3)[0]) == prompt().shape[1] + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_a_fault(dtype):
    for family in ("llama", "gpt_oss", "qwen3_moe"):
        probing.attention_for(copy.deepcopy(tiny_target(family)).to(dtype))
    probing.attention_for(tiny(tf.LlamaForCausalLM, dtype, num_hidden_layers=12))


def test_two_small_forwards_are_all_and_only_once():
    model, sizes = tiny(tf.LlamaForCausalLM), []
    hook = lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
    model.register_forward_pre_hook(hook, with_kwargs=True)
    decode(model)
    assert sizes[:3] == [(2, 5), (1, 5), (1, prompt().shape[1])]
    first, sizes[:] = len(sizes), []
    decode(model)
    assert len(sizes) == first - 2
    twin, sizes[:] = tiny(tf.LlamaForCausalLM), []
    twin.register_forward_pre_hook(hook, with_kwargs=True)
    decode(twin)
    assert len(sizes) == first - 2, "one of the same class and configuration is known"


def test_nothing_of_the_model_and_of_the_generator_changes():
    model = tiny(tf.LlamaForCausalLM)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    names = set(vars(model))
    probing.attention_for(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert set(vars(model)) == names
    assert torch.equal(torch.get_rng_state(), state)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_reads_its_mask_itself_gets_one():
    torch.manual_seed(0)
    model = tf.DogeForCausalLM(tf.DogeConfig(**_SIZES, keep_window_size=6)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    assert probing.attention_for(model).backend == "sdpa"
    assert "DogeForCausalLM reads its mask itself" in str(probing.attention_for(model))
    with pytest.raises(ValueError, match="DogeForCausalLM cannot verify a tree"):
        probing.attention_for(model, "cpu")  # it was asked for


def test_experts_whose_choice_depends_on_the_whole_pass_are_refused():
    torch.manual_seed(0)
    model = tf.DogeForCausalLM(tf.DogeConfig(**_SIZES, is_moe=True, num_experts=16, num_experts_per_tok=2)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    with pytest.raises(ValueError, match="DogeForCausalLM cannot verify a tree.*bear on each other"):
        decode(model)


def test_words_that_a_configuration_gives_a_meaning_are_not_tried():
    model = tiny(tf.LlamaForCausalLM, bos_token_id=7, eos_token_id=[9, 11], pad_token_id=13)
    assert not {7, 9, 11, 13} & set(probing._tokens(model, 7).tolist())
    assert len(set(probing._tokens(model, 7).tolist())) == 7


def test_a_cache_of_shared_layers_comes_back_as_plain_decoding_leaves_it(monkeypatch):
    targets = pytest.importorskip("test_targets").targets
    model = targets.tiny_target("gemma4_text")
    pair, ids = targets._pair_for(model), prompt(14)
    options = dict(do_sample=False, max_new_tokens=12, return_dict_in_generate=True, pad_token_id=0)
    plain = model.generate(ids, **options)
    OracleDrafts(monkeypatch, plain.sequences[0], 0.8)
    ours = model.generate(ids, assistant_model=pair, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    caches = [getattr(output, CACHE_NAME) for output in (plain, ours)]
    assert len(caches[0].layers) == len(caches[1].layers)
    for stock, layer in zip(*(cache.layers for cache in caches)):
        assert type(stock) is type(layer)
        if stock.keys is not None:
            torch.testing.assert_close(layer.keys, stock.keys, rtol=1e-3, atol=1e-4)
    more = torch.cat([plain.sequences, prompt(3)], dim=1)
    again = model.generate(more, **{CACHE_NAME: caches[0]}, **options).sequences
    with monkeypatch.context() as patch:
        OracleDrafts(patch, again[0], 0.8)
        turn = model.generate(more, **{CACHE_NAME: caches[1]}, assistant_model=pair, **options).sequences
    assert turn.tolist() == again.tolist()
