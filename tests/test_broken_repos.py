"""Repositories that are damaged or mean harm are refused, before memory is taken and without running anything."""

import json
import os
import pickle
import shutil
import struct
import tracemalloc

import pytest
import torch
from layouts import dflash, weights
from safetensors.torch import load_file, save_file
from tiny import tiny_assistant, tiny_drafter
from transformers import AutoModel

from hf_d2sd import D2SDAssistant, D2SDDrafterModel
from hf_d2sd.modeling.weights_d2sd import read_header


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def repo(tmp_path):
    """A saved pair."""
    tiny_assistant(4, 6).save_pretrained(tmp_path / "repo")
    return tmp_path / "repo"


def change_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, name = path.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[name] = value
    file.write_text(json.dumps(config))


def write_index(folder, *names):
    """Weights in shards by these names."""
    keys = list(load_file(folder / "model.safetensors"))
    index = {"metadata": {}, "weight_map": {key: names[i % len(names)] for i, key in enumerate(keys)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class TestPickles:
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl"])
    @pytest.mark.parametrize("layout", ["ours", "dflash"])
    def test_are_not_read_where_there_is_nothing_else(self, layout, name, repo, tmp_path):
        folder, cls = (repo, D2SDAssistant) if layout == "ours" else (dflash(tmp_path / "z"), D2SDDrafterModel)
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
        with pytest.raises(OSError, match="safetensors alone"):
            cls.from_pretrained(folder)
        assert not (tmp_path / "ran").exists()

    def test_are_not_read_through_an_index_of_their_own(self, repo, tmp_path):
        (repo / "model.safetensors").rename(repo / "x.safetensors")
        (repo / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
        (repo / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
        with pytest.raises(OSError, match="safetensors alone"):
            D2SDAssistant.from_pretrained(repo)
        assert not (tmp_path / "ran").exists()

    def test_are_not_read_through_the_index_of_safetensors(self, repo, tmp_path):
        write_index(repo, "pytorch_model.bin")
        (repo / "model.safetensors").unlink()
        (repo / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
        with pytest.raises(ValueError, match="names the file 'pytorch_model.bin'"):
            D2SDAssistant.from_pretrained(repo)
        assert not (tmp_path / "ran").exists()

    def test_are_not_read_under_the_name_of_safetensors(self, repo, tmp_path):
        torch.save({"first.fc.weight": Evil(tmp_path / "ran")}, repo / "model.safetensors")
        with pytest.raises(ValueError, match="no safetensors file"):
            D2SDAssistant.from_pretrained(repo)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["mask_embedding.pt", "adapter_config.json"])
    def test_that_a_drafter_would_lack_are_named(self, name, tmp_path):
        (dflash(tmp_path) / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
        with pytest.raises(ValueError, match=f"has a file {name}"):
            D2SDDrafterModel.from_pretrained(tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_are_not_read_on_demand(self, repo):
        with pytest.raises(ValueError, match="drop use_safetensors=False"):
            D2SDAssistant.from_pretrained(repo, use_safetensors=False)


class TestPaths:
    @pytest.mark.parametrize(
        "name", ["../other/model.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors", ""]
    )
    def test_of_an_index_stay_in_the_repository(self, name, repo, tmp_path):
        write_index(repo, name)
        (tmp_path / "other").mkdir()
        (repo / "model.safetensors").rename(tmp_path / "other" / "model.safetensors")
        with pytest.raises(ValueError, match="beside the index alone"):
            D2SDAssistant.from_pretrained(repo)

    @pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": null}}'])
    def test_of_a_damaged_index_are_refused(self, index, repo):
        (repo / "model.safetensors").unlink()
        (repo / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match="model.safetensors.index.json"):
            D2SDAssistant.from_pretrained(repo)

    def test_in_a_config_do_not_choose_the_weights(self, repo, tmp_path):
        shutil.copy(repo / "model.safetensors", tmp_path / "x.safetensors")
        change_config(repo, transformers_weights="../x.safetensors")
        with pytest.raises(ValueError, match="transformers_weights is '../x.safetensors'"):
            AutoModel.from_pretrained(repo)

    @pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "first.attn_implementation"])
    def test_in_a_config_bring_no_kernels(self, name, repo):
        change_config(repo, **{name: "evil/kernel"})
        with pytest.raises(ValueError, match="asks for the kernel 'evil/kernel'"):
            D2SDAssistant.from_pretrained(repo)

    @pytest.mark.parametrize(
        "reference", ["../evil.Model", "../../evil.Model", "/evil.Model", "..--evil.Model", "../..--evil.M"]
    )
    def test_in_auto_map_lead_to_no_file_outside(self, reference, repo, tmp_path):
        """Neither with the flag that trusts a repository's own code, nor for the installed classes."""
        (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
        change_config(repo, auto_map={"AutoConfig": reference, "AutoModel": reference})
        with pytest.raises(ValueError, match="auto_map names"):
            D2SDAssistant.from_pretrained(repo)
        with pytest.raises(ValueError, match="auto_map names"):
            AutoModel.from_pretrained(repo, trust_remote_code=True)
        assert not (tmp_path / "ran").exists()

    def test_shards_beside_the_index_are_read(self, repo):
        tensors = load_file(repo / "model.safetensors")
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        write_index(repo, *names)
        for i, name in enumerate(names):
            save_file(dict(list(tensors.items())[i::2]), repo / name, metadata={"format": "pt"})
        (repo / "model.safetensors").unlink()
        state = D2SDAssistant.from_pretrained(repo).state_dict()
        assert all(torch.equal(state[name], value) for name, value in tensors.items())


class TestSizes:
    @pytest.mark.parametrize(
        "changes",
        [
            {"first.hidden_size": 10**9, "second.hidden_size": 10**9},
            {"first.intermediate_size": 10**15},
            {"first.num_hidden_layers": 900, "first.layer_types": None},
            {"first.num_attention_heads": 10**9},
            {"first.target_layer_ids": [0, 1, 2, 3] * 100},
            {"first.draft_vocab_size": 10**9, "first.vocab_size": 10**10, "second.vocab_size": 10**10},
            {"first.head_dim": 10**12},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_that_the_weights_do_not_have_are_refused_before_memory_is_taken(self, changes, repo):
        change_config(repo, **changes)
        tracemalloc.start()
        with pytest.raises(ValueError, match="not those of its config: tensors"):
            D2SDAssistant.from_pretrained(repo)
        assert tracemalloc.get_traced_memory()[1] < 2**27
        tracemalloc.stop()

    @pytest.mark.parametrize(
        ("name", "value"), [("num_hidden_layers", 10**12), ("block_size", 10**9), ("hidden_size", 0), ("head_dim", -8)]
    )
    def test_that_nothing_has_are_refused_with_the_config(self, name, value, repo):
        change_config(repo, **{f"first.{name}": value, f"second.{name}": value, "first.layer_types": None})
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            D2SDAssistant.from_pretrained(repo)

    def test_in_a_public_dflash_checkpoint_are_compared_too(self, tmp_path):
        with pytest.raises(ValueError, match=r"mismatched: .*fc.weight \(32, 64\) for \(1000000, 2000000\)"):
            D2SDDrafterModel.from_pretrained(dflash(tmp_path, hidden_size=10**6))


class TestDamagedWeights:
    @pytest.mark.parametrize("kept", [0, 4, 8, 100, -1, -100])
    def test_that_are_cut_short_are_refused(self, kept, repo):
        file = repo / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(ValueError, match="model.safetensors is (no|damaged)"):
            D2SDAssistant.from_pretrained(repo)

    def test_whose_header_claims_more_than_the_file_has_are_refused(self, tmp_path):
        header = json.dumps({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}).encode()
        file = tmp_path / "x.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        with pytest.raises(ValueError, match="4000000000000000000 bytes, and there are 4"):
            read_header(file)

    @pytest.mark.parametrize("header", ["[]", "{", '{"a": 3}', '{"a": {"dtype": "F32"}}', '{"a": {"dtype": "X"}}'])
    def test_whose_header_is_none_are_refused(self, header, tmp_path):
        file = tmp_path / "x.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
        with pytest.raises(ValueError, match="no safetensors file"):
            read_header(file)

    def test_the_header_says_what_the_file_holds(self, tmp_path):
        save_file(weights(), tmp_path / "x.safetensors")
        shapes = {name: ("F32", tuple(tensor.shape)) for name, tensor in weights().items()}
        assert read_header(tmp_path / "x.safetensors") == shapes

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_that_are_not_finite_are_refused_by_name(self, value, tmp_path):
        tensors = weights()
        tensors["norm.weight"][3] = value
        with pytest.raises(ValueError, match="not finite: norm.weight"):
            D2SDDrafterModel.from_pretrained(dflash(tmp_path, tensors=tensors))

    @pytest.mark.parametrize("ids", [[3, 1, 24], [3, 1, -1], [3, 1, 3]])
    def test_whose_draft_vocabulary_is_not_the_targets_are_refused(self, ids, tmp_path):
        drafter = tiny_drafter(draft_vocab_size=3)
        drafter.draft_token_ids.copy_(torch.tensor(ids))
        drafter.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="draft_token_ids of .* must hold different ids of the 24 tokens"):
            D2SDDrafterModel.from_pretrained(tmp_path)

    def test_whose_numbers_are_of_another_kind_are_refused(self, tmp_path):
        tensors = weights()
        tensors["fc.weight"] = tensors["fc.weight"].long()
        with pytest.raises(ValueError, match="mismatched: fc.weight"):
            D2SDDrafterModel.from_pretrained(dflash(tmp_path, tensors=tensors))
