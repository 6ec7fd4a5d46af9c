"""Trees as SVG: every node once, at its depth, marked by its source and by what became of it; nothing unescaped."""

import re
from xml.etree import ElementTree

import pytest
from tiny import OracleDrafts, prompt, tiny_assistant, tiny_target

from hf_d2sd import Cycle
from hf_d2sd.apps.drawing import COLOURS, printable, tree_svg

SVG = "{http://www.w3.org/2000/svg}"
WORDS = ["<b>&", '"quoted"', "\x00\x1b", " a", "\n", "averylongtoken", "x", "y", "bonus"]
#   0 ── 1 ── 3 ── 5
#    └─ 2 └── 4
CYCLE = Cycle(
    row=0,
    tokens=[0, 1, 2, 3, 4, 5],
    parents=[-1, 0, 0, 1, 1, 3],
    depths=[0, 1, 1, 2, 2, 3],
    scores=[0.0, -0.1, -2.0, -0.5, -0.3, -1.0],
    ranks=[0, 0, 1, 0, 2, 0],
    sources=["target", "first", "second", "first", "second", "first"],
    path=[0, 1, 3],
    emitted=[1, 3, 8],
)
ORDER = [0, 1, 3, None, 5, 4, 2]  # the nodes, None for the target's own token, from the top line down


def boxes(svg: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f"{SVG}g")


def test_every_node_and_the_bonus_stand_there_once():
    texts = [box.find(f"{SVG}text").text for box in boxes(tree_svg(CYCLE, WORDS.__getitem__))]
    assert texts == ["<b>&", '"quoted"', "·a", "bonus", "averylon…", "↵", "\ufffd\ufffd"]


def test_columns_are_depths_and_no_two_boxes_overlap():
    places = [box.find(f"{SVG}rect") for box in boxes(tree_svg(CYCLE, WORDS.__getitem__))]
    places = [(int(rect.get("x")), int(rect.get("y"))) for rect in places]
    columns = sorted({x for x, _ in places})
    assert [columns.index(x) for x, _ in places] == [3 if node is None else CYCLE.depths[node] for node in ORDER]
    assert len(set(places)) == len(places)
    assert len({y for _, y in places[:4]}) == 1, "what is emitted is one straight line"


def test_sources_are_colours_and_accepted_nodes_have_the_bold_frame():
    frames = [box.find(f"{SVG}rect") for box in boxes(tree_svg(CYCLE, WORDS.__getitem__))]
    sources = ["target" if node is None else CYCLE.sources[node] for node in ORDER]
    assert [frame.get("fill") for frame in frames] == [COLOURS[source] for source in sources]
    assert [frame.get("stroke-width") == "2" for frame in frames] == [True] * 4 + [False] * 3
    assert [frame.get("stroke-dasharray") is not None for frame in frames] == [node is None for node in ORDER]


def test_probabilities_are_those_of_the_trace():
    shown = [box.findall(f"{SVG}text")[1].text for box in boxes(tree_svg(CYCLE, WORDS.__getitem__))]
    assert shown == ["anchor", "0.90", "0.67", "target's own", "0.61", "0.82", "0.14"]


@pytest.mark.parametrize("text, shown", [(" a", "·a"), ("", "∅"), ("\u202ex", "\ufffdx"), ("é", "é")])
def test_what_cannot_be_seen_is_made_visible(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("width", [1, 3])
def test_every_cycle_of_a_real_call_is_drawn(width, monkeypatch):
    """Trees of all shapes: as many boxes as nodes, no two at one place, and the edges of the accepted path bold."""
    target, assistant = tiny_target(), tiny_assistant()
    inputs = prompt()
    plain = target.generate(inputs, do_sample=False, max_new_tokens=24)
    if width == 1:
        OracleDrafts(monkeypatch, plain[0], 0.7)
    options = dict(d2sd_tree_width=width, d2sd_tree_budget=20, d2sd_trace=True)
    target.generate(inputs, do_sample=False, max_new_tokens=24, assistant_model=assistant, **options)
    assert len(assistant.last_stats.trace) > 3
    for cycle in assistant.last_stats.trace:
        svg = tree_svg(cycle, str)
        places = [(rect.get("x"), rect.get("y")) for rect in (box.find(f"{SVG}rect") for box in boxes(svg))]
        assert len(places) == len(set(places)) == len(cycle.tokens) + 1
        assert len(re.findall(r'<path [^>]*stroke-width="2"', svg)) == len(cycle.path)
