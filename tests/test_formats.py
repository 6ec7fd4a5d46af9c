"""Drafters of other libraries load with nothing of theirs run, and compute what they compute there."""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from layouts import (
    DFLASH2_KEYS,
    DFLASH_KEYS,
    LAYER_KEYS,
    SPECULATORS_KEYS,
    dflash,
    dflash2,
    dflash2_drafts,
    dflash2_weights,
    dspark,
    dspark_drafts,
    dspark_weights,
    hidden_by_layout,
    native,
    speculators,
    weights,
)
from safetensors.torch import load_file, save_file
from test_training import random_blocks, random_rows
from tiny import LAYERS, VOCAB, WIDTH, OracleDrafts, prompt, tiny_drafter, tiny_target
from transformers import AutoModel
from transformers.cache_utils import DFlashCache

from hf_d2sd import D2SDAssistant, D2SDDrafterConfig, D2SDDrafterModel, hub
from hf_d2sd.apps.parity import decoding_logits, training_logits
from hf_d2sd.candidates import Draft
from hf_d2sd.cli import main
from hf_d2sd.drafting import Drafter, draft_head
from hf_d2sd.hub.export import ExportOptions, export
from hf_d2sd.modeling import CACHE_NAME, formats_d2sd
from hf_d2sd.modeling.formats_d2sd import FORMATS, Format, format_of
from hf_d2sd.modeling.weights_d2sd import drafter_shapes
from hf_d2sd.prefixes import select_prefix_lengths
from hf_d2sd.target import TargetPass
from hf_d2sd.training.drafters import Trainee

ROOT = Path(__file__).parents[1]
GAMMA, CONTEXT = 5, 9
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, GAMMA, WIDTH, generator=generator)
    return embeds, torch.randn(1, CONTEXT, 2 * WIDTH, generator=generator)


@torch.no_grad()
def output(model) -> torch.Tensor:
    """(γ, H)."""
    embeds, features = inputs()
    return model(noise_embeds=embeds, context_hidden_states=features).last_hidden_state[0]


@torch.no_grad()
def native_output(path) -> torch.Tensor:
    """Of Transformers' own class, with the cache that its decoding gives it."""
    model = AutoModel.from_pretrained(path)
    assert type(model).__name__ == "MuseGlimmerAssistantModel"
    cache = DFlashCache(config=model.config)
    cache.set_previous_accepted_tokens(CONTEXT)
    embeds, features = inputs()
    return model(embeds, features, use_cache=True, **{CACHE_NAME: cache}).last_hidden_state[0]


@torch.no_grad()
def output_by_rule(model, window: int | None, causal: bool) -> torch.Tensor:
    """The same of a sliding and a full layer, W = `window` by z-lab's rule: q - k < W, and k - q < W if not causal."""
    embeds, features = inputs()
    position = torch.arange(CONTEXT + GAMMA)
    query, key = position[CONTEXT:, None], position[None]
    near = query - key < window
    near &= key <= query if causal else key - query < window
    masks = {"sliding_attention": near[None, None], "full_attention": torch.ones_like(near)[None, None]}
    return model(noise_embeds=embeds, context_hidden_states=features, attention_mask=masks).last_hidden_state[0]


def load(path, **options) -> D2SDDrafterModel:
    return D2SDDrafterModel.from_pretrained(path, **options)


def read(config: dict) -> dict:
    """The arguments of `D2SDDrafterConfig`."""
    return format_of(config).read(config)


def decodes(drafter) -> bool:
    """Whether a pair of it and itself gives the target's greedy text."""
    target, options = tiny_target(), dict(do_sample=False, max_new_tokens=16)
    pair = D2SDAssistant.from_drafters(drafter, drafter)
    ours = target.generate(prompt(), assistant_model=pair, **options)
    return ours.tolist() == target.generate(prompt(), **options).tolist()


