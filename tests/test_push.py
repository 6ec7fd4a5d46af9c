"""A pair goes to the Hub and comes back; what does not belong there stays here."""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from hub_stand_in import TOKEN, hub_stand_in
from layouts import dflash
from safetensors.torch import load_file, save_file
from tiny import prompt, tiny_assistant, tiny_drafter, tiny_target

from hf_d2sd.cli import main
from hf_d2sd.hub.push import PushOptions, checked_files, push

CODE = ["compat_d2sd.py", "configuration_d2sd.py", "formats_d2sd.py", "modeling_d2sd.py", "weights_d2sd.py"]
CUSTOM = ["custom_generate/generate.py", "custom_generate/requirements.txt"]
FILES = sorted(["README.md", "config.json", "model.safetensors", "plot.png", *CODE, *CUSTOM])
SCRIPT = """
    import json, sys, torch, transformers
    from hf_d2sd.cli import main
    torch.set_num_threads(1)
    arguments = ["push", "--model", "pair", "--repo", "org/pair"]
    main([*arguments, "--dry_run", "--private"])
    main([*arguments, "--private"])
    main([*arguments, "--message", "Again"])
    from hf_d2sd import D2SDAssistant
    assistant = D2SDAssistant.from_pretrained("org/pair")
    drafter = D2SDAssistant.from_drafters("org/first").first
    target = transformers.AutoModelForCausalLM.from_pretrained("target").eval()
    inputs, options = torch.tensor(json.load(open("prompt.json"))), dict(do_sample=False, max_new_tokens=16)
    assistant.save_pretrained("saved", push_to_hub=True, repo_id="org/saved", private=True, commit_message="Saved")
    report = {
        "assistant": target.generate(inputs, assistant_model=assistant, **options)[0].tolist(),
        "custom": target.generate(inputs, custom_generate="org/pair", trust_remote_code=True, **options)[0].tolist(),
        "sum": float(drafter.fc.weight.sum()),
    }
    print("REPORT", json.dumps(report))
"""


@pytest.fixture
def pair(tmp_path):
    """A folder that may be pushed."""
    folder = tmp_path / "pair"
    tiny_assistant(4, 6).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A pair\n")
    (folder / "plot.png").write_bytes(b"\x89PNG")
    return folder


