"""Drafters and pairs save, load, move and run like any model of Transformers."""

import json
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from tiny import VOCAB, WIDTH, prompt, tiny_assistant, tiny_drafter, tiny_target
from transformers import AutoConfig, AutoModel

import hf_d2sd
from hf_d2sd import D2SDAssistant, D2SDConfig, D2SDDrafterConfig, D2SDDrafterModel
from hf_d2sd.modeling import default_target_layer_ids


def same(one, other) -> bool:
    tensors, others = one.state_dict(), other.state_dict()
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def generate(assistant):
    return tiny_target().generate(prompt(), max_new_tokens=12, do_sample=False, assistant_model=assistant).tolist()


class TestSavingAndLoading:
    @pytest.mark.parametrize("reader", [D2SDAssistant, AutoModel])
    def test_a_pair_comes_back_as_it_was(self, reader, tmp_path):
        pair = D2SDAssistant.from_drafters(tiny_drafter(4), tiny_drafter(6, seed=1), num_branches=2, tree_budget=9)
        pair.save_pretrained(tmp_path)
        loaded = reader.from_pretrained(tmp_path)
        assert type(loaded) is D2SDAssistant and same(pair, loaded)
        assert (loaded.config.num_branches, loaded.config.tree_budget) == (2, 9)
        assert loaded.config.first.to_dict()["block_size"] == 4 and loaded.config.second.block_size == 6
        assert generate(loaded) == generate(pair)
        assert loaded.last_stats.committed_per_cycle == pair.last_stats.committed_per_cycle

    def test_a_drafter_comes_back_as_it_was(self, tmp_path):
        drafter = tiny_drafter(4, draft_vocab_size=7)
        drafter.draft_token_ids.copy_(torch.tensor([3, 1, 4, 15, 9, 2, 6]))
        drafter.save_pretrained(tmp_path)
        loaded = D2SDDrafterModel.from_pretrained(tmp_path)
        assert same(drafter, loaded)
        assert loaded.draft_token_ids.tolist() == [3, 1, 4, 15, 9, 2, 6]

    def test_a_pair_is_joined_from_folders(self, tmp_path):
        drafters = tiny_drafter(4), tiny_drafter(6, seed=1)
        for name, drafter in zip("ab", drafters):
            drafter.save_pretrained(tmp_path / name)
        joined = D2SDAssistant.from_drafters(tmp_path / "a", str(tmp_path / "b"))
        assert same(joined, D2SDAssistant.from_drafters(*drafters))
        assert joined.config.num_branches == 4
        joined.save_pretrained(tmp_path / "pair")
        assert str(tmp_path) not in (tmp_path / "pair" / "config.json").read_text(), "a path is nobody else's business"

    def test_a_first_drafter_alone_decodes_without_branches(self, tmp_path):
        alone = D2SDAssistant.from_drafters(tiny_drafter(4))
        alone.save_pretrained(tmp_path)
        loaded = D2SDAssistant.from_pretrained(tmp_path)
        assert loaded.second is None and loaded.config.num_branches == 0
        assert generate(loaded) == generate(alone)

    def test_the_folder_holds_safetensors_and_the_code(self, tmp_path):
        tiny_assistant(4, 6).save_pretrained(tmp_path)
        names = ("compat", "configuration", "formats", "modeling", "weights")
        code = {f"{name}_d2sd.py" for name in names}
        assert {path.name for path in tmp_path.iterdir()} == {
            "config.json",
            "custom_generate",
            "model.safetensors",
        } | code
        auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
        assert auto_map == {"AutoConfig": "configuration_d2sd.D2SDConfig", "AutoModel": "modeling_d2sd.D2SDAssistant"}

    def test_push_to_hub_uploads_that_folder(self, monkeypatch):
        uploaded = {}

        def create_commit(api, repo_id, operations, **kwargs):
            uploaded.update({operation.path_in_repo: repo_id for operation in operations})

        monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: ModelCard("a pair"))
        tiny_assistant(4, 6).push_to_hub("org/pair")
        assert {"config.json", "model.safetensors", "modeling_d2sd.py", "formats_d2sd.py"} <= uploaded.keys()
        assert {"configuration_d2sd.py", "custom_generate/generate.py"} <= uploaded.keys()


