"""One self-contained HTML page of a run: tables and figures, readable at any width, in light and dark."""

import html
import io
import re
from collections.abc import Callable, Iterable

from . import tables
from .probing import STAGES
from .result import Result
from .strategies import PLAIN
from .summary import EVERYTHING
from .tables import Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --faint: #5d6675; --line: #d8dce3; --paper: #fff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --faint: #9aa3b2; --line: #39414f; --paper: #14181f; --card: #1c222c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
p, li { max-width: 46rem; } .note { color: var(--faint); font-size: .9rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead th { background: var(--card); } thead th:first-child { background: var(--card); }
tr:last-child td { border-bottom: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem; background: var(--card); border-radius: 8px; min-width: 0; }
figure h3 { margin: 0 0 .3rem; font-size: 1rem; } figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--faint); font-size: .85rem; margin-top: .4rem; }
"""
_INK, _FAINT = "#123456", "#654321"  # stand-ins that become the page's own colours
_COLOURS = [
    "#3b7dd8",
    "#d9652b",
    "#2f9e63",
    "#a355c7",
    "#c9a227",
    "#d1495b",
    "#2aa5a0",
    "#7a6ff0",
    "#8a6d4b",
    "#6b8e23",
]


def page(result: Result) -> str:
    """The page as text; nothing in it is loaded from elsewhere."""
    shown = tables.all_tables(result)
    said = tables.overhead(result)
    body = [
        "<h1>hf-d2sd benchmark</h1>",
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in tables.environment_lines(result.run)) + "</ul>",
        *map(_table, shown[:1]),
        "<h2>Figures</h2>",
        f'<div class="figures">{"".join(figures(result))}</div>',
        *map(_table, shown[1:]),
        f"<p>{html.escape(said)}</p>" if said is not None else "",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>hf-d2sd benchmark</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _table(table: Table) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "".join(line("td", row) for row in table.rows)
    return (
        f'<h2>{html.escape(table.title)}</h2><p class="note">{html.escape(table.note)}</p><div class="scroll"><table>'
        f"<thead>{line('th', table.head)}</thead><tbody>{rows}</tbody></table></div>"
    )


def figures(result: Result) -> list[str]:
    """What there is to draw, each a <figure>."""
    compared = [name for name in result.names if name not in result.variants]
    probed = {name: result.probed(name) for name in compared if result.probed(name) and result.probed(name).cycles}
    made = []
    alone = result.suites if len(result.suites) == 1 else []  # then it is all prompts
    for group in (group for group in result.groups if group not in alone):
        title = "all prompts" if group == EVERYTHING else group
        made.append(
            _figure(
                f"Speed-up, {title}", "Decoding alone; bars: 95% intervals.", _forest, result, compared, group, "speed"
            )
        )
        made.append(
            _figure(
                f"α, {title}", "Tokens a target pass; bars: 95% intervals.", _forest, result, compared, group, "alpha"
            )
        )
    if probed:
        made.append(_figure("How many tokens a cycle commits", "Share of cycles.", _committed, probed))
        made.append(
            _figure(
                "Accept rate by block position",
                "Of the cycles whose tree reached the position, those that accepted a token there.",
                _positions,
                probed,
            )
        )
        made.append(_figure("Time by stage", "Of a cycle, milliseconds.", _stages, probed))
    reliable = _reliable(probed)
    if reliable:
        errors = ", ".join(f"{source} {error:.3f}" for source, (_, error) in reliable.items() if error is not None)
        note = f"Drafted tokens whose parent was accepted, by confidence. Expected calibration error: {errors}."
        made.append(_figure("How right confidences are", note, _reliability, reliable))
    if "dflash" in probed and probed["dflash"].boundaries:
        note = "The first drafter's chain: cycles that accepted exactly i tokens, and the mean of r(i)."
        made.append(_figure("Where rejections fall", note, _boundaries, probed["dflash"].boundaries))
    made += _sweeps(result)
    return made


def _figure(title: str, note: str, draw: Callable, *arguments) -> str:
    """Draw on axes of their own, as SVG that takes the page's colours."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, *arguments)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(_INK)
    for spine in axes.spines.values():
        spine.set_color(_FAINT)
    if axes.get_legend() is not None:
        for text in axes.get_legend().get_texts():
            text.set_color(_INK)
    out = io.StringIO()
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "d2sd", "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    opening, rest = drawn.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)  # the page decides how wide
    drawn = f"{opening}>{rest}".replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)").replace("#ffffff", "none")
    caption = f"<figcaption>{html.escape(note)}</figcaption>"
    return f"<figure><h3>{html.escape(title)}</h3>{_own_ids(drawn, title)}{caption}</figure>"


def _own_ids(drawn: str, title: str) -> str:
    """Ids of several figures share the page: each gets its figure's prefix."""
    prefix = re.sub(r"\W+", "-", title.lower())
    drawn = re.sub(r'\bid="', f'id="{prefix}-', drawn)
    return re.sub(r'(href="|url\()#', rf"\1#{prefix}-", drawn)