class TestDFlash:
    """z-lab's and SpecForge's layout."""

    def test_it_computes_what_transformers_own_assistant_does(self, tmp_path):
        ours = load(dflash(tmp_path / "a"))
        torch.testing.assert_close(output(ours), native_output(native(tmp_path / "b")), atol=1e-5, rtol=1e-5)

    def test_its_tensors_are_read_as_they_are(self, tmp_path):
        state = load(dflash(tmp_path)).state_dict()
        assert state.keys() == weights().keys()
        assert all(torch.equal(state[name], value) for name, value in weights().items())

    def test_its_configuration_means_the_same(self, tmp_path):
        config = load(dflash(tmp_path)).config
        assert (config.block_size, config.mask_token_id, config.target_layer_ids) == (5, 1, [0, 2])
        assert (config.vocab_size, config.num_target_layers, config.rms_norm_eps) == (VOCAB, LAYERS, 1e-5)
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
        assert config.layer_types == ["full_attention"] * 2 and config.causal_layer_types == []

    def test_keys_may_stand_inside_dflash_config(self, tmp_path):
        moved = {"block_size": 7, "num_target_layers": LAYERS}
        path = dflash(tmp_path, inner=moved, block_size=None, num_target_layers=None)
        assert load(path).config.block_size == 7
        assert load(path).config.num_target_layers == LAYERS

    def test_a_pair_of_paths_decodes_the_targets_text(self, tmp_path):
        second = dflash(tmp_path / "b", inner={"training_mode": "vp_drafter", "prefix_weight_base": 0.9})
        pair = D2SDAssistant.from_drafters(dflash(tmp_path / "a"), str(second))
        assert decodes(pair.first)
        pair.save_pretrained(tmp_path / "pair")
        again = D2SDAssistant.from_pretrained(tmp_path / "pair")
        assert torch.equal(output(again.second), output(pair.second))

    def test_the_code_beside_it_is_never_run(self, tmp_path):
        """A repository's own code is neither needed nor read: the file that auto_map names would end the process."""
        path = dflash(tmp_path)
        (path / "dflash.py").write_text("raise SystemExit('run')")
        assert load(path, trust_remote_code=True).config.block_size == 5

    @pytest.mark.parametrize(
        ("changes", "causal"),
        [
            ({}, True),
            ({"is_causal": False}, False),
            ({"is_causal": True}, True),
            ({"inner": {"causal": False}}, False),
        ],
        ids=str,
    )
    def test_windows_and_causal_blocks_follow_the_rule(self, changes, causal, tmp_path):
        """Sliding layers are causal unless the config says otherwise; `is_causal` and `causal` hold for all layers."""
        model = load(dflash(tmp_path, **{**SLIDING, **changes}))
        wanted = {"is_causal": True} == changes
        assert ("full_attention" in model.config.causal_layer_types) == wanted
        if not wanted:
            torch.testing.assert_close(output(model), output_by_rule(model, 4, causal), atol=1e-5, rtol=1e-5)
            other = output_by_rule(model, 4, not causal)
            assert not torch.allclose(output(model), other, atol=1e-3), "the rules differ here"
        assert decodes(model)

    def test_windows_by_use_swa_are_of_all_layers_and_look_both_ways(self, tmp_path):
        config = load(dflash(tmp_path, inner={"use_swa": True, "swa_window_size": 6})).config
        assert config.layer_types == ["sliding_attention"] * 2
        assert config.sliding_window == 5 and config.causal_layer_types == []

    def test_a_causal_head_sees_earlier_tokens_alone(self, tmp_path):
        model = load(dflash(tmp_path, inner={"causal_head": True}))
        embeds, features = inputs()
        embeds.requires_grad_()
        model(noise_embeds=embeds, context_hidden_states=features).last_hidden_state[0, 2].sum().backward()
        assert embeds.grad[0].abs().sum(-1).gt(0).tolist() == [True, True, True, False, False]
        assert decodes(model)

    def test_yarn_is_honoured(self, tmp_path):
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
        plain, scaled = load(dflash(tmp_path / "a")), load(dflash(tmp_path / "b", rope_scaling=yarn))
        same = native(tmp_path / "c", rope_parameters=yarn | {"rope_theta": 5000.0})
        torch.testing.assert_close(output(scaled), native_output(same), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(output(plain), output(scaled), atol=1e-3)

    def test_its_logits_are_scaled_and_capped_as_it_says(self, tmp_path):
        model = load(dflash(tmp_path, output_multiplier=0.5, final_logit_softcapping=3.0))
        head, hidden = tiny_target().get_output_embeddings(), output(model)
        expected = 3 * torch.tanh(head(hidden) * 0.5 / 3)
        torch.testing.assert_close(draft_head(model, head)(hidden), expected)

    def test_another_scale_of_the_embedding_is_refused_at_bind_time(self, tmp_path):
        pair = D2SDAssistant.from_drafters(dflash(tmp_path, input_embedding_scale=8.0))
        with pytest.raises(ValueError, match="input_embedding_scale is 8.0, the target's is 1.0"):
            tiny_target().generate(prompt(), assistant_model=pair)


PRUNED = [2, 3, 5, 8, 13, 19, 22]


def pruned_tensors(ids=PRUNED) -> dict[str, torch.Tensor]:
    listed = torch.zeros(VOCAB, dtype=torch.bool)
    listed[ids] = True
    head = torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(5))
    offsets = torch.tensor(ids) - torch.arange(len(ids))
    return weights() | {"t2d": listed, "d2t": offsets, "lm_head.weight": head}