class TestDtypeAndDevice:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_drafters_of_another_dtype_serve_the_target(self, dtype, tmp_path):
        tiny_assistant(4, 6).save_pretrained(tmp_path)
        loaded = D2SDAssistant.from_pretrained(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert generate(loaded) == generate(tiny_assistant(4, 6))

    def test_the_saved_dtype_is_the_default(self, tmp_path):
        D2SDAssistant.from_drafters(tiny_drafter(4).bfloat16(), tiny_drafter(4).bfloat16()).save_pretrained(tmp_path)
        assert D2SDAssistant.from_pretrained(tmp_path).dtype == torch.bfloat16

    def test_device_map_places_a_pair(self, tmp_path):
        tiny_assistant(4, 6).save_pretrained(tmp_path / "pair")
        places = {"first": "cpu", "second": "disk"}
        loaded = D2SDAssistant.from_pretrained(tmp_path / "pair", device_map=places, offload_folder=tmp_path / "off")
        assert loaded.second.fc.weight.device.type == "meta", "the second drafter is on the disk"
        assert generate(loaded) == generate(tiny_assistant(4, 6))
        assert loaded.last_stats.committed_per_cycle == tiny_assistant(4, 6).last_stats.committed_per_cycle

    def test_drafters_without_head_norms_with_biases_or_pruned_run(self):
        changes = dict(qk_norm=False, attention_bias=True, draft_vocab_size=9, rope_parameters=None)
        pair = D2SDAssistant.from_drafters(tiny_drafter(4, **changes), tiny_drafter(6, **changes))
        assert "q_norm" not in " ".join(pair.state_dict())
        assert generate(pair) == generate(tiny_assistant(4, 6))


class TestConfigs:
    def test_round_trip_through_auto_config(self, tmp_path):
        tiny_assistant(4, 6).config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is D2SDConfig and type(loaded.second) is D2SDDrafterConfig
        assert loaded.first.target_layer_ids == [0, 2]

    def test_a_pair_shows_the_targets_vocabulary_and_special_tokens(self):
        drafter = tiny_drafter(4, eos_token_id=2, pad_token_id=0, bos_token_id=3)
        config = D2SDAssistant.from_drafters(drafter).config.get_text_config()
        assert (config.vocab_size, config.eos_token_id, config.pad_token_id, config.bos_token_id) == (VOCAB, 2, 0, 3)

    @pytest.mark.parametrize(
        ("target_layers", "draft_layers", "expected"),
        [(36, 5, [1, 9, 17, 25, 33]), (36, 1, [18]), (30, 2, [1, 27]), (4, 3, [2])],
    )
    def test_feature_layers_spread_as_published(self, target_layers, draft_layers, expected):
        """The first line is the public Qwen3-8B drafter's."""
        assert default_target_layer_ids(target_layers, draft_layers) == expected

    def test_parameter_names_are_those_of_public_dflash_checkpoints(self):
        names = set(tiny_drafter(4, num_hidden_layers=5).state_dict())
        layer = ["input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        layer += [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
        expected = {f"layers.{i}.{part}.weight" for i in range(5) for part in layer}
        assert names == expected | {"fc.weight", "hidden_norm.weight", "norm.weight"}
        assert len(names) == 58


class TestPackage:
    def test_import_needs_torch_and_transformers_alone(self):
        """Every optional package is made to fail; the import and a tiny config still work."""
        script = """
import sys
absent = ["accelerate", "flash_attn", "kernels", "scipy", "rich", "gguf", "datasets", "torchvision", "PIL"]
sys.modules.update(dict.fromkeys(absent))
import hf_d2sd
print(hf_d2sd.D2SDDrafterConfig().block_size)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["16"], done.stderr

    def test_the_public_names_are_there(self):
        assert all(hasattr(hf_d2sd, name) for name in hf_d2sd.__all__)
        assert WIDTH == tiny_drafter(4).config.hidden_size

    def test_a_wheel_holds_both_trees(self, tmp_path):
        from pathlib import Path

        root = Path(__file__).parents[1]
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
        assert {"hf_d2sd/integration.py", "hf_d2sd/modeling/modeling_d2sd.py", "hf_d2sd/py.typed"} <= names
        assert {"hf_d2sd/hub/template.md", "hf_d2sd/modeling/formats_d2sd.py"} <= names
        assert not any(name.startswith(("tests", "modeling/")) for name in names)


class TestLayerwiseFusion:
    """Each layer weighs the target's layers in a way of its own (`feature_fusion="layerwise"`)."""

    def inputs(self, model):
        generator = torch.Generator().manual_seed(0)
        width = model.config.hidden_size
        return torch.randn(1, 4, width, generator=generator), torch.randn(1, 7, 2 * width, generator=generator)

    def test_it_begins_as_shared_fusion(self):
        shared, layerwise = tiny_drafter(), tiny_drafter(feature_fusion="layerwise")
        layerwise.load_state_dict(shared.state_dict(), strict=False)
        outputs = [model(*self.inputs(model)).last_hidden_state for model in (shared, layerwise)]
        torch.testing.assert_close(*outputs)

    def test_a_layer_sees_only_what_its_weights_let_through(self):
        model = tiny_drafter(feature_fusion="layerwise", num_hidden_layers=1)
        embeds, features = self.inputs(model)
        model.layer_weights.data.copy_(torch.tensor([[1.0, 0.0]]))
        other = features.clone()
        other[..., features.shape[-1] // 2 :] += 1  # of the second target layer
        assert model(embeds, features).last_hidden_state.equal(model(embeds, other).last_hidden_state)
        model.layer_weights.data.fill_(1.0)
        assert not model(embeds, features).last_hidden_state.equal(model(embeds, other).last_hidden_state)

    def test_it_is_saved_and_decodes_the_targets_text(self, tmp_path):
        model = tiny_drafter(feature_fusion="layerwise")
        torch.nn.init.normal_(model.layer_weights)
        model.save_pretrained(tmp_path)
        loaded = D2SDDrafterModel.from_pretrained(tmp_path)
        assert loaded.layer_weights.equal(model.layer_weights)
        plain = tiny_target().generate(prompt(), do_sample=False, max_new_tokens=16)
        pair = D2SDAssistant.from_drafters(loaded, model)
        ours = tiny_target().generate(prompt(), assistant_model=pair, do_sample=False, max_new_tokens=16)
        assert ours.tolist() == plain.tolist()

    def test_another_name_is_refused(self):
        with pytest.raises(ValueError, match="feature_fusion is 'both'"):
            tiny_drafter(feature_fusion="both")
