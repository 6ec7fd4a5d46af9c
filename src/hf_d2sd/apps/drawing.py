"""A cycle's tree as an inline SVG, for notebooks and pages of one's own: it needs no style sheet."""

from collections.abc import Callable
from html import escape

from ..stats import Cycle
from .page import Placed, lay_out

COLOURS = {"first": "#cdeed6", "second": "#f3d3f5", "context": "#cfeaf4", "target": "#e4e4e4"}  # of each source
_WIDTH, _HEIGHT, _GAP, _ROW, _MARGIN = 76, 30, 26, 38, 8
_NAMED = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
_ACCEPTED = ("anchor", "accepted", "chosen")


def tree_svg(cycle: Cycle, label: Callable[[int], str]) -> str:
    """The tree from the anchor (left) to its leaves: fill says who wrote a node, a bold frame that it was accepted.

    Under each drafted token stands its estimated probability, given its parent. The dashed token at the end of the
    accepted path is the target's own, which no child carried.

    Args:
        label: the text of a token, as `tokenizer.decode` gives it; escaped here.
    """
    nodes = lay_out(cycle)
    width = max(node.column for node in nodes) * (_WIDTH + _GAP) + _WIDTH + 2 * _MARGIN
    height = max(node.row for node in nodes) * _ROW + _HEIGHT + 2 * _MARGIN
    about = f"Tree of {len(cycle.tokens)} nodes, {len(cycle.path) - 1} drafted tokens accepted"
    edges = sorted(
        (node for node in nodes if node.column), key=lambda node: node.fate in _ACCEPTED
    )  # bold ones on top
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="{about}" font-family="ui-monospace, monospace" font-size="12">',
            f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
            *map(_edge, edges),
            *(_box(node, label(node.token)) for node in nodes),
            "</svg>",
        ]
    )


def printable(text: str) -> str:
    """A token's text with what cannot be seen made visible."""
    return "".join(_NAMED.get(c, c if c.isprintable() else "\ufffd") for c in text) or "∅"


def _place(row: int, column: int) -> tuple[int, int]:
    return _MARGIN + column * (_WIDTH + _GAP), _MARGIN + row * _ROW


def _stroke(node: Placed) -> str:
    colour, width = ("#1a1a1a", 2) if node.fate in _ACCEPTED else ("#a8a8a8", 1)
    dashes = ' stroke-dasharray="4 3"' if node.fate == "chosen" else ""
    return f'stroke="{colour}" stroke-width="{width}"{dashes}'


def _edge(node: Placed) -> str:
    """From the parent, in the column before and the row that the node's line forks from."""
    x0, y0 = _place(node.row if node.fork is None else node.fork, node.column - 1)
    x1, y1 = _place(node.row, node.column)
    x0, y0, y1, bend = x0 + _WIDTH, y0 + _HEIGHT // 2, y1 + _HEIGHT // 2, x1 - _GAP // 2
    return f'<path d="M{x0} {y0} C{bend} {y0} {bend} {y1} {x1} {y1}" fill="none" {_stroke(node)}/>'


def _box(node: Placed, text: str) -> str:
    (x, y), shown = _place(node.row, node.column), printable(text)
    shown = shown if len(shown) <= 9 else shown[:8] + "…"
    below = {"anchor": "anchor", "chosen": "target's own"}.get(node.fate) or f"{node.confidence:.2f}"
    title = f"{printable(text)} by {node.source}: {below}, {node.fate}"
    middle = x + _WIDTH // 2
    return (
        f'<g><title>{escape(title)}</title><rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5" '
        f'fill="{COLOURS[node.source]}" {_stroke(node)}/>'
        f'<text x="{middle}" y="{y + 13}" text-anchor="middle" fill="#1a1a1a">{escape(shown)}</text>'
        f'<text x="{middle}" y="{y + 25}" text-anchor="middle" font-size="9" fill="#555">{below}</text></g>'
    )
