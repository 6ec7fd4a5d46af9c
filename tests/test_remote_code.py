"""A saved pair is remote code: it loads without this package, says what is missing, and works with it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny import prompt, tiny_assistant, tiny_drafter, tiny_target

from hf_d2sd.hub.generate import generate
from hf_d2sd.modeling.modeling_d2sd import CUSTOM_GENERATE

ROOT = Path(__file__).resolve().parents[1]
SAVED_FILES = [
    "compat_d2sd.py",
    "config.json",
    "configuration_d2sd.py",
    "custom_generate",
    "formats_d2sd.py",
    "model.safetensors",
    "modeling_d2sd.py",
    "weights_d2sd.py",
]
WITHOUT_PACKAGE = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hf_d2sd":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocked())
"""
LOAD = """
    import json, os, sys, torch, transformers
    torch.set_num_threads(1)
    report = {}
    target = transformers.AutoModelForCausalLM.from_pretrained("target").eval()
    assistant = transformers.AutoModel.from_pretrained("pair", trust_remote_code=True)
    report["module"] = type(assistant).__module__
    prompt = torch.tensor(json.load(open("prompt.json")))
    options = dict(do_sample=False, max_new_tokens=16)
"""
INSPECT = """
    from safetensors.torch import load_file
    saved, state = load_file("pair/model.safetensors"), assistant.state_dict()
    report["loaded"] = len(saved) > 20 and all(torch.equal(state[name], value) for name, value in saved.items())
    report["block_sizes"] = [drafter.config.block_size for drafter in assistant.drafters]
    report["imported"] = "hf_d2sd" in sys.modules
    try:
        target.generate(prompt, assistant_model=assistant, **options)
    except ImportError as error:
        report["refusal"] = str(error)
    drafter = transformers.AutoModel.from_pretrained("first", trust_remote_code=True)
    out = target.generate(prompt, assistant_model=drafter, speculation_type="dflash", **options)
    report["native"] = out[0].tolist()
    again = os.environ["HF_HOME"] + "/again"
    assistant.save_pretrained(again)
    report["files_again"] = sorted(os.listdir(again))
    other = transformers.AutoModel.from_pretrained(again, trust_remote_code=True)
    report["same_again"] = all(torch.equal(state[name], value) for name, value in other.state_dict().items())
"""
GENERATE = """
    report["sequence"] = target.generate(prompt, assistant_model=assistant, d2sd_auto=False, **options)[0].tolist()
    report["committed"] = assistant.last_stats.committed_per_cycle
"""
CUSTOM = """
    options["trust_remote_code"] = True
    report["sequence"] = target.generate(prompt, custom_generate="pair", d2sd_auto=False, **options)[0].tolist()
    report["committed"] = sys.modules["hf_d2sd.hub.generate"]._load("pair", ()).last_stats.committed_per_cycle
    sampled = dict(options, do_sample=True, return_dict_in_generate=True)
    torch.manual_seed(0)
    report["sampled"] = target.generate(prompt, custom_generate="pair", **sampled).sequences[0].tolist()
    try:
        target.generate(prompt, custom_generate="pair", assistant_model=assistant, **options)
    except ValueError as error:
        report["both"] = str(error)
"""
REPORT = "\nprint('REPORT', json.dumps(report))\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target and drafters, as their Hub repositories would hold them."""
    folder = tmp_path_factory.mktemp("hub")
    tiny_target().save_pretrained(folder / "target")
    tiny_assistant(4, 6).save_pretrained(folder / "pair")
    tiny_drafter().save_pretrained(folder / "first")
    (folder / "prompt.json").write_text(json.dumps(prompt().tolist()))
    return folder


def run(folder, home, *parts: str) -> subprocess.CompletedProcess:
    """A fresh Python in the folder, with an empty HF_HOME, and without the tests' own modules."""
    environment = dict(os.environ, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    environment.pop("HF_MODULES_CACHE", None)
    code = "\n".join(map(textwrap.dedent, parts))
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def report_of(result: subprocess.CompletedProcess) -> dict:
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.split("REPORT")[1])


@pytest.fixture(scope="module")
def without_package(folder, tmp_path_factory):
    return report_of(run(folder, tmp_path_factory.mktemp("home"), WITHOUT_PACKAGE, LOAD, INSPECT, REPORT))


@pytest.fixture(scope="module")
def with_package(folder, tmp_path_factory):
    """No `import hf_d2sd` is written there."""
    return report_of(run(folder, tmp_path_factory.mktemp("home"), LOAD, GENERATE, REPORT))


@pytest.fixture(scope="module")
def by_custom_generate(folder, tmp_path_factory):
    return report_of(run(folder, tmp_path_factory.mktemp("home"), LOAD, CUSTOM, REPORT))


