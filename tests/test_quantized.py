"""Quantized targets: D²SD writes what the same quantized target writes alone, drafting with its quantized head."""

import functools

import pytest
import torch
import transformers as tf
from tiny import OracleDrafts, prompt, tiny_drafter

from hf_d2sd import D2SDAssistant
from hf_d2sd.drafting import Drafter
from hf_d2sd.target import TargetPass

WIDTH = VOCAB = 64  # packed formats want multiples of their blocks
OPTIONS = dict(do_sample=False, max_new_tokens=20)
PRUNED = [19, 2, 3, 55, 8, 13, 42, 30]


@functools.cache
def full_precision():
    torch.manual_seed(2)
    config = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    return tf.LlamaForCausalLM(config).eval()


def torchao_int8():
    """Weights become a tensor subclass; the modules stay `nn.Linear`."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return tf.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[])


def quanto_int8():
    """Modules become a subclass of `nn.Linear`."""
    pytest.importorskip("optimum.quanto")
    return tf.QuantoConfig(weights="int8", modules_to_not_convert=[])


def bitsandbytes_nf4():
    """Weights become packed rows of bytes: only a call makes logits of them."""
    pytest.importorskip("bitsandbytes")
    return tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["none"],
    )


@pytest.fixture(scope="module", params=[torchao_int8, quanto_int8, bitsandbytes_nf4])
def quantized(request, tmp_path_factory):
    config = request.param()
    folder = tmp_path_factory.mktemp("target")
    full_precision().save_pretrained(folder)
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).eval()


def drafter_of(seed: int = 0, pruned: bool = False):
    sizes = dict(vocab_size=VOCAB, hidden_size=WIDTH, draft_vocab_size=len(PRUNED) if pruned else None)
    model = tiny_drafter(5, seed=seed, **sizes)
    if pruned:
        model.draft_token_ids.copy_(torch.tensor(PRUNED))
    return model


@functools.cache
def pair_of(pruned: bool):
    return D2SDAssistant.from_drafters(drafter_of(0, pruned), drafter_of(1, pruned))


@torch.no_grad()
def test_the_target_is_quantized_head_included(quantized):
    """Else the tests here test nothing."""
    hidden = torch.randn(1, WIDTH)
    for module in ("lm_head", "model.layers.2.mlp.up_proj"):
        one, other = (model.get_submodule(module)(hidden) for model in (quantized, full_precision()))
        assert (one - other).abs().max() > 1e-3, module


@pytest.mark.parametrize("accuracy", [None, 0.7])
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_greedy_equals_plain_generate_of_the_quantized_target(quantized, pruned, accuracy, monkeypatch):
    pair, cycles = pair_of(pruned), 0
    for seed in range(3):
        plain = quantized.generate(prompt(9 + seed, seed), **OPTIONS)
        with monkeypatch.context() as patch:
            if accuracy is not None:
                OracleDrafts(patch, plain[0], accuracy, seed=seed)
            ours = quantized.generate(prompt(9 + seed, seed), assistant_model=pair, **OPTIONS)
        assert ours.tolist() == plain.tolist(), seed
        cycles += pair.last_stats.cycles
    assert accuracy is None or cycles < 3 * 14, "paths of several tokens must be accepted"


@torch.no_grad()
def test_a_pruned_vocabulary_drafts_with_the_quantized_heads_rows(quantized):
    """The most probable of the listed tokens by the whole quantized head, which reads the drafter's hidden states."""
    hidden_states = tuple(torch.randn(1, 12, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(5))
    for seed in range(4):
        model = drafter_of(seed, pruned=True)
        drafter = Drafter(model, quantized)
        drafter.extend(TargetPass(torch.empty(0), hidden_states), [12])
        draft = drafter.draft(torch.tensor([6]), 5)
        block = torch.tensor([[6] + [model.config.mask_token_id] * 4])
        features = torch.cat([hidden_states[i + 1] for i in model.config.target_layer_ids], dim=-1)
        hidden = model(quantized.get_input_embeddings()(block), features).last_hidden_state[:, 1:]
        share = quantized.lm_head(hidden)[..., PRUNED].softmax(-1)
        assert set(draft.best[0, 0].tolist()) <= set(PRUNED)
        chosen = torch.tensor([[PRUNED.index(token) for token in draft.best[0, 0]]])
        # Near enough: a format may compute one row for another batch of rows with other rounding.
        torch.testing.assert_close(share.gather(-1, chosen[..., None])[..., 0], share.amax(-1), atol=0.02, rtol=0.02)
        torch.testing.assert_close(draft.best_confidence[0], share.amax(-1), atol=0.02, rtol=0.02)