class TestThereAndBack:
    @pytest.fixture(scope="module")
    @staticmethod
    def round_trip(tmp_path_factory):
        """Push, push again, load and decode, in a fresh Python whose Hub is the stand-in."""
        place = tmp_path_factory.mktemp("place")
        tiny_target().save_pretrained(place / "target")
        tiny_assistant(4, 6).save_pretrained(place / "pair")
        (place / "pair" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A pair\n")
        (place / "prompt.json").write_text(json.dumps(prompt().tolist()))
        with hub_stand_in() as (hub, address):
            hub.repos["org/first"] = {path.name: path.read_bytes() for path in dflash(place / "first").iterdir()}
            environment = dict(os.environ, HF_ENDPOINT=address, HF_TOKEN=TOKEN, HF_HOME=str(place / "home"))
            environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
            command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
            done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in done.stdout.split("REPORT")[0].splitlines()]
        return place, hub, lines, json.loads(done.stdout.split("REPORT")[1])

    def test_the_repository_holds_the_folder(self, round_trip):
        place, hub, _, _ = round_trip
        files = {path.relative_to(place / "pair").as_posix(): path for path in (place / "pair").rglob("*.*")}
        assert hub.repos["org/pair"] == {name: path.read_bytes() for name, path in files.items()}
        assert hub.private["org/pair"]

    def test_weights_go_by_the_way_of_large_files(self, round_trip):
        place, hub, _, _ = round_trip
        assert [*hub.objects.values()] == [(place / "pair" / "model.safetensors").read_bytes()]

    def test_a_dry_run_lists_files_and_sizes_and_asks_nothing_of_the_hub(self, round_trip):
        place, hub, lines, _ = round_trip
        assert lines[0]["dry_run"]
        sizes = {name: (place / "pair" / name).stat().st_size for name in hub.repos["org/pair"]}
        assert lines[0]["files"] == lines[1]["files"] == sizes
        assert sum(request.endswith("/repos/create") for request in hub.requests) == 3  # two pushes, and a saving
        assert "commit" not in lines[0] and "org/pair/commit/" in lines[1]["commit"]

    def test_it_is_loaded_from_there_and_decodes_the_targets_text(self, round_trip):
        _, hub, _, report = round_trip
        plain = tiny_target().generate(prompt(), do_sample=False, max_new_tokens=16)[0].tolist()
        assert report["assistant"] == plain
        assert report["custom"] == plain
        assert "GET /org/pair/resolve/main/config.json" in [
            r.replace(hub.sha("org/pair"), "main") for r in hub.requests
        ]

    def test_saving_with_push_to_hub_uploads_the_same_files(self, round_trip):
        place, hub, _, _ = round_trip
        names = set(CODE + CUSTOM) | {"config.json", "model.safetensors"}
        assert {name: hub.repos["org/saved"].get(name) for name in names} == {
            name: (place / "saved" / name).read_bytes() for name in names
        }
        assert hub.private["org/saved"]

    def test_a_public_dflash_repository_is_read_from_there(self, round_trip):
        place, _, _, report = round_trip
        assert report["sum"] == pytest.approx(
            float(load_file(place / "first" / "model.safetensors")["fc.weight"].sum())
        )


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("pytorch_model.bin", pickle.dumps({}), "a pickle"),
            ("training_state.pt", b"", "a pickle"),
            ("optimizer.pkl", b"", "a pickle"),
            (".env", b"HF_TOKEN=x", "does not belong"),
            ("notes.txt", b"", "does not belong"),
            ("id_rsa", b"", "does not belong"),
            ("other.py", b"", "does not belong"),
            ("sub/config.json", b"{}", "does not belong"),
            ("modeling_d2sd.py", b"import os", "not this release's code"),
            ("custom_generate/generate.py", b"import os", "not this release's code"),
            ("README.md", b"my token is hf_" + b"a1B2" * 9, "holds what looks like a secret"),
            ("results.json", b'{"key": "-----BEGIN RSA PRIVATE KEY-----"}', "holds what looks like a secret"),
        ],
    )
    def test_files_that_do_not_belong_there(self, name, content, reason, pair):
        (pair / name).parent.mkdir(exist_ok=True)
        (pair / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} .{reason}"):
            push(PushOptions(model=pair, repo="org/x", dry_run=True))

    def test_every_one_of_them_is_named(self, pair):
        for name in ("a.bin", "b.txt"):
            (pair / name).write_bytes(b"")
        with pytest.raises(ValueError, match="a.bin .*, b.txt "):
            checked_files(pair)

    def test_links(self, pair, tmp_path):
        (tmp_path / "secret.png").write_bytes(b"")
        (pair / "plot2.png").symlink_to(tmp_path / "secret.png")
        with pytest.raises(ValueError, match="plot2.png .a link"):
            checked_files(pair)

    def test_a_folder_without_a_card(self, pair):
        (pair / "README.md").unlink()
        with pytest.raises(ValueError, match="README.md .missing: make it by hf-d2sd card"):
            checked_files(pair)

    def test_weights_that_are_not_the_configs(self, pair):
        tensors = load_file(pair / "model.safetensors")
        save_file({**tensors, "x": torch.zeros(1)}, pair / "model.safetensors")
        with pytest.raises(ValueError, match="unexpected: x"):
            checked_files(pair)

    def test_a_folder_that_holds_another_model(self, tmp_path):
        tiny_target().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no pair and no drafter of this library: its model_type is 'llama'"):
            checked_files(tmp_path)


def test_a_pair_and_a_single_drafter_may_be_pushed(pair, tmp_path):
    assert checked_files(pair) == FILES
    tiny_drafter().save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "README.md").write_text("# One")
    assert checked_files(tmp_path / "one") == sorted(["README.md", "config.json", "model.safetensors", *CODE])


def test_the_command_says_what_is_wrong_in_one_line(pair):
    (pair / "a.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match="hf-d2sd push: .*a.bin"):
        main(["push", "--model", str(pair), "--repo", "org/x", "--dry_run"])
