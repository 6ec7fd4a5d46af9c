"""What README.md, docs/ and cards show works: their Python runs, and their commands have the options they name."""

import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, HfArgumentParser
from words import save_word_target

from hf_d2sd.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "hub_cards").glob("*/README.md"))]


def blocks(page: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [block for name, block in fenced if name == language]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the names that the pages use are there."""
    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2 import NAME, load_smollm2

    folder = tmp_path_factory.mktemp("workplace")
    load_smollm2()
    cache = Path(os.environ.get("HF_D2SD_CACHE") or Path.home() / ".cache" / "hf-d2sd")
    (folder / "HuggingFaceTB").mkdir()
    (folder / "HuggingFaceTB" / NAME).symlink_to(cache / NAME)
    (folder / "hub_cards").symlink_to(ROOT / "hub_cards")
    target = save_word_target(folder / "TARGET")
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.mask_token = "<think>"  # 31 words leave none unused
    tokenizer.save_pretrained(target)
    letters = "abcdefghijklmn"
    lines = [json.dumps({"prompt": f"{a} {b}"}) + "\n" for a in letters for b in letters]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: f"{page.parent.name}/{page.name}"
)
def test_python_runs(page, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    assert capsys.readouterr().out.strip(), "an example that shows nothing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_commands_have_the_options_that_are_named(page, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-d2sd"])
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.startswith("hf-d2sd ") else []
            if words and words[1] in COMMANDS:
                module, options, _ = COMMANDS[words[1]]
                parser = HfArgumentParser(getattr(importlib.import_module(f"hf_d2sd.{module}"), options))
                parser.parse_args_into_dataclasses(words[2:])


def test_engines_are_told_of_folders_that_export_writes():
    """vLLM and SGLang want a GPU: their commands are read here, and held against those before them on the page."""
    (exports, vllm, sglang) = blocks(ROOT / "docs" / "serving.md", "")
    written = re.findall(r"--format (\w+)(?: --target \w+)? --out (\S+)", exports)
    folders = {out for format, out in written if format == "dflash"}
    words = shlex.split(vllm.replace("\\\n", " "))
    config = json.loads(words[words.index("--speculative-config") + 1])
    assert words[:3] == ["vllm", "serve", "TARGET"] and config["method"] == "dflash" and config["model"] in folders
    words = shlex.split(sglang.replace("\\\n", " "))
    option = dict(zip(words, words[1:]))
    assert option["-m"] == "sglang.launch_server" and option["--speculative-algorithm"] == "DFLASH"
    assert option["--speculative-draft-model-path"] in folders
    assert int(option["--speculative-num-draft-tokens"]) == config["num_speculative_tokens"] + 1  # γ, and γ - 1


# What makes a command of the pages one of seconds, after its own options.
SMALLER = {
    "distill": "--self_prompts 12 --max_new_tokens 16 --dtype float32",
    "train": "--max_steps 2 --rows 2 --anchors 4 --eval_rows 1 --eval_tokens 4 --dtype float32 --mixed_precision no",
    "calibrate": "--dtype float32",
    "bench": "--max_samples 1 --max_new_tokens 6 --strategies d2sd --probes 1",
    "generate": "--max_new_tokens 6",
    "chat": "--max_new_tokens 6",
    "explain": "--max_new_tokens 6",
    "doctor": "--max_new_tokens 6 --max_prompts 1",
}
MADE = {"PAIR": "pair", "FIRST": "runs/first/best", "SECOND": "runs/second/best"}


@pytest.mark.slow
def test_commands_run(workplace, monkeypatch, capsys):
    """Every command of README.md and docs/, in the order of the pages, so that they find what those before made."""
    monkeypatch.chdir(workplace)
    (workplace / "benchmarks").symlink_to(ROOT / "benchmarks")
    (workplace / "question.txt").write_text("a b c")
    (workplace / "details.md").write_text("## Training\n\nNone.\n")
    (workplace / "results.json").write_text((ROOT / "benchmarks/results/acceptance-smollm2.json").read_text())
    ran = []
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if line.startswith("hf-d2sd ") else []
                if not words or (words[1] == "push" and "--dry_run" not in words):
                    continue
                if words[1] in ("generate", "chat", "explain", "doctor"):  # by then the pair is there
                    words = [
                        {"PAIR": "pair", "FIRST": "runs/first/best", "SECOND": "runs/second/best"}.get(w, w)
                        for w in words
                    ]
                ran.append((page, words))
    ran.sort(key=lambda entry: entry[1][1] not in ("distill", "train", "calibrate", "join"))
    for page, words in ran:
        monkeypatch.setattr("sys.stdin", io.StringIO("a b\n"))
        try:
            main(words[1:] + shlex.split(SMALLER.get(words[1], "")))
        except SystemExit as end:  # doctor finds that two steps make no drafter
            assert words[1] == "doctor" and end.code in (0, 1), (page.name, words, end)
    assert {words[1] for _, words in ran} >= set(COMMANDS) - {"report"}
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_what_pages_let_pip_install_can_be_installed(bare_python, tmp_path):
    pages = [*PAGES, ROOT / "examples" / "space" / "README.md"]
    commands = {
        found for page in pages for found in re.findall(r"pip install '?\.[\w\[\]]*", page.read_text(encoding="utf-8"))
    }
    assert {command.split(".")[1] for command in commands} >= {"", "[train]", "[demo]", "[bench]", "[space]"}
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    for command in sorted(commands):
        where = command.removeprefix("pip install ").strip("'")
        install = [bare_python, "-m", "pip", "install", "--quiet", where]
        subprocess.run(install, cwd=tmp_path / "clone", check=True, timeout=600)
    said = subprocess.run(
        [bare_python.parent / "hf-d2sd", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "distill" in said.stdout


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_between_files_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            there = page.parent / link if link else page
            assert there.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(there), f"{page.name}: {link}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_result_files_that_are_cited_are_there(page):
    for name in re.findall(r"`(benchmarks/results/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 800
    assert len(re.findall(r"^\|[-|]+\|$", text, re.M)) == 1, "one table"


@pytest.mark.parametrize(("table", "run"), enumerate(["bench-smollm2-float32", "bench-smollm2-bfloat16"]))
def test_speeds_are_those_of_the_result_file(table, run):
    """Rows in the order of the run, but plain decoding, which all are measured against."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("\n## Speed\n")[1]
    rows = [line.split(" | ")[1:] for line in page.split("|---|\n")[1 + table].split("\n\n")[0].splitlines()]
    folder = ROOT / "benchmarks" / "results" / run
    cells = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["cells"]
    assert len(rows) == len(cells) - 1
    for shown, (name, groups) in zip(rows, list(cells.items())[1:]):
        speed, positions = groups["all"]["speed"], groups["all"]["rows"]
        expected = [f"{speed['value']:.2f} ({speed['low']:.2f}–{speed['high']:.2f})"]
        expected += [f"{groups['all']['alpha']['value']:.2f}", "–" if positions is None else f"{positions:.1f}"]
        expected += [f"{groups[suite]['speed']['value']:.2f}" for suite in list(groups) if suite.endswith("_dev")]
        assert [cell.strip(" |") for cell in shown] == expected, name
