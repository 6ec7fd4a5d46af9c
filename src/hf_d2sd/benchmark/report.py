"""`hf-d2sd report`: of a run's rows the tables for the terminal, as Markdown and JSON, and one HTML page."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import tables
from .run import PROBES, ROWS, RUN, read_rows, write_whole
from .strategies import PLAIN
from .summary import EVERYTHING
from .tables import Result, Table

_MISSING = "The reports need rich and matplotlib: pip install 'hf-d2sd[bench]'."


@dataclass
class ReportOptions:
    """Write the reports of a run anew, from its rows; with --compare say where two runs disagree."""

    run: Path = field(metadata={"help": "folder of `hf-d2sd bench`"})
    compare: Path | None = field(default=None, metadata={"help": "folder of another run of the same strategies"})

    def __post_init__(self):
        self.run, self.compare = Path(self.run), Path(self.compare) if self.compare is not None else None


def report_run(options: ReportOptions) -> dict:
    if options.compare is not None:
        return compare(read_result(options.run), read_result(options.compare))
    return report(options.run)


def read_result(folder: Path) -> Result:
    """A run's rows and settings.

    Raises:
        ValueError: if the folder holds no run, or one without a row.
    """
    if not (folder / RUN).is_file():
        raise ValueError(f"{folder} holds no run of `hf-d2sd bench`: there is no {RUN}.")
    rows = read_rows(folder / ROWS)
    if not rows:
        raise ValueError(f"The run in {folder} has measured nothing yet.")
    run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    return Result(run, rows, read_rows(folder / PROBES))


def report(folder: Path) -> dict:
    """Write summary.json, report.md and report.html, and print the tables."""
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        raise ValueError(_MISSING) from error
    from .page import page

    result = read_result(folder)
    figures = as_json(result)
    write_whole(folder / "summary.json", figures)
    (folder / "report.md").write_text(markdown(result), encoding="utf-8")
    (folder / "report.html").write_text(page(result), encoding="utf-8")
    show(result)
    short = {name: f"{tables.number(cell.speed)}, α {tables.number(cell.alpha)}" for name, cell in _overall(result)}
    return {"out": str(folder), "prompts": len(result.rows), "speed-ups": short}


def _overall(result: Result) -> list:
    return [(name, groups[EVERYTHING]) for name, groups in result.cells.items() if name != PLAIN]


def all_tables(result: Result) -> list[Table]:
    """What there is to show, in order."""
    makers = (tables.overview, tables.by_group, tables.intervals, tables.equality, tables.stages, tables.ablation)
    made = [maker(result) for maker in (*makers, tables.blocks, tables.headline, tables.strategies)]
    return [table for table in made if table is not None and table.rows]


def as_json(result: Result) -> dict:
    cells = {name: {group: asdict(cell) for group, cell in groups.items()} for name, groups in result.cells.items()}
    probed = {name: asdict(entry) for name, entry in result.instruments.items() if entry is not None}
    for name, entry in probed.items():
        sources = result.instruments[name].reliability
        entry["calibration_error"] = {source: result.instruments[name].calibration_error(source) for source in sources}
    return {**result.run, "prompts": len(result.rows), "cells": cells, "instruments": probed}


def markdown(result: Result) -> str:
    parts = ["# Benchmark", *(f"* {line}" for line in tables.environment_lines(result.run))]
    said = tables.overhead(result)
    for table in all_tables(result):
        parts += [f"\n## {table.title}\n", table.note, "", table.markdown()]
        if said is not None and table.title == "All prompts":
            parts += ["", said]
    return "\n".join(parts) + "\n"


def show(result: Result) -> None:
    """In the terminal: the overview, and by suite and task."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=160)
    for table in (tables.overview(result), tables.by_group(result)):
        shown = RichTable(title=table.title, caption=table.note, caption_justify="left")
        for column, head in enumerate(table.head):
            shown.add_column(head, justify="left" if column == 0 else "right", no_wrap=column == 0)
        for row in table.rows:
            shown.add_row(*row, style="dim" if row[0] == PLAIN else None)
        console.print(shown)


def compare(one: Result, other: Result) -> dict:
    """For each strategy of both runs, both speed-ups and acceptance lengths, and whether their intervals overlap.

    Raises:
        ValueError: if the runs have no strategy in common apart from plain decoding.
    """
    shared = [name for name in one.names if name in other.names and name != PLAIN]
    if not shared:
        raise ValueError(f"The runs share no strategy: {one.names} and {other.names}.")
    result = {}
    for name in shared:
        for what in ("speed", "alpha"):
            mine, its = (getattr(run.cell(name), what) for run in (one, other))
            if mine is not None and its is not None:
                entry = {"one": f"{mine:.2f}", "other": f"{its:.2f}", "agree": mine.agrees_with(its)}
                result.setdefault(name, {})[what] = entry
    agreeing = all(entry["agree"] for name in result.values() for entry in name.values())
    return {"agree": agreeing, "strategies": result}
