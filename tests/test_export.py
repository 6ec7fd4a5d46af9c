"""A drafter that is written for other engines comes back as it was, or is refused with the reason."""

import json

import pytest
import torch
from layouts import DFLASH2_KEYS, DSPARK_KEYS, dflash2, dspark, dspark_weights, weights
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import LAYERS, VOCAB, prompt, tiny_assistant, tiny_drafter, tiny_target

from hf_d2sd import D2SDAssistant, D2SDDrafterModel
from hf_d2sd.cli import main
from hf_d2sd.drafting import draft_head
from hf_d2sd.hub.export import ExportOptions, export

SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=7)
CHANGES = {
    "plain": {},
    "biases": dict(attention_bias=True),
    "windows": SLIDING,
    "causal windows": SLIDING | {"causal_layer_types": ["sliding_attention"]},
    "yarn": dict(
        rope_parameters=dict(rope_type="yarn", rope_theta=7e3, factor=4.0, original_max_position_embeddings=1024)
    ),
    "calibrated": dict(
        confidence_temperatures=[1.1, 1.2, 1.3], path_text_weight=4.0, tokenizer_fingerprint="0123456789abcdef"
    ),
}
VOLATILE = ("architectures", "auto_map", "transformers_version", "_name_or_path")


def meaning(drafter) -> dict:
    values = {name: value for name, value in drafter.config.to_dict().items() if name not in VOLATILE}
    return values | {"causal_layer_types": values["causal_layer_types"] or []}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tiny_target().save_pretrained(folder)
    return str(folder)


def written(drafter, folder, **options):
    """The drafter, written in a format and read again."""
    drafter.save_pretrained(folder / "ours")
    export(ExportOptions(model=str(folder / "ours"), out=folder / "theirs", **options))
    return D2SDDrafterModel.from_pretrained(folder / "theirs")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("format", ["dflash", "speculators"])
def test_there_and_back_is_exact(format, change, target, tmp_path):
    drafter = tiny_drafter(**CHANGES[change])
    again = written(drafter, tmp_path, format=format, target=target)
    state, other = drafter.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    assert meaning(again) == meaning(drafter)


@pytest.mark.parametrize(
    "change",
    [
        dict(causal_layer_types=["full_attention"]),
        dict(output_multiplier=0.5, final_logit_softcapping=30.0, input_embedding_scale=1.0),
    ],
    ids=str,
)
def test_the_dflash_layout_says_more(change, tmp_path):
    drafter = tiny_drafter(**change)
    assert meaning(written(drafter, tmp_path)) == meaning(drafter)


def test_the_dtype_is_kept(tmp_path):
    again = written(tiny_drafter().bfloat16(), tmp_path)
    assert again.dtype == torch.bfloat16
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_dflash_layout_has_the_keys_and_tensors_that_its_readers_want(tmp_path):
    written(tiny_drafter(), tmp_path)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"] and config["model_type"] == "qwen3"
    assert config["dflash_config"] == {"mask_token_id": 1, "target_layer_ids": [0, 2]}
    assert (config["block_size"], config["num_target_layers"], config["rope_theta"]) == (4, LAYERS, 10000.0)
    with safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == weights().keys()


def test_what_is_done_to_logits_is_said_where_each_reader_looks(tmp_path):
    changes = dict(output_multiplier=0.5, final_logit_softcapping=30.0)
    written(tiny_drafter(**changes), tmp_path)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert {name: config[name] for name in changes} == changes  # z-lab's own
    assert {name: config["dflash_config"][name] for name in changes} == changes  # SGLang


def test_speculators_counts_layers_from_the_embedding_and_names_the_target(target, tmp_path):
    written(tiny_drafter(), tmp_path, format="speculators", target=target)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["aux_hidden_state_layer_ids"] == [1, 3]
    assert config["speculators_config"]["verifier"] == {"name_or_path": target, "architectures": ["LlamaForCausalLM"]}
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert (config["draft_vocab_size"], config["speculators_model_type"]) == (VOCAB, "dflash")


