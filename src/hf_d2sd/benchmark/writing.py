"""Of a run's rows the reports: tables for the terminal, Markdown, JSON, and one HTML page."""

from dataclasses import asdict
from pathlib import Path

from .. import records
from . import tables
from .page import page
from .result import Result, read_result
from .strategies import PLAIN
from .summary import EVERYTHING

_MISSING = "The reports need rich and matplotlib: pip install 'hf-d2sd[bench]'."


def refuse_missing_packages() -> None:
    """For whoever is about to measure for hours what is then to be reported.

    Raises:
        ValueError: naming the packages.
    """
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        raise ValueError(_MISSING) from error


def write_reports(folder: Path) -> dict:
    """Write summary.json, report.md and report.html, and print the tables."""
    refuse_missing_packages()
    result = read_result(folder)
    records.write_json(folder / "summary.json", as_json(result))
    records.write_text(folder / "report.md", markdown(result))
    records.write_text(folder / "report.html", page(result))
    show(result)
    overall = {name: groups[EVERYTHING] for name, groups in result.cells.items() if name != PLAIN}
    short = {name: f"{tables.number(cell.speed)}, α {tables.number(cell.alpha)}" for name, cell in overall.items()}
    return {"out": str(folder), "prompts": len(result.rows), "speed-ups": short}


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
    for table in tables.all_tables(result):
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
