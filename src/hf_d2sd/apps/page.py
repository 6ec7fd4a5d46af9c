"""The page of `hf-d2sd explain`: plain HTML in one file, which asks for nothing else."""

import base64
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from importlib import resources

from ..stats import Cycle, D2SDStats

_LABELS = {"first": "first drafter", "second": "second drafter", "context": "the text so far", "target": "target"}
_BADGES = {"first": "1", "second": "2", "context": "C", "target": "T"}
_SPACES = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})
_OPEN_CYCLES = 8  # the others are one click away
_TEXT_BEFORE = 90  # characters shown before a cycle's own


@dataclass(frozen=True)
class Page:
    """What is shown. Nothing in it is HTML: every text is escaped on its way out."""

    prompt: str
    texts: list[str]  # what each token of the reply added
    names: dict[int, str]  # of the tokens in trees, each by itself
    stats: D2SDStats
    trace: list[Cycle]
    facts: dict[str, str]

    @property
    def cycles(self) -> list[tuple[int, Cycle]]:
        """Each cycle with how many tokens of the reply stand before its own; the first token is the prefill's."""
        starts, start = [], 1
        for cycle in self.trace:
            starts.append(start)
            start += len(cycle.emitted)
        return list(zip(starts, self.trace))


@dataclass(frozen=True)
class Placed:
    """A node where it is drawn. Each step down a tree is one column; a fork opens a row below."""

    token: int
    source: str
    row: int
    column: int
    fork: int | None  # the row that its line comes down from; `None`: the one it stands in
    fate: str  # anchor, accepted, chosen (the target's own token), rejected, or unreached: below a rejected one
    confidence: float = 1.0
    reached: float = 1.0  # the estimated probability of the whole path
    rank: int = 0


def render(page: Page) -> str:
    script, style = _asset("explain.js"), _asset("explain.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>How a reply was drafted</title>\n<style>{style}</style>\n</head>\n<body>\n<main>",
            "<h1>How this reply was drafted</h1>",
            *_summary(page),
            *_texts(page),
            _key(),
            '<div class="bar"><h2>Cycle by cycle</h2><span class="switches">'
            '<button type="button" data-open="1">Open all</button>'
            '<button type="button" data-open="">Close all</button></span></div>',
            *(_cycle(page, number, start, cycle) for number, (start, cycle) in enumerate(page.cycles, 1)),
            f"</main>\n<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


# The top of the page -------------------------------------------------------------------------------------------------


def _summary(page: Page) -> Iterator[str]:
    stats = page.stats
    tiles = {"tokens": str(stats.new_tokens), "target passes after the prompt's": str(stats.cycles)}
    if stats.cycles:
        tiles = {"tokens a target pass (α); plain decoding has 1": f"{stats.mean_acceptance_length:.2f}", **tiles}
        tiles["nodes a tree"] = f"{stats.mean_tree_size:.1f}"
    yield '<div class="tiles">'
    for label, value in tiles.items():
        yield f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
    yield "</div>"
    yield _sources(stats)
    if stats.cycles:
        yield _histogram(stats)
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in page.facts.items())
    yield f"<details><summary>Settings</summary><dl>{facts}</dl></details>"


def _sources(stats: D2SDStats) -> str:
    """A bar of all tokens by source, which is the legend of the colours too."""
    counts = stats.tokens_by_source
    parts = "".join(
        f'<span class="{source}" style="flex-grow:{counts[source]}"></span>' for source in _BADGES if counts[source]
    )
    legend = "".join(
        f'<li class="{source}"><i>{_BADGES[source]}</i>{label}: {counts[source]}</li>'
        for source, label in _LABELS.items()
    )
    return f'<h2>Who wrote the tokens</h2><div class="sources">{parts}</div><ul class="legend">{legend}</ul>'


def _histogram(stats: D2SDStats) -> str:
    histogram = stats.acceptance_histogram
    most = max(histogram.values())
    bars = "".join(
        f'<tr><th scope="row">{size}</th><td><span style="width:{100 * histogram.get(size, 0) / most:.1f}%"></span>'
        f"{histogram.get(size, 0)}</td></tr>"
        for size in range(1, max(histogram) + 1)
    )
    return f'<h2>Passes by the tokens they gave</h2><table class="histogram">{bars}</table>'