def test_a_pruned_drafter_takes_the_targets_rows_along(target, tmp_path):
    """In ascending order of its tokens, as t2d implies; what it drafts stays the same."""
    drafter = tiny_drafter(draft_vocab_size=5)
    drafter.draft_token_ids.copy_(torch.tensor([19, 2, 3, 8, 5]))
    again = written(drafter, tmp_path, format="speculators", target=target)
    assert again.draft_token_ids.tolist() == [2, 3, 5, 8, 19]
    head = tiny_target().get_output_embeddings()
    assert torch.equal(again.lm_head.weight, head.weight[again.draft_token_ids])
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    order = drafter.draft_token_ids.sort().indices
    torch.testing.assert_close(draft_head(again, head)(hidden), draft_head(drafter, head)(hidden)[:, order])
    third = written(again, tmp_path / "again", format="speculators", target=target)
    assert torch.equal(third.lm_head.weight, again.lm_head.weight)


@pytest.mark.parametrize("format", ["dflash2", "dspark"])
@pytest.mark.parametrize("change", ["", "other"])
def test_public_drafters_with_path_heads_go_there_and_back_to_the_byte(format, change, tmp_path):
    """Read from their layout and written in it, a checkpoint has its own tensors and the values of its keys."""
    writer, keys = {"dflash2": (dflash2, DFLASH2_KEYS), "dspark": (dspark, DSPARK_KEYS)}[format]
    others = {
        "dflash2": dict(inner={"input_embedding_scale": 1.0, "final_logit_softcapping": 30.0}),
        "dspark": dict(tensors=dspark_weights(gated=True), markov_head_type="gated"),
    }
    source = writer(tmp_path / "source", **(others[format] if change else {}))
    drafter = D2SDDrafterModel.from_pretrained(source)
    again = written(drafter, tmp_path, format=format)
    assert meaning(again) == meaning(drafter)
    tensors, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", source))
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], value) for name, value in wanted.items())
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    said = json.loads((source / "config.json").read_text())
    passed_over = {"num_anchors", "dflash_config", "sliding_window", "use_sliding_window"}
    compared = keys.keys() - passed_over
    assert {name: config.get(name) for name in compared} == {name: said[name] for name in compared}
    assert said.get("dflash_config", {}).items() <= config.get("dflash_config", {}).items()


@torch.no_grad()
def test_a_selector_without_convolutions_is_written_with_ones_that_change_nothing(tmp_path):
    drafter = tiny_drafter(path_rank=4, path_kind="selector", path_candidates=5)
    torch.nn.init.normal_(drafter.path_head.successor_codebook)
    again = written(drafter, tmp_path, format="dflash2")
    assert (again.config.conv_kernel_size, again.config.conv_group_size) == (2, 16)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, 32, generator=generator), torch.randn(1, 9, 64, generator=generator)
    outputs = [model(noise_embeds=inputs[0], context_hidden_states=inputs[1]) for model in (drafter, again)]
    assert torch.equal(*(output.last_hidden_state for output in outputs))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in drafter.state_dict().items())


@pytest.mark.parametrize("format", ["dflash", "speculators"])
def test_our_own_path_head_is_left_out_and_said_to_be(format, target, tmp_path):
    """It mixes the slot and the token before in a network: no product of tables says the same."""
    drafter = tiny_drafter(path_rank=4)
    drafter.save_pretrained(tmp_path / "ours")
    said = export(ExportOptions(model=str(tmp_path / "ours"), out=tmp_path / "theirs", format=format, target=target))
    assert len(said["left_out"]) == 1 and "path head (path_kind 'projection')" in said["left_out"][0]
    again = D2SDDrafterModel.from_pretrained(tmp_path / "theirs")
    assert again.path_head is None
    assert again.state_dict().keys() == {name for name in drafter.state_dict() if not name.startswith("path_head.")}
    assert "left_out" not in export(ExportOptions(model=str(tmp_path / "theirs"), out=tmp_path / "b", format="dflash"))


