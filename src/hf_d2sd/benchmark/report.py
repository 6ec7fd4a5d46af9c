"""`hf-d2sd report`: a run's reports anew, or two runs side by side."""

from dataclasses import dataclass, field
from pathlib import Path

from .result import Result, read_result
from .strategies import PLAIN
from .writing import write_reports


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
    return write_reports(options.run)


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
