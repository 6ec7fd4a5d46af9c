"""The notebooks of examples/: they run from top to bottom, and what they show is kept without a trace of a machine."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SAME = "the same text as plain: True"


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook) -> str:
    """All that a notebook prints."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def test_there_are_four():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {"quick_start", "train_your_own", "how_d2sd_works", "benchmark"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestKept:
    def test_every_cell_compiles(self, path):
        for cell in code_cells(nbformat.read(path, as_version=4)):
            compile(TransformerManager().transform_cell(cell.source), path.name, "exec")

    def test_outputs_are_those_of_one_run_without_errors(self, path):
        cells = code_cells(nbformat.read(path, as_version=4))
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        kinds = [output.output_type for cell in cells for output in cell.outputs]
        assert len(kinds) >= 5 and "error" not in kinds

    def test_no_folder_of_a_machine_and_no_widget_stands_in_it(self, path):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"/(?:root|home|Users|tmp|work|opt|usr|var)/\S*", text)
        assert "widget" not in text

    def test_it_is_small(self, path):
        assert path.stat().st_size < 500_000

    def test_links_lead_somewhere(self, path):
        for cell in nbformat.read(path, as_version=4).cells:
            for link in re.findall(r"\]\(([^)#]+)\)", cell.source) if cell.cell_type == "markdown" else []:
                assert link.startswith("http") or (FOLDER / link).exists(), link

    def test_the_first_cell_installs_only_where_the_library_is_missing(self, path):
        first = code_cells(nbformat.read(path, as_version=4))[0].source
        setup = code_cells(nbformat.read(NOTEBOOKS[0], as_version=4))[0].source
        assert first == setup and 'find_spec("hf_d2sd") is None' in first


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in a clone", "elsewhere", "elsewhere, without an address"])
def test_the_first_cell_installs_the_library(bare_python, tmp_path, where):
    """As a newcomer runs it; pip builds the package and finds its requirements there."""
    cell = code_cells(nbformat.read(NOTEBOOKS[0], as_version=4))[0].source
    folder = tmp_path / "clone" / "examples" if where == "in a clone" else tmp_path / "content"
    if where == "in a clone":
        subprocess.run(["git", "clone", "--quiet", FOLDER.parent, tmp_path / "clone"], check=True)
    else:
        folder.mkdir()
    if where == "elsewhere":
        assert 'REPOSITORY = ""' in cell
        cell = cell.replace('REPOSITORY = ""', f'REPOSITORY = "file://{FOLDER.parent}"')
    check = "import hf_d2sd, os; print(hf_d2sd.__file__, os.path.exists('../hub_cards'))"
    (folder / "cell.ipy").write_text(f"{cell}\n{check}\n")
    done = subprocess.run(
        [bare_python, "-m", "IPython", "--no-banner", "cell.ipy"], cwd=folder, capture_output=True, text=True
    )
    if where.endswith("address"):
        assert "Set REPOSITORY to the address that `git clone` takes" in done.stdout + done.stderr
    else:
        found, pair_is_there = done.stdout.splitlines()[-1].split()
        assert Path(found).is_relative_to(tmp_path / "venv") and pair_is_there == "True", done.stdout + done.stderr


@pytest.fixture
def run(smollm2_folder, monkeypatch, tmp_path):
    """Runs a notebook on the local target; returns what it printed."""
    for name, value in (("D2SD_TARGET", smollm2_folder), ("OMP_NUM_THREADS", 1), ("IPYTHONDIR", tmp_path)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.syspath_prepend(str(FOLDER))
    from run_notebooks import run

    return lambda name: shown(run(FOLDER / f"{name}.ipynb"))


def test_quick_start_runs(run):
    text = run("quick_start")
    assert text.count(SAME) == 2 and "texts: 1" in text
    passes = re.search(r"(\d+) passes of the target, or (\d+) with drafters", text)
    assert int(passes[2]) < int(passes[1])


@pytest.mark.slow
def test_how_d2sd_works_runs(run):
    text = run("how_d2sd_works")
    assert "plain decoding writes the same: True" in text and "r sums to 1.0" in text


@pytest.mark.slow
def test_train_your_own_runs_and_its_pair_pays(run):
    text = run("train_your_own")
    assert text.count("same text as plain: 20 of 20") == 3
    first, both, wide = map(float, re.findall(r"([\d.]+) tokens a pass", text))
    assert 1.5 < first < both < wide


@pytest.mark.slow
def test_benchmark_runs_and_counts_alike(run):
    """Transformers' own loop and K = 0 check the same chain of the same drafter, give or take a pass."""
    text = run("benchmark")
    assert text.count("the same text as plain for 6 of 6 prompts") == 6
    table = text.partition("nodes\n")[2].splitlines()[:6]
    rows = {line[:20].strip(): list(map(float, line[20:].split())) for line in table}
    assert rows["plain"] == [1.0] * 4
    assert rows["native DFlash"][:3] == pytest.approx(rows["first alone, K = 0"][:3], rel=0.05)
    assert all(d2sd > first for d2sd, first in zip(rows["D²SD, K = 4"], rows["first alone, K = 0"]))


def test_a_notebook_is_tidied(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from run_notebooks import tidy

    streams = [nbformat.v4.new_output("stream", name=n, text=f"in {sys.prefix}/lib") for n in ("stdout", "stderr")]
    data = {"text/plain": str(FOLDER), "application/vnd.jupyter.widget-view+json": {"model_id": "0"}}
    result = nbformat.v4.new_output("execute_result", data=data, execution_count=1)
    cell = nbformat.v4.new_code_cell("pass", outputs=[*streams, result], metadata={"timing": 1})
    tidied = tidy(
        nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": "3"}})
    )
    assert [output.get("text") or dict(output.data) for output in tidied.cells[0].outputs] == [
        "in venv/lib",
        {"text/plain": "./examples"},
    ]
    assert not tidied.cells[0].metadata and set(tidied.metadata) == {"kernelspec"}