class TestSpeculators:
    @pytest.mark.parametrize("non_causal", [False, True])
    def test_it_equals_its_twin_in_the_other_layout(self, non_causal, tmp_path):
        """Layer ids are one higher there, and sliding layers are causal unless sliding_window_non_causal."""
        ours = load(speculators(tmp_path / "a", layers=SLIDING, sliding_window_non_causal=non_causal))
        twin = load(dflash(tmp_path / "b", inner={"causal": False} if non_causal else {}, **SLIDING))
        assert torch.equal(output(ours), output(twin))
        assert ours.config.target_layer_ids == twin.config.target_layer_ids == [0, 2]
        assert ours.config.rope_parameters == twin.config.rope_parameters
        assert decodes(ours)

    def test_full_layers_see_the_whole_block_whatever_sliding_ones_do(self, tmp_path):
        ours, twin = load(speculators(tmp_path / "a")), load(dflash(tmp_path / "b"))
        assert torch.equal(output(ours), output(twin))

    def test_a_pruned_vocabulary_is_read_from_the_offsets_with_the_head_beside_it(self, tmp_path):
        tensors = pruned_tensors()
        model = load(speculators(tmp_path, tensors=tensors, draft_vocab_size=len(PRUNED)))
        assert model.draft_token_ids.tolist() == PRUNED
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
        drafter = Drafter(model, tiny_target())
        logits = drafter._head(output(model))
        torch.testing.assert_close(logits, output(model) @ tensors["lm_head.weight"].T)
        assert decodes(model)

    def test_a_pruned_drafter_drafts_only_its_tokens_by_its_own_head(self, tmp_path):
        path = speculators(tmp_path, tensors=pruned_tensors(), draft_vocab_size=len(PRUNED))
        pair = D2SDAssistant.from_drafters(path)
        tiny_target().generate(prompt(), assistant_model=pair, do_sample=False, max_new_tokens=16, d2sd_trace=True)
        drafted = {int(token) for cycle in pair.last_stats.trace for token in cycle.tokens[1:]}
        assert drafted and drafted <= set(PRUNED)

    def test_copies_of_the_targets_embedding_and_full_head_are_left_out(self, tmp_path):
        """speculators replaces them by the target's own whenever it loads a drafter."""
        copies = {"embed_tokens.weight": torch.randn(VOCAB, WIDTH), "lm_head.weight": torch.randn(VOCAB, WIDTH)}
        model = load(speculators(tmp_path, tensors=weights() | copies))
        assert model.state_dict().keys() == weights().keys()

    def test_lists_that_differ_are_refused(self, tmp_path):
        tensors = pruned_tensors()
        tensors["t2d"] = tensors["t2d"].roll(1)
        with pytest.raises(ValueError, match="t2d and d2t name different tokens"):
            load(speculators(tmp_path, tensors=tensors, draft_vocab_size=len(PRUNED)))

    def test_the_embeddings_output_is_no_feature(self, tmp_path):
        with pytest.raises(ValueError, match=r"aux_hidden_state_layer_ids is \[0, 3\]"):
            load(speculators(tmp_path, aux_hidden_state_layer_ids=[0, 3]))

    def test_layers_of_llama_have_llamas_defaults(self):
        layers = {**SPECULATORS_KEYS["transformer_layer_config"], "model_type": "llama"}
        del layers["rms_norm_eps"]
        config = D2SDDrafterConfig(**read(SPECULATORS_KEYS | {"transformer_layer_config": layers}))
        assert config.rms_norm_eps == 1e-6
        assert config.num_key_value_heads == 2


class TestTransformersOwn:
    @pytest.mark.parametrize("changes", [{}, SLIDING], ids=["full", "sliding"])
    def test_it_computes_what_the_native_class_does(self, changes, tmp_path):
        path = native(tmp_path, **changes)
        torch.testing.assert_close(output(load(path)), native_output(path), atol=1e-5, rtol=1e-5)

    def test_it_serves_whatever_target_since_it_names_no_vocabulary(self, tmp_path):
        model = load(native(tmp_path))
        assert model.config.vocab_size is None
        assert decodes(model)
        assert load(native(tmp_path), vocab_size=VOCAB + 1).config.vocab_size == VOCAB + 1


def at_work(model) -> tuple[Drafter, torch.Tensor]:
    """A drafter after nine tokens of random context in two rows, and the features (2, 9, F) that it has of them."""
    drafter, generator = Drafter(model, tiny_target()), torch.Generator().manual_seed(3)
    states = tuple(torch.randn(2, CONTEXT, WIDTH, generator=generator) for _ in range(LAYERS + 1))
    drafter.extend(TargetPass(torch.empty(2, CONTEXT, 0), states), [CONTEXT, CONTEXT])
    return drafter, torch.cat([states[1], states[3]], dim=-1)


def kept(tokens: list[list[list[int]]], lengths: list[list[int]]) -> Draft:
    """Prefixes (B, K) of these tokens (B, K, D)."""
    tokens = torch.tensor(tokens)
    return Draft.of(tokens, torch.full(tokens.shape, 0.5), torch.tensor(lengths))


ANCHORS = [5, 6]
PREFIXES = [[[3, 9, 4, 4], [8, 4, 4, 4]], [[2, 7, 4, 4], [9, 9, 4, 4]]]  # of two branches in each of two rows
KEPT = [[2, 1], [0, 2]]
TREES = [(1, 0), (1, 3), (4, 0), (4, 3)]  # width, branches


def same_text(first, second, width: int, branches: int) -> bool:
    """Whether three prompts in a batch get the text of plain `generate`, and drafts are drafted."""
    target, ids = tiny_target(), torch.cat([prompt(9, seed=seed) for seed in range(3)])
    options = dict(do_sample=False, max_new_tokens=16)
    plain = target.generate(ids, **options)
    pair = D2SDAssistant.from_drafters(first, second)
    options |= {"d2sd_tree_width": width, "d2sd_tree_budget": 14, "d2sd_num_branches": branches}
    return torch.equal(target.generate(ids, assistant_model=pair, **options), plain)