def _forest(axes, result: Result, names: list[str], group: str, what: str) -> None:
    shown = [(name, getattr(result.cell(name, group), what)) for name in names]
    shown = [(name, estimate) for name, estimate in shown if estimate is not None][::-1]
    for row, (name, estimate) in enumerate(shown):
        colour = _FAINT if name == PLAIN else _COLOURS[0]
        axes.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=2)
        axes.plot(estimate.value, row, "o", color=colour)
        axes.annotate(
            f"{estimate.value:.2f}",
            (estimate.value, row),
            (0, 6),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            color=_INK,
        )
    axes.axvline(1, color=_FAINT, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_xlim(left=0)


def _committed(axes, probed: dict) -> None:
    names = list(probed)[::-1]
    most = max(size for entry in probed.values() for size in entry.committed)
    left = [0.0] * len(names)
    for size in range(1, most + 1):
        share = [probed[name].committed.get(size, 0.0) for name in names]
        shade = 0.15 + 0.85 * (size - 1) / max(most - 1, 1)
        axes.barh(names, share, left=left, color=(0.23, 0.49, 0.85, shade), label=str(size))
        left = [a + b for a, b in zip(left, share)]
    axes.legend(ncols=min(most, 8), fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1.0))


def _positions(axes, probed: dict) -> None:
    for colour, (name, entry) in zip(_COLOURS, probed.items()):
        axes.plot(
            list(entry.accept_rates), list(entry.accept_rates.values()), "o-", markersize=3, label=name, color=colour
        )
    axes.set_xlabel("position in the block")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8, frameon=False)


def _stages(axes, probed: dict) -> None:
    names = list(probed)[::-1]
    left = [0.0] * len(names)
    for colour, stage in zip(_COLOURS, STAGES):
        time = [probed[name].stage_ms.get(stage, 0.0) for name in names]
        axes.barh(names, time, left=left, color=colour, label=stage)
        left = [a + b for a, b in zip(left, time)]
    axes.legend(ncols=4, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1.0))
    axes.set_xlabel("ms")


def _reliable(probed: dict) -> dict[str, tuple[list, float | None]]:
    """By drafter its bins: each token of its own choice, and each of the likeliest where trees are wide."""
    found = {}
    for name, source in (("dflash", "first"), ("ddtree", "first"), ("d2sd", "second"), ("d2sd-wide", "second")):
        bins = probed[name].reliability.get(source, []) if name in probed else []
        if sum(entry[0] for entry in bins):
            found[f"{source} ({name})"] = (bins, probed[name].calibration_error(source))
    return found


def _reliability(axes, reliable: dict) -> None:
    axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=0.8, linestyle=":")
    for colour, (source, (bins, _)) in zip(_COLOURS, reliable.items()):
        shown = [entry for entry in bins if entry[0]]
        axes.plot([e[1] for e in shown], [e[2] for e in shown], "o-", markersize=4, label=source, color=colour)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accepted")
    axes.legend(fontsize=8, frameon=False)


def _boundaries(axes, table: list[tuple[float, float]]) -> None:
    places = range(len(table))
    axes.bar([i - 0.2 for i in places], [seen for seen, _ in table], 0.4, label="seen", color=_COLOURS[0])
    axes.bar([i + 0.2 for i in places], [expected for _, expected in table], 0.4, label="r(i)", color=_COLOURS[1])
    axes.set_xticks(list(places))
    axes.set_xlabel("i, drafted tokens accepted")
    axes.legend(fontsize=8, frameon=False)


def _sweeps(result: Result) -> list[str]:
    """Speed-up and α of a sweep's variants against the budget, a line for each K (and W, γ)."""
    lines: dict[str, list[tuple[int, str]]] = {}
    for name in result.variants:
        base, _, settings = name.partition(":")
        values = dict(setting.split("=") for setting in settings.split(","))
        along = "budget" if "budget" in values else next(iter(values))
        others = ", ".join(f"{key} = {value}" for key, value in values.items() if key != along)
        lines.setdefault(f"{along}|{others or base}", []).append((int(values[along]), name))
    if not lines:
        return []
    return [
        _figure(f"Sweep: {label}", "All prompts.", _sweep, result, lines, what)
        for what, label in (("speed", "speed-up"), ("alpha", "α"))
    ]


def _sweep(axes, result: Result, lines: dict[str, list[tuple[int, str]]], what: str) -> None:
    for colour, (label, points) in zip(_COLOURS, lines.items()):
        shown = [(x, getattr(result.cell(name), what)) for x, name in sorted(points)]
        shown = [(x, estimate) for x, estimate in shown if estimate is not None]
        axes.plot(
            [x for x, _ in shown],
            [e.value for _, e in shown],
            "o-",
            markersize=4,
            label=label.partition("|")[2],
            color=colour,
        )
        axes.fill_between(
            [x for x, _ in shown], [e.low for _, e in shown], [e.high for _, e in shown], color=colour, alpha=0.15
        )
    axes.set_xlabel(" or ".join(dict.fromkeys(label.partition("|")[0] for label in lines)))
    axes.legend(fontsize=8, frameon=False)
