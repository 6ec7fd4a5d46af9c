"""How commands show text in a terminal: coloured by source as it comes, with a line of figures below it."""

import math
import re
import time
from collections.abc import Callable, Sequence

from ..stats import D2SDStats
from ..streaming import Piece
from .answering import Answer, Comparison
from .findings import Finding

try:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise ImportError("This command shows its results with rich: pip install 'hf-d2sd[bench]'.") from error

# How each source is shown: by colour, or by brackets where there is none.
STYLES = {"first": "green", "second": "magenta", "context": "cyan", "target": "default"}
BRACKETS = {"first": ("[", "]"), "second": ("{", "}"), "context": ("<", ">"), "target": ("", "")}
LABELS = {"first": "first drafter", "second": "second drafter", "context": "the text so far", "target": "target"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """Text that a model wrote, without what a terminal would obey."""
    return _CONTROL.sub("\ufffd", text)


def is_coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


class Transcript:
    """Text that grows: finished lines stay, the last one and the status below it are drawn anew.

    Where the output is no terminal, text is written as it comes, without a status.

    Args:
        status: what to show below the text.
    """

    def __init__(self, console: Console, status: Callable[[], Text]):
        self._console, self._status = console, status
        self._line, self._source = Text(), "target"
        self._live = None
        if console.is_terminal:
            self._live = Live(console=console, get_renderable=self._render, transient=True, refresh_per_second=12)

    def _render(self) -> Group:
        return Group(self._line, self._status())

    def __enter__(self) -> "Transcript":
        if self._live is not None:
            self._live.start()
        return self

    def add(self, piece: Piece) -> None:
        if not is_coloured(self._console) and piece.source != self._source:
            self._write(BRACKETS[self._source][1], "target")
            self._write(BRACKETS[piece.source][0], "target")
        self._source = piece.source
        self._write(visible(piece.text), piece.source)

    def _write(self, text: str, source: str) -> None:
        if self._live is None:
            self._console.print(Text(text, STYLES[source]), end="", soft_wrap=True)
            return
        for i, part in enumerate(text.split("\n")):
            if i:
                self._console.print(self._line)
                self._line = Text()
            line = self._line.copy().append(part, STYLES[source])
            *finished, self._line = line.wrap(self._console, self._console.width)
            self._line.rstrip()  # wrapping drops what spaces do not fit, and a word that comes next needs them
            self._line.append(line.plain[len(line.plain.rstrip()) :], STYLES[source])
            for earlier in finished:
                self._console.print(earlier)

    def __exit__(self, *_) -> None:
        if not is_coloured(self._console):
            self._write(BRACKETS[self._source][1], "target")
        if self._live is not None:
            self._live.stop()
        self._console.print(self._line)


class Speedometer:
    """The status of a reply in the making: its length, its speed, and tokens a pass."""

    def __init__(self, stats: Callable[[], D2SDStats | None]):
        self._stats, self._count = stats, 0
        self._since: float | None = None  # when the first token came

    def tick(self) -> None:
        self._count += 1
        if self._since is None:
            self._since = time.perf_counter()

    def status(self) -> Text:
        if self._since is None:
            return Text("reading the prompt ...", "dim")
        seconds = time.perf_counter() - self._since
        line = f"{self._count} tokens"
        if self._count > 1 and seconds > 0:
            line += f", {(self._count - 1) / seconds:.1f} tokens/s"
        stats = self._stats()
        if stats is not None and stats.cycles:
            line += f", {stats.mean_acceptance_length:.2f} a target pass"
        return Text(line, "dim")


def legend(console: Console) -> Text:
    line = Text()
    for source, label in LABELS.items():
        left, right = ("", "") if is_coloured(console) else BRACKETS[source]
        line.append(f"{left}{label}{right}   ", STYLES[source])
    return line


def summary(answer: Answer) -> Table:
    """What a reply took, in two columns."""
    table = Table.grid(padding=(0, 2))
    stats = answer.stats
    rows = {
        "reply": f"{len(answer.tokens)} tokens, {answer.tokens_per_second:.1f} a second after the first, which took "
        f"{answer.first_token_seconds:.2f} s"
    }
    if not answer.plain:
        counts = stats.tokens_by_source
        rows["sources"] = ", ".join(f"{LABELS[name]} {count}" for name, count in counts.items())
        if not math.isnan(stats.mean_acceptance_length):
            histogram = ", ".join(f"{size}: {count}" for size, count in stats.acceptance_histogram.items())
            rows["tokens a target pass"] = f"{stats.mean_acceptance_length:.2f} (passes by tokens: {histogram})"
            rows["nodes a pass"] = f"{stats.mean_tree_size:.1f}"
        if stats.decisions is not None:
            rows["chosen"] = str(stats.decisions)
        rows["attention"] = stats.attention_backend
    for name, value in rows.items():
        table.add_row(Text(name, "dim"), Text(value))
    return table


def verdict(comparison: Comparison) -> Text:
    """Whether both texts are the same, and which way was the faster."""
    dtype = comparison.drafted.dtype
    if comparison.same_text:
        line = f"The same text both ways, in {dtype}"
    elif dtype == "float32":
        line = f"The texts part at token {comparison.first_difference}. In float32 that is an error; please report it"
    else:
        line = (
            f"The texts part at token {comparison.first_difference}: in {dtype} two tokens can be nearly tied, and a "
            "pass over many tokens rounds differently from a pass over one"
        )
    ratio = comparison.speed_ratio
    if ratio is None:
        return Text(f"{line}.")
    drafted, plain = comparison.drafted.tokens_per_second, comparison.plain.tokens_per_second
    return Text(f"{line}; {drafted:.1f} tokens/s with drafters, {plain:.1f} without: {ratio:.2f} times.")


_LEVELS = {"fine": ("ok", "green"), "note": ("note", "yellow"), "wrong": ("WRONG", "bold red")}


def findings_table(findings: Sequence[Finding]) -> Table:
    """What `hf-d2sd doctor` found, a row each."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        mark, style = _LEVELS[finding.level]
        words = Text(visible(finding.words))
        if finding.advice:
            words.append(f"\n{visible(finding.advice)}", "italic")
        table.add_row(Text(mark, style), Text(finding.check), words)
    return table


def findings_verdict(findings: Sequence[Finding]) -> Text:
    wrong = [finding.check for finding in findings if finding.level == "wrong"]
    if wrong:
        return Text(f"Something is wrong: {', '.join(dict.fromkeys(wrong))}.", "bold red")
    return Text("Nothing is wrong.", "bold green")