class TestDFlash2:
    """z-lab's second layout: convolutions around the sublayers, and a selector."""

    def expected(self, features, tokens: list[int]) -> torch.Tensor:
        """(γ, H), of one block."""
        embeds = tiny_target().get_input_embeddings()(torch.tensor(tokens))
        return hidden_by_layout(dflash2_weights(), embeds, features, CONTEXT, window=6)

    @torch.no_grad()
    def test_a_block_and_its_chain_are_those_of_the_layout(self, tmp_path):
        drafter, features = at_work(load(dflash2(tmp_path)))
        draft = drafter.draft(torch.tensor(ANCHORS), GAMMA)
        for row, anchor in enumerate(ANCHORS):
            hidden = self.expected(features[row], [anchor, 1, 1, 1, 1])[1:]
            expected = dflash2_drafts(dflash2_weights(), hidden, tiny_target().lm_head.weight, anchor)
            assert draft.best[row, 0].tolist() == [token for token, _ in expected]
            assert draft.log_probs[row, 0, :, 0].tolist() == pytest.approx([p for _, p in expected], abs=1e-4)

    @torch.no_grad()
    def test_blocks_side_by_side_know_nothing_of_each_other(self, tmp_path):
        drafter, features = at_work(load(dflash2(tmp_path)))
        draft = drafter.redraft(torch.tensor(ANCHORS), kept(PREFIXES, KEPT), GAMMA)
        head = tiny_target().lm_head.weight
        for row, anchor in enumerate(ANCHORS):
            for branch, length in enumerate(KEPT[row]):
                given = PREFIXES[row][branch][:length]
                hidden = self.expected(features[row], [anchor, *given, *[1] * (4 - length)])[1 + length :]
                expected = dflash2_drafts(dflash2_weights(), hidden, head, [anchor, *given][-1])
                assert draft.best[row, branch].tolist() == given + [token for token, _ in expected]

    @pytest.mark.parametrize("width, branches", TREES)
    def test_it_decodes_the_targets_text(self, width, branches, tmp_path):
        first, second = dflash2(tmp_path / "a"), dflash2(tmp_path / "b", tensors=dflash2_weights(1))
        assert same_text(first, second, width, branches)

    def test_it_goes_together_with_a_drafter_of_another_kind(self, tmp_path):
        assert same_text(dflash2(tmp_path / "a"), dflash(tmp_path / "b"), 1, 2)
        assert same_text(dflash(tmp_path / "b"), dflash2(tmp_path / "a"), 4, 2)

    def test_its_configuration_means_the_same(self, tmp_path):
        config = load(dflash2(tmp_path)).config
        assert (config.block_size, config.conv_kernel_size, config.conv_group_size) == (5, 2, 8)
        assert (config.path_kind, config.path_rank, config.path_candidates) == ("selector", 6, 5)
        assert (config.output_multiplier, config.final_logit_softcapping) == (0.5, 4.0)
        assert (config.sliding_window, config.causal_layer_types) == (5, [])

    def test_the_tensors_of_a_published_one_are_expected(self):
        """The header that z-lab's own tests hold: five layers, a vocabulary of 202048, 81 tensors."""
        inner = DFLASH2_KEYS["dflash_config"] | {"conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16}
        inner |= {"block_size": 16, "target_layer_ids": [1, 13, 25, 37, 49], "mask_token_id": 201818}
        sizes = {"hidden_size": 6656, "intermediate_size": 19968, "num_attention_heads": 32, "num_key_value_heads": 8}
        sizes |= {"head_dim": 128, "vocab_size": 202048, "num_hidden_layers": 5, "num_target_layers": 52}
        changes = sizes | {"layer_types": ["sliding_attention"] * 5, "sliding_window": 2048, "dflash_config": inner}
        shapes = drafter_shapes(D2SDDrafterConfig(**read(DFLASH2_KEYS | changes)))
        assert len(shapes) == 3 + 5 * 15 + 3
        assert shapes["layers.4.mlp_conv.base_kernel"] == (2, 2, 6656)
        assert shapes["layers.0.attention_conv.kernel_projection.weight"] == (1664, 6656)
        assert shapes["path_head.predecessor_codebook"] == (202048, 256)
        assert shapes["path_head.hidden_projection.weight"] == (256, 6656)

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            (dict(inner={"selector_rank": None}), "incomplete DFlash 2: its config has no selector_rank"),
            (dict(inner={"conv_group_size": None}), "incomplete DFlash 2: its config has no conv_group_size"),
            (dict(inner={"conv_group_size": 5}), "conv_group_size is 5, which does not divide hidden_size=32"),
            (dict(inner={"markov_rank": 6}), "This is DSpark: markov_rank"),
            (dict(architectures=["DFlash2DraftModel", "Qwen3DSparkModel"]), "DFlash2DraftModel, Qwen3DSparkModel"),
            (dict(architectures=["DFlashDraftModel"]), "This is DFlash 2: selector_rank"),
            (dict(tensors=weights()), "missing: layers.0.attention_conv.base_kernel"),
            (dict(tensors=dflash2_weights() | {"lm_head.weight": torch.ones(2)}), "unexpected: lm_head.weight"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_an_incomplete_or_mixed_one_is_refused_by_name(self, changes, name, tmp_path):
        with pytest.raises(ValueError, match=name):
            load(dflash2(tmp_path, **changes))


class TestDSpark:
    """DeepSpec's layout: a Markov head and a confidence head, and the first token is drafted at the anchor's slot."""

    def expected(self, tensors, features, tokens: list[int]) -> torch.Tensor:
        """(slots, H), of one block."""
        embeds = tensors["embed_tokens.weight"][torch.tensor(tokens)]
        return hidden_by_layout(tensors, embeds, features, CONTEXT)

    @pytest.mark.parametrize("gated", [False, True])
    @torch.no_grad()
    def test_a_block_its_chain_and_its_confidence_are_those_of_the_layout(self, gated, tmp_path):
        tensors = dspark_weights(gated=gated)
        path = dspark(tmp_path, tensors=tensors, markov_head_type="gated" if gated else "vanilla")
        drafter, features = at_work(load(path))
        draft = drafter.draft(torch.tensor(ANCHORS), GAMMA)
        for row, anchor in enumerate(ANCHORS):
            hidden = self.expected(tensors, features[row], [anchor, 1, 1, 1])
            tokens, log_probs, said = zip(*dspark_drafts(tensors, hidden, anchor))
            assert draft.best[row, 0].tolist() == list(tokens)
            assert draft.log_probs[row, 0, :, 0].tolist() == pytest.approx(log_probs, abs=1e-4)
            assert draft.best_confidence[row, 0].tolist() == pytest.approx(said, abs=1e-4)

    @torch.no_grad()
    def test_it_drafts_on_after_prefixes(self, tmp_path):
        tensors = dspark_weights()
        drafter, features = at_work(load(dspark(tmp_path)))
        draft = drafter.redraft(torch.tensor(ANCHORS), kept(PREFIXES, KEPT), GAMMA)
        for row, anchor in enumerate(ANCHORS):
            for branch, length in enumerate(KEPT[row]):
                given = PREFIXES[row][branch][:length]
                hidden = self.expected(tensors, features[row], [anchor, *given, *[1] * (3 - length)])[length:]
                expected = dspark_drafts(tensors, hidden, [anchor, *given][-1])
                assert draft.best[row, branch].tolist() == given + [token for token, _, _ in expected]

    @torch.no_grad()
    def test_a_confidence_head_may_do_without_the_token_before(self, tmp_path):
        tensors = dspark_weights()
        tensors["confidence_head.proj.weight"] = tensors["confidence_head.proj.weight"][:, :WIDTH]
        drafter, features = at_work(load(dspark(tmp_path, tensors=tensors, confidence_head_with_markov=False)))
        draft = drafter.draft(torch.tensor(ANCHORS), GAMMA)
        hidden = self.expected(tensors, features[0], [5, 1, 1, 1])
        said = hidden @ tensors["confidence_head.proj.weight"][0] + tensors["confidence_head.proj.bias"]
        torch.testing.assert_close(draft.best_confidence[0, 0], said.sigmoid(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("width, branches", TREES)
    def test_it_decodes_the_targets_text(self, width, branches, tmp_path):
        first, second = dspark(tmp_path / "a"), dspark(tmp_path / "b", tensors=dspark_weights(1))
        assert same_text(first, second, width, branches)

    def test_it_goes_together_with_a_drafter_of_another_kind(self, tmp_path):
        assert same_text(dspark(tmp_path / "a"), dflash(tmp_path / "b"), 1, 2)
        assert same_text(dflash2(tmp_path / "c"), dspark(tmp_path / "a"), 4, 2)

    def test_without_heads_it_is_a_drafter_still(self, tmp_path):
        tensors = {name: value for name, value in dspark_weights().items() if "markov" not in name}
        tensors = {name: value for name, value in tensors.items() if "confidence" not in name}
        path = dspark(tmp_path, tensors=tensors, markov_rank=0, enable_confidence_head=False)
        assert load(path).path_head is None and load(path).confidence_head is None
        assert same_text(path, None, 1, 0)

    def test_its_configuration_means_the_same(self, tmp_path):
        config = load(dspark(tmp_path)).config
        assert (config.block_size, config.block_slots, config.drafts_from_anchor) == (5, 4, True)
        assert (config.own_head, config.own_embedding, config.confidence_head) == (True, True, "path")
        assert (config.path_kind, config.path_rank, config.path_candidates) == ("markov", 6, 64)
        assert load(tmp_path, path_candidates=9).config.path_candidates == 9

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            (dict(markov_head_type="rnn"), "another Markov head: markov_head_type is 'rnn'"),
            (dict(markov_head_type=None), "incomplete DSpark: its config has no markov_head_type"),
            (
                dict(confidence_head_with_markov=None),
                "incomplete DSpark: its config has no confidence_head_with_markov",
            ),
            (dict(target_layer_ids=[-1, 2]), "-1 is the embedding's output"),
            (dict(dspark_bonus_anchor=True), "drafts from its masks: dspark_bonus_anchor"),
            (dict(sample_from_anchor=False), "drafts from its masks: sample_from_anchor"),
            (dict(draft_vocab_size=12), "a pruned vocabulary: draft_vocab_size is 12"),
            (dict(model_type="gemma4"), "other layers: model_type is 'gemma4'"),
            (dict(architectures=["Gemma4DSparkModel"]), "Gemma4DSparkModel"),
            (dict(layer_types=["sliding_attention"] * 2, sliding_window=4), "DSpark with windows"),
            (dict(dflash_config={"mask_token_id": 1}), "a mixture: a DSpark .* with the keys of DFlash"),
            (dict(selector_rank=4), "This is DFlash 2: selector_rank"),
            (dict(num_loops=2), "layers are passed several times"),
            (dict(tensors=weights()), "missing: confidence_head.proj.bias.*embed_tokens.weight.*path_head.markov_w1"),
            (dict(tensors=dspark_weights(gated=True)), "unexpected: path_head.gate_proj.bias"),
            (dict(tensors=dspark_weights() | {"markov_head.markov_w2.weight": torch.ones(VOCAB, 5)}), "mismatched"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_an_incomplete_or_mixed_one_is_refused_by_name(self, changes, name, tmp_path):
        with pytest.raises(ValueError, match=name):
            load(dspark(tmp_path, **changes))


class TestBothKinds:
    """What holds of DFlash 2 and DSpark alike, elsewhere than in eager decoding."""

    WRITERS = {"dflash2": dflash2, "dspark": dspark}

    @pytest.mark.parametrize("kind", WRITERS)
    def test_decoding_and_the_trainings_forward_agree(self, kind, tmp_path):
        model, row = load(self.WRITERS[kind](tmp_path)), random_rows(24)[0]
        places = [(anchor, v) for anchor in (6, 13) for v in (0, 2)]
        wanted = training_logits(tiny_target(), model, row, places)
        seen = [logits for anchor in (6, 13) for logits in decoding_logits(tiny_target(), model, row, anchor, [0, 2])]
        assert len(wanted) == len(seen) == 4
        for one, other in zip(wanted, seen):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", WRITERS)
    def test_its_path_head_can_be_trained_alone(self, kind, tmp_path):
        model = load(self.WRITERS[kind](tmp_path))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainee = Trainee(model, tiny_target(), path_head_alone=True)
        blocks = random_blocks(model, random_rows(20, 24))
        optimizer = torch.optim.AdamW([p for p in trainee.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(12):
            loss = trainee(blocks)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if name.startswith("path_head.")}

    @pytest.mark.parametrize("width", [1, pytest.param(4, marks=pytest.mark.slow)])
    def test_cycles_of_fixed_shapes_give_the_same_text(self, width, tmp_path):
        torch._dynamo.reset()
        first, second = dspark(tmp_path / "a"), dflash2(tmp_path / "b", inner={"block_size": 7})
        pair = D2SDAssistant.from_drafters(first, second, tree_width=width, tree_budget=12)
        pair.compile(backend="eager")
        options = dict(do_sample=False, max_new_tokens=16)
        ours = tiny_target().generate(prompt(), assistant_model=pair, **options)
        assert ours.tolist() == tiny_target().generate(prompt(), **options).tolist()
        torch._dynamo.reset()

    def test_right_drafts_are_accepted_whole(self, tmp_path, monkeypatch):
        target, options = tiny_target(), dict(do_sample=False, max_new_tokens=24)
        plain = target.generate(prompt(), **options)
        OracleDrafts(monkeypatch, plain[0], accuracy=1.0)
        pair = D2SDAssistant.from_drafters(dspark(tmp_path / "a"), dflash2(tmp_path / "b"))
        assert torch.equal(target.generate(prompt(), assistant_model=pair, **options), plain)
        assert max(pair.last_stats.committed_per_cycle) == 5

    def test_a_pair_is_saved_in_this_librarys_layout_and_loaded(self, tmp_path):
        pair = D2SDAssistant.from_drafters(dspark(tmp_path / "a"), dflash2(tmp_path / "b"))
        pair.save_pretrained(tmp_path / "pair")
        again = D2SDAssistant.from_pretrained(tmp_path / "pair")
        state = again.state_dict()
        assert state.keys() == pair.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in pair.state_dict().items())
        assert again.config.first.confidence_head == "path" and again.config.second.path_kind == "selector"

    def test_the_confidence_head_chooses_the_prefixes(self, tmp_path):
        """Whatever the tokens' probabilities: all of a block that it trusts, nothing of one that it does not."""
        model = load(dspark(tmp_path))
        with torch.no_grad():
            model.confidence_head.proj.weight.zero_()
            for value, said in ((8.0, 1.0), (-8.0, 0.0)):
                model.confidence_head.proj.bias.fill_(value)
                draft = at_work(model)[0].draft(torch.tensor(ANCHORS), GAMMA)
                torch.testing.assert_close(draft.best_confidence, torch.full((2, 1, 4), said), atol=1e-3, rtol=0)
                lengths = select_prefix_lengths(draft.best_confidence[:, 0], 1, GAMMA + 1)
                assert lengths.tolist() == [[4 * int(said)]] * 2


class TestPublishedConfigs:
    """Keys as published repositories have them; their weights are not needed."""

    def test_of_a_drafter_with_windows(self):
        """z-lab/Qwen3.5-35B-A3B-DFlash: five sliding layers, then a full one; the window stands without a switch."""
        config = D2SDDrafterConfig(
            **read(
                {
                    "architectures": ["DFlashDraftModel"],
                    "model_type": "qwen3",
                    "hidden_size": 2048,
                    "num_hidden_layers": 6,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 8,
                    "head_dim": 128,
                    "intermediate_size": 6144,
                    "vocab_size": 248320,
                    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
                    "sliding_window": 4096,
                    "max_window_layers": 6,
                    "dflash_config": {
                        "block_size": 16,
                        "mask_token_id": 248077,
                        "target_layer_ids": [1, 6, 11, 16, 22, 27, 32, 37],
                    },
                    "num_target_layers": 40,
                    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
                }
            )
        )
        assert (config.sliding_window, config.causal_layer_types) == (4095, ["sliding_attention"])
        assert (config.block_size, config.mask_token_id, config.num_target_layers) == (16, 248077, 40)
        assert drafter_shapes(config)["fc.weight"] == (2048, 8 * 2048)

    def test_of_a_causal_head(self):
        """JetSpec/jetspec-Qwen3.6-35B-A3B."""
        config = D2SDDrafterConfig(
            **read(
                {
                    "architectures": ["DFlashDraftModel"],
                    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
                    "block_size": 16,
                    "dflash_config": {
                        "causal_head": True,
                        "mask_token_id": 248070,
                        "target_layer_ids": [1, 10, 19, 28, 37],
                    },
                    "dtype": "bfloat16",
                    "hidden_size": 2048,
                    "intermediate_size": 6144,
                    "num_hidden_layers": 8,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 4,
                    "head_dim": 128,
                    "num_target_layers": 40,
                    "vocab_size": 248320,
                    "rope_parameters": {"rope_theta": 10000000, "rope_type": "default"},
                    "rms_norm_eps": 1e-6,
                }
            )
        )
        assert config.causal_layer_types == ["full_attention"]
        assert config.rope_parameters["rope_theta"] == 10000000
        assert config.dtype == torch.bfloat16


class TestWhatIsRefused:
    """Drafters that need another network or decoding, each by its name."""

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            (dict(architectures=["DFlash2DraftModel"]), "incomplete DFlash 2"),
            (dict(architectures=["DSparkDraftModel"]), "DSparkDraftModel"),
            (dict(architectures=["DFlareDraftModel"]), "DFlareDraftModel"),
            (dict(architectures=["Qwen3DSparkModel"]), "a mixture: a DSpark"),
            (dict(inner={"projector_type": "domino"}), "Domino"),
            (dict(inner={"shift_label": True}), "Domino"),
            (dict(inner={"selector_rank": 64}), "DFlash 2"),
            (dict(conv_kernel_size=2), "DFlash 2"),
            (dict(markov_rank=256), "DSpark"),
            (dict(inner={"attention_mode": "mla"}), "another attention"),
            (dict(inner={"attention_sink_bias": True}), "attention sinks"),
            (dict(rope_parameters={"full_attention": {"a": 1}, "sliding_attention": {"a": 2}}), "turn differently"),
        ],
        ids=str,
    )
    def test_in_the_dflash_layout(self, changes, name, tmp_path):
        with pytest.raises(ValueError, match=name):
            load(dflash(tmp_path, **changes))

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            (dict(speculators_model_type="dspark"), "'dspark'"),
            (dict(speculators_model_type="dflash2"), "'dflash2'"),
            (dict(speculators_model_type="eagle3"), "'eagle3'"),
            (dict(sample_from_anchor=True), "samples from its anchor"),
            (dict(projector_type="domino"), "Domino"),
            (dict(shift_label=True), "Domino"),
        ],
        ids=str,
    )
    def test_in_the_layout_of_speculators(self, changes, name, tmp_path):
        with pytest.raises(ValueError, match=name):
            load(speculators(tmp_path, **changes))

    def test_a_tensor_too_many_is_listed(self, tmp_path):
        with pytest.raises(ValueError, match="unexpected: gru.weight"):
            load(dflash(tmp_path, tensors=weights() | {"gru.weight": torch.zeros(2)}))

    def test_a_model_that_is_no_drafter_is_named(self, tmp_path):
        tiny_target().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="format 'llama'.*LlamaForCausalLM"):
            load(tmp_path)

    def test_a_single_drafter_is_no_pair(self, tmp_path):
        with pytest.raises(ValueError, match="single drafter in another library's layout: .*from_drafters"):
            D2SDAssistant.from_pretrained(dflash(tmp_path))

    def test_what_lacks_its_layer_ids_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no target_layer_ids"):
            load(dflash(tmp_path, inner={"target_layer_ids": None}))


