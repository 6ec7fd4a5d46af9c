"""docs/api.md names everything that is public; what the pages tell to run is there, with the options they name."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import PreTrainedConfig

import hf_d2sd
from hf_d2sd.benchmark.options import BenchOptions
from hf_d2sd.options import markdown_table, option_fields

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]


def is_named(name: str) -> bool:
    return re.search(rf"`[^`]*\b{name}\b[^`]*`", REFERENCE) is not None


def test_every_public_name_stands_there():
    assert [name for name in hf_d2sd.__all__ if not is_named(name)] == []


def test_every_option_has_a_row_with_its_default():
    rows = dict(re.findall(r"^\| `(d2sd_\w+)` \| (.+) \|$", REFERENCE, re.M))
    assert set(rows) == {f"d2sd_{option.name}" for option in option_fields()}
    assert all(row.count(" | ") == 2 and all(cell.strip() for cell in row.split(" | ")) for row in rows.values())


def test_the_table_of_options_is_made_from_their_declarations():
    """`python -c 'from hf_d2sd.options import markdown_table; print(markdown_table())'` prints it anew."""
    assert markdown_table() in REFERENCE


@pytest.mark.parametrize("owner", [hf_d2sd.D2SDStats, hf_d2sd.Cycle])
def test_every_number_of_a_call_stands_there(owner):
    properties = [name for name, value in vars(owner).items() if isinstance(value, property)]
    names = [field.name for field in fields(owner)] + properties
    assert [name for name in names if not is_named(name)] == []


@pytest.mark.parametrize("owner", [hf_d2sd.D2SDConfig, hf_d2sd.D2SDDrafterConfig])
def test_every_setting_of_a_config_stands_there(owner):
    inherited = {field.name for field in fields(PreTrainedConfig)}
    own = [field.name for field in fields(owner) if field.name not in inherited]
    assert len(own) > 5 and [name for name in own if not is_named(name)] == []


def commands(page: Path) -> list[list[str]]:
    """What a page tells to run, in its blocks and between its lines."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.M | re.S)
    inline = re.findall(r"`((?:python|make) [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        shlex.split(line, comments=True) for line in [*lines, *inline] if line.startswith(("python", "make", "hf-"))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_and_targets_that_pages_name_are_there(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for words in commands(page):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "python" and words[1].endswith(".py"):
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            options = [word for word in words[2:] if word.startswith("--")]
            known = {f"--{field.name}" for field in fields(BenchOptions)} if 'main(["bench"' in source else set()
            known |= {f"--{name}" for name in re.findall(r"^    (\w+): ", source, re.M)}  # of a class of options
            assert all(f'"{option}"' in source or option in known for option in options), words


def test_pages_name_some_commands():
    """Else the test above would see nothing."""
    assert len(commands(ROOT / "README.md")) > 2 and len(commands(ROOT / "docs" / "results.md")) > 3
    assert sum(len(commands(page)) for page in PAGES) > 35


def test_pre_commit_runs_the_ruff_of_the_project():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (ruff,) = re.findall(r'^quality = \[.*"(ruff==[\d.]+)"', project, re.M)
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"ruff==[\d.]+", config) == [ruff, ruff]