def greedy() -> list[int]:
    return tiny_target().generate(prompt(), do_sample=False, max_new_tokens=16)[0].tolist()


@pytest.mark.parametrize("card", sorted((ROOT / "hub_cards").glob("*/config.json")), ids=lambda path: path.parent.name)
def test_a_pair_in_the_repository_holds_the_code_of_today(card):
    """`make cards` copies the files; where `custom_generate/` differs, save the pair again."""
    for source in (ROOT / "modeling").glob("*_d2sd.py"):
        assert (card.parent / source.name).read_text() == source.read_text(), source.name
    for name, text in CUSTOM_GENERATE.items():
        assert (card.parent / "custom_generate" / name).read_text() == text, name


def test_the_folder_holds_all_it_needs(folder):
    assert sorted(path.name for path in (folder / "pair").iterdir()) == SAVED_FILES


class TestWithoutThePackage:
    def test_it_loads_with_the_saved_weights(self, without_package):
        assert without_package["module"].startswith("transformers_modules")
        assert not without_package["imported"]
        assert without_package["loaded"]
        assert without_package["block_sizes"] == [4, 6]

    def test_decoding_says_what_to_install_and_to_import(self, without_package):
        assert "pip install hf-d2sd" in without_package["refusal"]
        assert "import hf_d2sd" in without_package["refusal"]

    def test_a_single_drafter_decodes_natively(self, without_package):
        assert without_package["native"] == greedy()

    def test_it_saves_its_code_again(self, without_package):
        assert without_package["files_again"] == SAVED_FILES
        assert without_package["same_again"]

    def test_nothing_runs_without_trust(self, folder, tmp_path):
        result = run(
            folder,
            tmp_path,
            WITHOUT_PACKAGE,
            "import transformers",
            "transformers.AutoModel.from_pretrained('pair', trust_remote_code=False)",
        )
        assert result.returncode != 0
        assert "trust_remote_code" in result.stderr
        assert not list(tmp_path.rglob("modeling_d2sd.py"))


class TestWithThePackage:
    def test_auto_model_alone_is_enough_to_decode(self, with_package):
        assert with_package["module"].startswith("transformers_modules")
        assert with_package["sequence"] == greedy()

    def test_remote_and_installed_classes_draft_alike(self, with_package):
        options = dict(do_sample=False, max_new_tokens=16, d2sd_auto=False)  # no clock decides
        tiny_target().generate(prompt(), assistant_model=tiny_assistant(4, 6), **options)
        assert with_package["committed"] == tiny_assistant(4, 6).last_stats.committed_per_cycle

    def test_once_it_is_imported_the_installed_class_is_used(self, folder, tmp_path):
        report = report_of(run(folder, tmp_path, "import hf_d2sd", LOAD, GENERATE, REPORT))
        assert report["module"].startswith("hf_d2sd")
        assert report["sequence"] == greedy()


class TestCustomGenerate:
    """`target.generate(..., custom_generate=REPOSITORY, trust_remote_code=True)`."""

    def test_it_decodes_with_the_repositorys_pair(self, by_custom_generate):
        assert by_custom_generate["sequence"] == greedy()
        options = dict(do_sample=False, max_new_tokens=16, d2sd_auto=False)  # no clock decides
        tiny_target().generate(prompt(), assistant_model=tiny_assistant(4, 6), **options)
        assert by_custom_generate["committed"] == tiny_assistant(4, 6).last_stats.committed_per_cycle

    def test_other_options_are_handed_on(self, by_custom_generate):
        torch.manual_seed(0)
        plain = tiny_target().generate(prompt(), do_sample=True, max_new_tokens=16)
        assert by_custom_generate["sampled"] == plain[0].tolist()

    def test_another_assistant_beside_it_is_refused(self, by_custom_generate):
        assert "either it or assistant_model" in by_custom_generate["both"]

    def test_without_the_package_it_says_what_to_install(self, folder, tmp_path):
        call = "target.generate(prompt, custom_generate='pair', trust_remote_code=True, **options)"
        result = run(folder, tmp_path, WITHOUT_PACKAGE, LOAD, call)
        assert result.returncode != 0
        assert "hf_d2sd" in result.stderr and "pip install hf_d2sd" in result.stderr

    def test_nothing_runs_without_trust(self, folder, tmp_path):
        call = """
            import torch, transformers
            target = transformers.AutoModelForCausalLM.from_pretrained("target")
            target.generate(torch.tensor([[2, 3]]), custom_generate="pair", trust_remote_code=False)
        """
        result = run(folder, tmp_path, call)
        assert result.returncode != 0
        assert "trust_remote_code" in result.stderr
        assert not list(tmp_path.rglob("generate.py"))

    def test_a_caller_that_names_no_repository_is_told_so(self):
        with pytest.raises(ValueError, match="cannot be known which pair"):
            generate(tiny_target(), prompt())