def test_the_shapes_that_are_expected_are_those_of_the_model():
    """Of every kind of drafter: with biases, without head norms, layer-wise, pruned, with a head of its own."""
    for changes in (
        {},
        dict(attention_bias=True, qk_norm=False),
        dict(feature_fusion="layerwise", draft_vocab_size=7),
        dict(own_head=True),
        dict(own_head=True, draft_vocab_size=7, target_hidden_size=24),
        dict(path_rank=4),
        dict(path_rank=4, path_kind="selector", conv_kernel_size=3, conv_group_size=4, draft_vocab_size=7),
        dict(path_rank=4, path_kind="markov", own_embedding=True, draft_vocab_size=7),
        dict(path_rank=4, path_kind="gated_markov", confidence_head="path", drafts_from_anchor=True),
        dict(confidence_head="slot"),
    ):
        config = D2SDDrafterConfig(**{**read(DFLASH_KEYS), **changes})
        shapes = {name: tuple(tensor.shape) for name, tensor in D2SDDrafterModel(config).state_dict().items()}
        assert drafter_shapes(config) == shapes


@pytest.mark.parametrize("options", [dict(dtype=torch.bfloat16), dict(device_map="cpu"), dict(block_size=4)], ids=str)
def test_options_of_loading_hold_for_other_layouts_too(options, tmp_path):
    model = load(dflash(tmp_path), **options)
    assert model.dtype == options.get("dtype", torch.float32)
    assert model.config.block_size == options.get("block_size", 5)
    assert not model.training
    model, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(model.fc.weight, weights()["fc.weight"])