def _texts(page: Page) -> Iterator[str]:
    yield f'<details><summary>Prompt</summary><pre class="text">{escape(page.prompt)}</pre></details>'
    cycle_of = [0] + [n for n, (_, cycle) in enumerate(page.cycles, 1) for _ in cycle.emitted]
    spans = []
    for text, source, cycle in zip(page.texts, page.stats.token_sources, cycle_of):
        link = f' href="#cycle-{cycle}"' if cycle else ""
        title = f"cycle {cycle}, {_LABELS[source]}" if cycle else "the prompt's pass, target"
        spans.append(f'<a class="{source}"{link} title="{title}">{escape(text)}</a>')
    yield f'<h2>Reply</h2><pre class="text reply">{"".join(spans)}</pre>'
    yield '<p class="note">Each token leads to the cycle it came from.</p>'


def _key() -> str:
    examples = [
        ("anchor target", "known", "known", "the last token so far, where drafting begins"),
        ("accepted first", "kept", "1 · 90%", "drafted, and what the target says too"),
        ("chosen target", "own", "target", "what the target says where no draft was right, or where drafts ended"),
        ("rejected second", "wrong", "2 · 40%", "the rejection point: the target says another token"),
        ("unreached first", "below", "1 · 20%", "below a wrong token"),
    ]
    items = "".join(
        f'<li><span class="node {kinds}"><b>{text}</b><small>{meta}</small></span>{meaning}</li>'
        for kinds, text, meta, meaning in examples
    )
    return (
        "<details><summary>How to read the trees</summary>"
        f'<ul class="key">{items}</ul><p class="note">The top line is what the cycle adds to the text. Below it stand '
        "the other candidates of the tree, which the same pass of the target checked. 1 is the first drafter, 2 "
        "the second, C the text so far, and the figure is the estimated probability of the token, given those before "
        "it in its line.</p>"
        "</details>"
    )


# One cycle -----------------------------------------------------------------------------------------------------------


def _cycle(page: Page, number: int, start: int, cycle: Cycle) -> str:
    end = start + len(cycle.emitted)
    before = "".join(page.texts[:start])
    shown = f"…{before[-_TEXT_BEFORE:]}" if len(before) > _TEXT_BEFORE else before
    sources = page.stats.token_sources[start:end]
    added = "".join(f'<b class="{s}">{escape(t)}</b>' for t, s in zip(page.texts[start:end], sources))
    count = len(cycle.emitted)
    return (
        f'<details class="cycle" id="cycle-{number}"{" open" if number <= _OPEN_CYCLES else ""}>'
        f'<summary><span class="number">Cycle {number}</span> {count} token{"s" if count > 1 else ""}'
        f'<span class="added">: {added}</span></summary>'
        f'<pre class="text sofar"><span>{escape(shown)}</span>{added}</pre>'
        f"{_tree(page, cycle)}{_outcome(page, cycle)}{_redrafts(page, cycle)}</details>"
    )


def _tree(page: Page, cycle: Cycle) -> str:
    parts = [part for node in lay_out(cycle) for part in (_line_to(node), _node(page, node))]
    return f'<div class="scroll" tabindex="0"><div class="tree">{"".join(parts)}</div></div>'


def _line_to(node: Placed) -> str:
    """The line from a node's parent: straight on, or down from a row above."""
    if node.column == 0:
        return ""
    first = node.row if node.fork is None else node.fork
    kind = "straight" if node.fork is None else "fork"
    place = f"grid-column:{2 * node.column};grid-row:{first + 1}/{node.row + 2}"
    return f'<i class="line {kind} {node.fate}" style="{place}"></i>'


def _node(page: Page, node: Placed) -> str:
    place = f"grid-column:{2 * node.column + 1};grid-row:{node.row + 1}"
    meta = {"anchor": "known", "chosen": "target"}.get(node.fate)
    title = {"anchor": "the last known token", "chosen": "the target's own token"}.get(node.fate)
    if meta is None:
        meta = f"{_BADGES[node.source]} · {100 * node.confidence:.0f}%"
        by = _LABELS[node.source] + (f", branch {node.rank}" if node.rank > 0 else "")
        title = f"{by}: {node.confidence:.3f} after its parent, {node.reached:.3f} from the start; {node.fate}"
    return (
        f'<span class="node {node.fate} {node.source}" style="{place}" title="{title}">'
        f"<b>{_show(page, node.token)}</b><small>{meta}</small></span>"
    )


