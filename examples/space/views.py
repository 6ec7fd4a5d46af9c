"""What the app shows, as HTML, and what its controls mean; without Gradio, so that it is tested without."""

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hf_d2sd import Cycle
from hf_d2sd.apps.drawing import COLOURS, tree_svg
from hf_d2sd.streaming import Piece

PLAIN, FIRST, PAPER, WIDE = "plain", "first drafter alone", "D²SD as published", "D²SD, wide trees"
DEFAULT = "what pays here"  # the library's default
STRATEGIES = (DEFAULT, WIDE, PAPER, FIRST, PLAIN)
NAMES = {
    "first": "first drafter",
    "second": "second drafter",
    "context": "the text so far",
    "target": "the model itself",
}


@dataclass(frozen=True)
class Reply:
    """One way's reply to a prompt; grows while it is written."""

    pieces: Sequence[Piece] = ()
    tokens: int = 0
    passes: int = 0  # of the target, the prompt's included
    nodes: float = 1.0  # that a pass after the prompt's checks, on average
    seconds: float = 0.0
    done: bool = False
    chosen: str = ""  # what cycles did and why, where each chose it

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def options(strategy: str, branches: int, budget: int, width: int) -> dict:
    """What `generate` is told for a strategy; the sliders count where the strategy has use for them."""
    if strategy == DEFAULT:
        return {"d2sd_trace": True}
    chosen = {
        FIRST: dict(d2sd_num_branches=0, d2sd_tree_width=1),
        PAPER: dict(d2sd_num_branches=branches, d2sd_tree_width=1),
        WIDE: dict(d2sd_num_branches=branches, d2sd_tree_width=max(width, 2)),
    }[strategy]
    return {**chosen, "d2sd_tree_budget": budget, "d2sd_trace": True}


def sliders_in_use(strategy: str) -> tuple[bool, bool, bool]:
    """Whether K, budget and width mean something for a strategy."""
    return strategy in (PAPER, WIDE), strategy in (FIRST, PAPER, WIDE), strategy == WIDE


def reply_html(reply: Reply, title: str) -> str:
    """The text, neighbouring pieces of one source joined, each on its source's colour."""
    runs: list[list[str]] = []
    for text, source in reply.pieces:
        if runs and runs[-1][1] == source:
            runs[-1][0] += text
        else:
            runs.append([text, source])
    marks = "".join(f'<span class="{source}">{html.escape(text)}</span>' for text, source in runs)
    state = "" if reply.done else '<span class="waiting">…</span>'
    speed = f"{reply.tokens / reply.seconds:.1f} tokens/s" if reply.seconds else ""
    head = f"<header><b>{html.escape(title)}</b><span>{speed}</span></header>"
    return f'<section class="d2sd-reply">{head}<div>{marks}{state}</div></section>'


def legend_html() -> str:
    marks = " ".join(f'<span class="{source}">{NAMES[source]}</span>' for source in COLOURS)
    return f'<p class="d2sd-legend">who drafted it: {marks}</p>'


def numbers_html(replies: dict[str, Reply], dtype: str) -> str:
    """A row for each reply, and whether the texts are the same."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{reply.tokens}</td><td>{reply.passes}</td>"
        f"<td>{reply.tokens / max(reply.passes, 1):.2f}</td><td>{reply.nodes:.1f}</td>"
        f"<td>{reply.seconds:.1f}</td><td>{reply.tokens / max(reply.seconds, 1e-9):.1f}</td></tr>"
        for name, reply in replies.items()
    )
    heads = "".join(
        f"<th>{name}</th>" for name in ("", "tokens", "passes", "tokens a pass", "nodes a pass", "s", "tokens/s")
    )
    chosen = "".join(f"<p>{html.escape(reply.chosen)}.</p>" for reply in replies.values() if reply.chosen)
    return (
        f'<div class="d2sd-scroll"><table class="d2sd-numbers"><tr>{heads}</tr>{rows}</table></div>'
        f"<p>{verdict([reply.text for reply in replies.values()], dtype)}</p>{chosen}"
    )


def verdict(texts: list[str], dtype: str) -> str:
    if len(texts) < 2:
        return ""
    if len(set(texts)) == 1:
        return f"The same text, in {dtype}."
    if dtype == "float32":
        return "The texts differ. In float32 that is an error; please report it."
    return (
        f"The texts differ. In {dtype} a pass over many tokens rounds differently from a pass over one, and two "
        "nearly tied tokens can change places; in float32 the texts agree."
    )


def tree_html(cycles: Sequence[Cycle], number: int, decode) -> str:
    """Cycle `number`, from 1 on: what it added to the text, and its tree."""
    if not cycles:
        return '<p class="d2sd-note">Plain decoding has no trees.</p>'
    number = min(max(int(number), 1), len(cycles))
    cycle = cycles[number - 1]
    before = "".join(decode(token) for earlier in cycles[: number - 1] for token in earlier.emitted)
    before = before if len(before) <= 120 else "…" + before[-120:]
    added = "".join(decode(token) for token in cycle.emitted)
    count, size = len(cycle.path), len(cycle.tokens)
    return (
        f'<p class="d2sd-note">cycle {number} of {len(cycles)}: {count} token{"s" if count > 1 else ""} from one '
        f"pass over {size} node{'s' if size > 1 else ''}</p>"
        f'<p class="d2sd-context">{html.escape(before)}<b>{html.escape(added)}</b></p>'
        f'<div class="d2sd-scroll">{tree_svg(cycle, decode)}</div>'
    )


def mean_nodes(tree_sizes: list[int]) -> float:
    return statistics.mean(tree_sizes) if tree_sizes else 1.0


STYLE = (
    "".join(f".{source}{{background:{colour};color:#1a1a1a}}" for source, colour in COLOURS.items())
    + """
.d2sd-reply header{display:flex;justify-content:space-between;gap:1em;margin-bottom:.4em}
.d2sd-reply div{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7;min-height:5em}
.d2sd-reply div span,.d2sd-legend span{border-radius:3px;padding:1px 0;-webkit-box-decoration-break:clone}
.d2sd-legend span{padding:1px 7px;display:inline-block;line-height:1.5}
.d2sd-legend{line-height:1.9}
.d2sd-scroll{overflow-x:auto;max-width:100%}
.d2sd-scroll svg{max-width:none}
.d2sd-numbers{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.85em;margin-bottom:.6em}
.d2sd-numbers,.d2sd-numbers tr{border:0!important}
.d2sd-numbers th,.d2sd-numbers td{border:0;border-bottom:1px solid #9996;padding:3px 5px;text-align:right}
.d2sd-numbers th{font-weight:500;vertical-align:bottom}
.d2sd-numbers th:first-child{text-align:left;padding-left:0}
.d2sd-context{white-space:pre-wrap;overflow-wrap:anywhere}
"""
)