def test_a_drafter_that_was_read_is_saved_in_this_librarys_layout(tmp_path):
    model = load(speculators(tmp_path / "a", tensors=pruned_tensors(), draft_vocab_size=len(PRUNED)))
    model.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "d2sd_drafter"
    assert {"draft_token_ids", "lm_head.weight"} < load_file(tmp_path / "b" / "model.safetensors").keys()
    assert torch.equal(output(load(tmp_path / "b")), output(model))


class TrialFormat(Format):
    """Everything under other names, and a note that is no weight."""

    name, engines = "trial", "a trial engine"

    def detect(self, config: dict) -> bool:
        return config.get("trial_version") == 1

    def read(self, config: dict) -> dict:
        return {**config["body"], "block_size": config["gamma"]}

    def rename(self, name: str, config) -> str | None:
        return name.removeprefix("trial.") if name != "note" else None

    def obstacles(self, config) -> list[str]:
        return ["it has biases"] if config.attention_bias else []

    def write(self, config, tensors, target):
        body = {name: getattr(config, name) for name in ("target_layer_ids", "mask_token_id", *LAYER_KEYS)}
        written = {"trial_version": 1, "gamma": config.block_size, "body": body, "for": target.name}
        return written, {f"trial.{name}": tensor for name, tensor in tensors.items()} | {"note": torch.ones(1)}


