"""`hf-d2sd explain`: the page draws every node of every tree, and nothing that a model says is HTML."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import transformers as tf
from tiny import OracleDrafts
from words import save_word_drafters, save_word_target

from hf_d2sd import Cycle, D2SDStats
from hf_d2sd.apps import explain as module
from hf_d2sd.apps.explain import ExplainOptions, explain, token_name, token_texts
from hf_d2sd.apps.page import Page, kept_prefixes, lay_out, render
from hf_d2sd.tree import HostTree

VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Collects elements as (tag, attributes, text), and refuses a page whose tags do not match."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        element = [tag, dict(attributes), ""]
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def find(self, tag: str, kind: str | None = None) -> list:
        return [e for e in self.elements if e[0] == tag and (kind is None or kind in e[1].get("class", "").split())]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return save_word_target(folder / "target"), *save_word_drafters(folder)


def options(folders, tmp_path, **changes) -> ExplainOptions:
    target, first, second = map(str, folders)
    settings = dict(
        target=target,
        drafters=[first, second],
        prompt="a b c",
        max_new_tokens=24,
        dtype="float32",
        out=tmp_path / "p.html",
    )
    return ExplainOptions(**{**settings, **changes})


# Two branches: after the anchor alone, and after one kept token. The target takes "b c" and says "x" where "d" was.
CYCLE = Cycle(
    row=0,
    tokens=[0, 1, 2, 3, 4, 5],
    parents=[-1, 0, 1, 2, 0, 1],
    depths=[0, 1, 2, 3, 1, 2],
    scores=[0.0, -0.1, -0.4, -1.5, -2.0, -1.0],
    ranks=[0, 0, 0, 0, 1, 2],
    sources=["target", "first", "first", "first", "second", "second"],
    path=[0, 1, 2],
    emitted=[1, 2, 6],
)


def test_the_top_line_is_what_the_cycle_adds_and_forks_open_lines_below():
    placed = {(node.token, node.fate): (node.row, node.column, node.fork) for node in lay_out(CYCLE)}
    assert placed == {
        (0, "anchor"): (0, 0, None),
        (1, "accepted"): (0, 1, None),
        (2, "accepted"): (0, 2, None),
        (6, "chosen"): (0, 3, None),
        (3, "rejected"): (1, 3, 0),
        (5, "rejected"): (2, 2, 0),
        (4, "rejected"): (3, 1, 0),
    }


def test_nodes_below_a_wrong_token_are_told_from_the_wrong_token():
    fates = {node.token: node.fate for node in lay_out(replace(CYCLE, path=[0], emitted=[6]))}
    assert fates == {0: "anchor", 6: "chosen", 1: "rejected", 4: "rejected", **dict.fromkeys([2, 3, 5], "unreached")}


def test_kept_prefixes_are_the_drafted_nodes_above_each_branch():
    assert kept_prefixes(CYCLE) == [(), (1,)]


def page_of(names: list[str], cycle: Cycle = CYCLE) -> Page:
    stats = D2SDStats(trace=[cycle])
    stats.add_first_tokens(1)
    columns = cycle.tokens, cycle.parents, cycle.depths, cycle.ranks, [0, 1, 1, 1, 2, 2], [0] * len(cycle.tokens)
    stats.add_cycle(cycle.path, HostTree(*columns))
    reply = [names[0], *(names[token] for token in cycle.emitted)]
    return Page(names[0], reply, dict(enumerate(names)), stats, [cycle], {names[0]: names[1]})


NASTY = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;b&gt;", "</pre>", "'", "-->", "</style>"]


def test_nothing_that_a_model_says_is_html():
    page = render(page_of(NASTY))
    reader = Reader(page)
    assert len(reader.find("script")) == 1 and "alert" not in reader.find("script")[0][2]
    assert not reader.find("img") and len(reader.find("style")) == 1
    assert not [name for _, attributes, _ in reader.elements for name in attributes if name.startswith("on")]
    (reply,) = reader.find("pre", "reply")
    assert reply[2] == "".join([NASTY[0], NASTY[1], NASTY[2], NASTY[6]])
    shown = {element[2] for element in reader.find("b")}
    assert {name.replace(" ", "·") for name in NASTY} <= shown


def test_the_page_asks_for_nothing_else_and_runs_its_own_script_alone():
    page = render(page_of([f"w{i}" for i in range(7)]))
    assert not re.search(r"https?:|//|\burl\(|@import|<link|\ssrc=", page)
    (policy,) = (a["content"] for t, a, _ in Reader(page).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_the_sentence_names_what_the_target_said_and_what_was_offered_in_its_place():
    (outcome,) = Reader(render(page_of(["w0", "w1", "w2", "w3", "w4", "w5", "own"]))).find("p", "outcome")
    assert outcome[2] == "The target took 2 drafted tokens and said own where the drafters had w3 (33%)."
    ended = replace(CYCLE, tokens=[0], parents=[-1], depths=[0], scores=[0.0], ranks=[0], sources=["target"])
    page = page_of([f"w{i}" for i in range(7)], replace(ended, path=[0], emitted=[6]))
    (outcome,) = Reader(render(page)).find("p", "outcome")
    assert outcome[2] == "The target took no drafted tokens and wrote w6 itself, as nothing was drafted."


@pytest.mark.parametrize("changes", [{}, {"tree_width": 3, "tree_budget": 12}, {"num_branches": 0}])
def test_every_node_of_every_tree_is_drawn_once(folders, tmp_path, monkeypatch, changes):
    target, tokenizer = (kind.from_pretrained(folders[0]) for kind in (tf.AutoModelForCausalLM, tf.AutoTokenizer))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a b c"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    sequence = target.generate(**prompt, do_sample=False, max_new_tokens=24)[0]
    OracleDrafts(monkeypatch, sequence, accuracy=0.7)
    if "tree_width" in changes:  # such trees are made of logits, which that draft has not
        monkeypatch.undo()
    pages = []
    monkeypatch.setattr(module, "render", lambda page: pages.append(page) or render(page))
    report = explain(options(folders, tmp_path, **changes))
    reader, (page,) = Reader((tmp_path / "p.html").read_text(encoding="utf-8")), pages
    assert report["cycles"] == len(page.stats.trace) == len(reader.find("details", "cycle"))
    drawn = len(reader.find("span", "node")) - len({"anchor", "accepted", "chosen", "rejected", "unreached"})
    assert drawn == sum(len(cycle.tokens) + 1 for cycle in page.stats.trace)
    (reply,) = reader.find("pre", "reply")
    assert reply[2] == tokenizer.decode(sequence[prompt.input_ids.shape[1] :])
    links = [element[1].get("href") for element in reader.find("a")]
    ids = {element[1]["id"] for element in reader.find("details", "cycle")}
    assert {link[1:] for link in links if link} == ids
    assert sum(link is None for link in links) == 1, "only the prefill's token has no cycle"


def test_the_page_names_folders_but_not_where_they_lie(folders, tmp_path):
    explain(options(folders, tmp_path))
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert str(folders[0].parent) not in page and "<dd>target</dd>" in page


def test_tokens_that_are_parts_of_a_character_have_names(tmp_path):
    from test_streaming import BYTES
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(BYTES)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = tokenizer("né").input_ids
    assert token_texts(tokenizer, tokens) == ["n", "", "é"]
    assert token_texts(tokenizer, tokens[:2]) == ["n", "\ufffd"]
    assert [token_name(tokenizer, token) for token in tokens] == ["n", "Ã", "©"]


def test_a_page_that_cannot_be_written_is_refused_at_once(folders, tmp_path):
    with pytest.raises(ValueError, match="name a file in a folder that is there"):
        options(folders, tmp_path, out=tmp_path / "nowhere" / "p.html")
    with pytest.raises(ValueError, match="name a file"):
        options(folders, tmp_path, out=tmp_path)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_the_page_is_no_wider_than_the_window(folders, tmp_path, width):
    long_blocks = list(map(str, save_word_drafters(tmp_path, block_size=16)))  # trees wider than a telephone
    explain(options(folders, tmp_path, drafters=long_blocks))
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    page = re.sub(r"<meta http-equiv=[^>]*>", "", page)  # it would forbid the frame and the script of this test
    page = re.sub("<details", "<details open", page.replace(" open>", ">"))
    (tmp_path / "p.html").write_text(page, encoding="utf-8")
    # A frame, as a headless window cannot be made as narrow as a telephone.
    (tmp_path / "frame.html").write_text(
        f'<iframe src="p.html" style="width:{width}px;height:900px;border:0"></iframe><script>onload = () => {{'
        "const page = frames[0].document; const late = [...page.querySelectorAll('main *')].filter((e) => "
        "!e.closest('.scroll > *') && e.getBoundingClientRect().right > page.documentElement.clientWidth + 1);"
        "document.title = [page.documentElement.scrollWidth, late.length, page.querySelectorAll('.node').length]}"
        "</script>"
    )
    flags = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = [CHROMIUM, *flags.split(), "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    scroll_width, late, nodes = map(int, re.search(r"<title>([\d,]+)</title>", done.stdout)[1].split(","))
    assert scroll_width <= width and late == 0 and nodes > 20