def _show(page: Page, token: int) -> str:
    return escape(page.names[token].translate(_SPACES))


def _quote(page: Page, tokens: list[int]) -> str:
    return f"<q>{''.join(_show(page, token) for token in tokens)}</q>"


def _outcome(page: Page, cycle: Cycle) -> str:
    """What the target made of the tree, in a sentence."""
    last, kept = cycle.path[-1], len(cycle.path) - 1
    offered = [n for n, parent in enumerate(cycle.parents) if parent == last]
    own = _quote(page, cycle.emitted[-1:])
    took = f"The target took {kept or 'no'} drafted token{'s' if kept != 1 else ''}"
    if not offered:
        ended = "where its tree ended" if kept else "as nothing was drafted"
        return f'<p class="outcome">{took} and wrote {own} itself, {ended}.</p>'
    best = sorted(offered, key=lambda n: -cycle.scores[n])[:3]
    others = ", ".join(f"{_quote(page, [cycle.tokens[n]])} ({100 * cycle.confidences[n]:.0f}%)" for n in best)
    more = f" and {len(offered) - len(best)} more" if len(offered) > len(best) else ""
    return f'<p class="outcome">{took} and said {own} where the drafters had {others}{more}.</p>'


def _redrafts(page: Page, cycle: Cycle) -> str:
    """Which prefixes the second drafter kept, as far as the tree shows its branches."""
    kept = kept_prefixes(cycle)
    if not kept:
        return ""
    names = [_quote(page, [cycle.tokens[n] for n in prefix]) if prefix else "the known token" for prefix in kept]
    return f'<p class="note">The second drafter went on after {", ".join(names)}.</p>'


def kept_prefixes(cycle: Cycle) -> list[tuple[int, ...]]:
    """For each branch with nodes of its own, the drafted nodes above the first of these."""
    prefixes: dict[tuple[int, ...], None] = {}
    for rank in sorted({rank for rank in cycle.ranks if rank > 0}):
        top = min((n for n, r in enumerate(cycle.ranks) if r == rank), key=lambda n: cycle.depths[n])
        prefixes[tuple(_ancestors(cycle, top))] = None
    return sorted(prefixes, key=len)


def _ancestors(cycle: Cycle, node: int) -> list[int]:
    """The drafted nodes above a node, from the top."""
    above = []
    while (node := cycle.parents[node]) > 0:
        above.append(node)
    return above[::-1]


def lay_out(cycle: Cycle) -> list[Placed]:
    """The tree with the target's own token, line by line: the accepted path on top, likelier candidates higher."""
    path, confidences = cycle.path, cycle.confidences
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(cycle.parents):
        children.setdefault(parent, []).append(node)
    placed: list[Placed] = []
    rows = 0

    def place(node: int, row: int, fork: int | None) -> None:
        nonlocal rows
        placed.append(_placed(cycle, node, row, fork, confidences[node]))
        below = sorted(children.get(node, []), key=lambda child: (child not in path, -cycle.scores[child], child))
        on_line = node != path[-1]  # after the last accepted node the line goes on with the target's own token
        if not on_line:
            own = Placed(cycle.emitted[-1], "target", row, cycle.depths[node] + 1, None, "chosen")
            placed.append(own)
        for child in below:
            if on_line:
                place(child, row, None)
                on_line = False
            else:
                rows += 1
                place(child, rows, row)

    place(0, 0, None)
    return placed


def _placed(cycle: Cycle, node: int, row: int, fork: int | None, confidence: float) -> Placed:
    if node == 0:
        fate = "anchor"
    elif node in cycle.path:
        fate = "accepted"
    else:
        fate = "rejected" if cycle.parents[node] in cycle.path else "unreached"
    reached = min(1.0, math.exp(cycle.scores[node]))
    column, rank = cycle.depths[node], cycle.ranks[node]
    return Placed(cycle.tokens[node], cycle.sources[node], row, column, fork, fate, confidence, reached, rank)