@pytest.fixture
def trial(monkeypatch):
    monkeypatch.setattr(formats_d2sd, "FORMATS", (TrialFormat(), *FORMATS))


@pytest.mark.usefixtures("trial")
class TestALayoutMore:
    """A class and its entry in FORMATS are all that a layout needs."""

    def written(self, folder, **changes) -> Path:
        tiny_drafter(**changes).save_pretrained(folder / "ours")
        options = dict(model=str(folder / "ours"), out=folder / "theirs", target="org/target")
        export(ExportOptions(format="trial", **options))
        return folder / "theirs"

    def test_is_written(self, tmp_path):
        folder = self.written(tmp_path)
        config = json.loads((folder / "config.json").read_text())
        assert (config["trial_version"], config["gamma"], config["for"]) == (1, 4, "org/target")
        names = {f"trial.{name}" for name in tiny_drafter().state_dict()} | {"note"}
        assert load_file(folder / "model.safetensors").keys() == names

    def test_is_known_and_read(self, tmp_path):
        model = load(self.written(tmp_path))
        assert all(torch.equal(model.state_dict()[name], value) for name, value in tiny_drafter().state_dict().items())
        assert (model.config.block_size, model.config.target_layer_ids) == (4, [0, 2])
        assert decodes(model)

    def test_has_tensors_that_are_counted_and_named(self, tmp_path):
        folder = self.written(tmp_path)
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "trial.more": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="unexpected: more"):
            load(folder)

    def test_is_no_pair(self, tmp_path):
        with pytest.raises(ValueError, match="single drafter in another library's layout"):
            D2SDAssistant.from_pretrained(self.written(tmp_path))

    def test_says_what_it_cannot_say(self, tmp_path):
        with pytest.raises(ValueError, match="format 'trial' cannot say this of the drafter: it has biases"):
            self.written(tmp_path, attention_bias=True)

    def test_is_a_choice_of_the_command(self, tmp_path, monkeypatch, capsys):
        """Of a fresh module: a command's options are made once."""
        monkeypatch.setattr(hub, "export", hub.export)
        monkeypatch.delitem(sys.modules, "hf_d2sd.hub.export")
        tiny_drafter().save_pretrained(tmp_path / "ours")
        models = ["--model", str(tmp_path / "ours"), "--out", str(tmp_path / "theirs"), "--target", "org/target"]
        main(["export", *models, "--format", "trial"])
        assert json.loads(capsys.readouterr().out)["format"] == "trial"
        assert load(tmp_path / "theirs").config.block_size == 4
        with pytest.raises(SystemExit):
            main(["export", "--help"])
        assert "{dflash,dflash2,dspark,speculators,trial}" in capsys.readouterr().out


