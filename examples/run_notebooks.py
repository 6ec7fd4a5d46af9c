"""Run the notebooks from top to bottom and keep what they show.

    D2SD_TARGET=$(python examples/smollm2.py) python examples/run_notebooks.py quick_start.ipynb

Without names it runs all of them. Without D2SD_TARGET the target comes from the Hub.
"""

import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
# Folders of this machine, the inner ones first, and what is shown instead.
_PRIVATE = ((sys.prefix, "venv"), (str(FOLDER.parent), "."), (str(Path.home()), "~"), (tempfile.gettempdir(), "tmp"))


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs; an error in a cell is raised.

    Its files land in the notebook's own folder, where it looks for the pair and the prompts.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=3600, record_timing=False, resources={"metadata": {"path": path.parent}}
    ).execute()
    return tidy(notebook)


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leave what the cells show, without warnings, progress bars, versions of Python, and folders of this machine."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [_tidy_output(output) for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def _tidy_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    for holder, name in ((output, "text"), *((output.get("data", {}), kind) for kind in list(output.get("data", {})))):
        text = holder.get(name)
        if isinstance(text, str) and name != "image/png":
            for private, shown in _PRIVATE:
                text = text.replace(private, shown)
            holder[name] = text
    if "data" in output:
        output.data.pop("application/vnd.jupyter.widget-view+json", None)
    return output


def main(names: list[str]) -> None:
    for path in [FOLDER / name for name in names] or sorted(FOLDER.glob("*.ipynb")):
        start = time.perf_counter()
        nbformat.write(run(path), path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