@pytest.mark.parametrize(
    ("format", "change", "reason"),
    [
        ("dflash2", dict(path_rank=4), "its path head is no selector .dflash leaves it out"),
        ("dflash2", {}, "it has no path head .dflash can say it"),
        ("dspark", dict(path_rank=4), "its anchor's slot drafts nothing; .*its path head is no Markov head"),
        ("dflash", dict(conv_kernel_size=2, conv_group_size=8), "it has convolutions .dflash2 can say it"),
        ("dflash", dict(drafts_from_anchor=True), "its anchor's slot drafts .dspark can say it"),
        ("speculators", dict(own_embedding=True), "an embedding of its own .dspark can say it"),
        ("dflash", dict(draft_vocab_size=5), "draft_vocab_size is 5 .speculators can say it"),
        ("dflash", dict(feature_fusion="layerwise"), "feature_fusion is 'layerwise'"),
        ("speculators", dict(feature_fusion="layerwise", qk_norm=False), "'layerwise'; qk_norm is False"),
        ("dflash", dict(own_head=True), "an LM head of its own"),
        ("dflash", SLIDING | {"causal_layer_types": ["full_attention"]}, "full layers are causal, its sliding ones"),
        ("speculators", dict(causal_layer_types=["full_attention"]), "its full layers are causal"),
        ("speculators", dict(final_logit_softcapping=3.0), "it caps its logits"),
    ],
    ids=str,
)
def test_what_a_format_cannot_say_is_refused_by_name(format, change, reason, target, tmp_path):
    with pytest.raises(ValueError, match=reason):
        written(tiny_drafter(**change), tmp_path, format=format, target=target)
    assert not (tmp_path / "theirs").exists()


def test_either_drafter_of_a_pair_is_written_by_the_command(tmp_path, capsys):
    tiny_assistant(4, 6).save_pretrained(tmp_path / "pair")
    main(["export", "--model", str(tmp_path / "pair"), "--out", str(tmp_path / "out"), "--role", "second"])
    assert json.loads(capsys.readouterr().out)["tensors"] == len(weights())
    again = D2SDDrafterModel.from_pretrained(tmp_path / "out")
    assert again.config.block_size == 6
    assert torch.equal(again.fc.weight, tiny_assistant(4, 6).second.fc.weight)
    out = tiny_target().generate(
        prompt(), assistant_model=D2SDAssistant.from_drafters(again), do_sample=False, max_new_tokens=8
    )
    assert out.tolist() == tiny_target().generate(prompt(), do_sample=False, max_new_tokens=8).tolist()


@pytest.mark.parametrize("format", ["d2sd", "muse_glimmer_assistant"])
def test_what_is_only_read_says_so(format, tmp_path):
    with pytest.raises(
        ValueError, match=f"not exported in the format '{format}', but in dflash, dflash2, dspark, speculators"
    ):
        written(tiny_drafter(), tmp_path, format=format)
    assert not (tmp_path / "theirs").exists()


def test_a_format_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="no format 'gguf'; drafters are exported in dflash, dflash2, dspark, speculators"
    ):
        written(tiny_drafter(), tmp_path, format="gguf")


def test_the_command_offers_the_formats_that_are_written(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "--format {dflash,dflash2,dspark,speculators}" in capsys.readouterr().out


def test_speculators_wants_a_target(tmp_path):
    with pytest.raises(ValueError, match="pass it as --target"):
        written(tiny_drafter(), tmp_path, format="speculators")


def test_a_role_that_is_not_there_is_named(tmp_path):
    D2SDAssistant.from_drafters(tiny_drafter()).save_pretrained(tmp_path / "pair")
    with pytest.raises(ValueError, match="no second drafter"):
        export(ExportOptions(model=str(tmp_path / "pair"), out=tmp_path / "out", role="second"))