def compared_words(source: str) -> Iterator[tuple[str, int]]:
    """The strings that code compares with, and looks up by, with their lines; but for those of `speculation_type`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            if any(isinstance(part, ast.Attribute) and part.attr == "speculation_type" for part in parts):
                continue
        elif isinstance(node, (ast.Dict, ast.MatchValue)):
            parts = node.keys if isinstance(node, ast.Dict) else [node.value]
        else:
            continue
        for part in (part for part in parts if part is not None):
            for constant in ast.walk(part):
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                    yield constant.value, constant.lineno


class TestNothingElseKnowsALayout:
    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ("if layout == 'dflash': pass", ["dflash"]),
            ("found = layout in ('speculators', 'dflash')", ["speculators", "dflash"]),
            ("match layout:\n    case 'dflash': pass", ["dflash"]),
            ("write = {'dflash': 1}[layout]", ["dflash"]),
            ("if config.speculation_type != 'dflash': pass", []),
            ("generate(speculation_type='dflash')", []),
        ],
    )
    def test_comparisons_are_seen(self, source, words):
        """Else the test below would see nothing."""
        assert [word for word, _ in compared_words(source)] == words

    def test_no_other_file_compares_with_a_layouts_name(self):
        """In the benchmark "dflash" is the name of a strategy."""
        names = {format.name for format in FORMATS if not format.own}
        assert names == {"dflash", "dflash2", "dspark", "speculators", "muse_glimmer_assistant"}
        found = []
        for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "modeling").glob("*.py")]:
            forbidden = names - {"dflash"} if path.parent.name == "benchmark" else names
            if path.name != "formats_d2sd.py":
                words = compared_words(path.read_text(encoding="utf-8"))
                found += [f"{path.name}:{line} {word}" for word, line in words if word in forbidden]
        assert found == []

    def test_no_other_file_names_a_layouts_class(self):
        classes = [type(format).__name__ for format in FORMATS]
        for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "modeling").glob("*.py")]:
            if path.name != "formats_d2sd.py":
                assert not [name for name in classes if name in path.read_text(encoding="utf-8")], path.name
