"""A run on disk: which files its folder holds, and what they tell."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from .. import records
from .strategies import PLAIN
from .summary import EVERYTHING, Cell, Instruments, instruments, summarize

ROWS, PROBES, RUN = "rows.jsonl", "probes.jsonl", "run.json"


@dataclass
class Result:
    """A run as its folder tells it."""

    run: dict
    rows: list[dict]
    probes: list[dict]

    @functools.cached_property
    def names(self) -> list[str]:
        return list(self.run["strategies"])

    @functools.cached_property
    def cells(self) -> dict[str, dict[str, Cell]]:
        return summarize(self.rows, self.names)

    @functools.cached_property
    def instruments(self) -> dict[str, Instruments | None]:
        return {name: instruments(self.probes, name) for name in self.names}

    @property
    def groups(self) -> list[str]:
        return list(self.cells[PLAIN])

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(row["key"][0] for row in self.rows))

    @property
    def variants(self) -> list[str]:
        """Strategies of a sweep."""
        return [name for name in self.names if ":" in name]

    def cell(self, name: str, group: str = EVERYTHING) -> Cell:
        return self.cells[name][group]

    def probed(self, name: str) -> Instruments | None:
        return self.instruments[name]


def read_result(folder: Path) -> Result:
    """A run's rows and settings.

    Raises:
        ValueError: if the folder holds no run, or one without a row.
    """
    if not (folder / RUN).is_file():
        raise ValueError(f"{folder} holds no run of `hf-d2sd bench`: there is no {RUN}.")
    rows = records.read(folder / ROWS)
    if not rows:
        raise ValueError(f"The run in {folder} has measured nothing yet.")
    run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    return Result(run, rows, records.read(folder / PROBES))
