"""The Space: what it shows escapes everything and says what happened, and the page works in a browser."""

import contextlib
import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tiny import prompt, tiny_assistant, tiny_target

from hf_d2sd.streaming import Piece

SPACE = Path(__file__).parents[1] / "examples" / "space"
NASTY = "<script>alert(1)</script> & <img src=x onerror=alert(2)> ${1+1}"


@pytest.fixture(scope="module")
def views():
    spec = importlib.util.spec_from_file_location("views", SPACE / "views.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["views"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cycles():
    options = dict(d2sd_tree_width=3, d2sd_tree_budget=12, d2sd_trace=True)
    tiny_target().generate(prompt(), do_sample=False, max_new_tokens=16, assistant_model=tiny_assistant(), **options)
    return tiny_assistant().last_stats.trace


class TestViews:
    def test_neighbouring_pieces_of_one_source_are_one_mark(self, views):
        pieces = [Piece("a", "first"), Piece(" b", "first"), Piece("c", "target")]
        shown = views.reply_html(views.Reply(pieces, 3, 2, seconds=2.0, done=True), "title")
        assert '<span class="first">a b</span><span class="target">c</span></div>' in shown
        assert "1.5 tokens/s" in shown

    def test_text_and_titles_are_escaped(self, views, cycles):
        reply = views.Reply([Piece(NASTY, "first")], 1, 1, seconds=1.0, done=True)
        for shown in (
            views.reply_html(reply, NASTY),
            views.numbers_html({NASTY: reply}, "float32"),
            views.tree_html(cycles, 2, lambda token: NASTY),
        ):
            assert "<script" not in shown and "<img" not in shown

    @pytest.mark.parametrize("number", [-3, 1, 2, 10**6])
    def test_any_number_of_the_slider_draws_a_cycle(self, views, cycles, number):
        shown = views.tree_html(cycles, number, str)
        at = min(max(number, 1), len(cycles))
        assert f"cycle {at} of {len(cycles)}" in shown and shown.count("<svg") == 1
        added = "".join(map(str, cycles[at - 1].emitted))
        assert f"<b>{added}</b>" in shown

    def test_plain_decoding_has_no_tree(self, views):
        assert "<svg" not in views.tree_html([], 1, str)

    def test_equal_texts_are_called_so_and_differing_ones_explained(self, views):
        assert views.verdict(["a", "a"], "float32") == "The same text, in float32."
        assert "error" in views.verdict(["a", "b"], "float32")
        assert "nearly tied" in views.verdict(["a", "b"], "bfloat16")

    def test_every_strategy_decodes_and_its_sliders_matter(self, views):
        """Of two values of a slider in use, the greater gives larger trees or other ones."""
        target, pair = tiny_target(), tiny_assistant()

        def trees(strategy, **changes):
            values = {"branches": 2, "budget": 9, "width": 2, **changes}
            options = views.options(strategy, **values)
            target.generate(prompt(), do_sample=False, max_new_tokens=6, assistant_model=pair, **options)
            return [(cycle.tokens, cycle.parents) for cycle in pair.last_stats.trace]

        for strategy in (views.WIDE, views.PAPER, views.FIRST):
            for name, used in zip(("branches", "budget", "width"), views.sliders_in_use(strategy)):
                greater = {"branches": 3, "budget": 3, "width": 5}[name]
                assert (trees(strategy) != trees(strategy, **{name: greater})) == used, (strategy, name)
        for strategy in (views.PLAIN, views.DEFAULT):
            assert views.sliders_in_use(strategy) == (False, False, False)

    def test_the_first_strategy_is_the_librarys_default_and_says_what_it_chose(self, views, library_default):
        """Whatever the sliders stand at."""
        target, pair = tiny_target(), tiny_assistant()
        options = views.options(views.STRATEGIES[0], 4, 16, 8)
        target.generate(prompt(), do_sample=False, max_new_tokens=16, assistant_model=pair, **options)
        decisions = pair.last_stats.decisions
        assert decisions is not None and len(pair.last_stats.trace) == decisions.kinds.total()
        reply = views.Reply([Piece("a", "first")], 1, 1, seconds=1.0, done=True, chosen=str(decisions))
        assert f"<p>{decisions}.</p>" in views.numbers_html({"x": reply}, "float32")


def test_the_card_names_the_app():
    card = (SPACE / "README.md").read_text(encoding="utf-8")
    header = dict(re.findall(r"^(\w+): (.+)$", card.split("---")[1], re.M))
    assert header["sdk"] == "gradio" and (SPACE / header["app_file"]).exists()
    assert len(header["short_description"]) <= 60  # the Hub takes no more


CHROMIUM = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM += ["--disable-background-networking", "--disable-component-update"]


@contextlib.contextmanager
def served(target: Path):
    """The app on a free port; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        str(SPACE / "app.py"),
        "--target",
        str(target),
        "--port",
        str(port),
        "--dtype",
        "float32",
    ]
    app = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if app.poll() is not None:
                raise RuntimeError(app.stdout.read())
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address).close()
                break
            time.sleep(0.5)
        yield address
    finally:
        app.terminate()
        app.wait()


@pytest.fixture(scope="module")
def address(smollm2_folder):
    pytest.importorskip("gradio", reason="needs the extra `space`")
    with served(smollm2_folder) as address:
        yield address


@pytest.fixture(params=[390, 1280], ids="{}px".format)
def browser(request, tmp_path):
    pytest.importorskip("selenium", reason="needs the extra `space`")
    from selenium import webdriver

    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("needs the programs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in (*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    metrics = dict(width=request.param, height=900, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield browser
    browser.quit()


def find(browser, selector: str, seconds: float = 120):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(lambda b: b.find_elements(By.CSS_SELECTOR, selector))


@pytest.mark.slow
def test_a_visitor_decodes_a_prompt_and_looks_at_the_trees(browser, address):
    browser.get(address)
    write(browser, "Count from 1 to 9. " + NASTY)
    find(browser, "#run")[0].click()
    find(browser, "#drafted section")
    find(browser, "#tree svg")
    drafted, plain = (reply(browser, name) for name in ("drafted", "plain"))
    assert len(drafted) > 20 and drafted == plain
    assert re.search(r"The same text, in float32.*\d+ cycles: ", find(browser, "#numbers")[0].text, re.S)
    colours = {mark.value_of_css_property("background-color") for mark in find(browser, "#drafted div span")}
    assert len(colours) > 1, "sources have colours of their own"

    first = find(browser, "#tree")[0].text
    assert "cycle 1 of" in first
    find(browser, "#cycle input[type=range]")[0].send_keys("\ue014")  # the right arrow
    wait_for(browser, "#tree", "cycle 2 of")

    choose(browser, "plain")
    find(browser, "#run")[0].click()
    wait_for(browser, "#tree", "no trees")
    assert reply(browser, "drafted") == plain
    wide = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "the page scrolls sideways"
    assert not [line for line in browser.get_log("browser") if "favicon" not in line["message"]]


def wait_for(browser, selector: str, text: str, seconds: float = 60) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, seconds).until(lambda b: text in find(b, selector)[0].text, f"no {text!r} in {selector}")


def write(browser, text: str) -> None:
    """In place of what stands in the prompt, by keys."""
    from selenium.webdriver.common.keys import Keys

    (box,) = find(browser, "#prompt textarea")
    box.send_keys(Keys.CONTROL + "a" + Keys.NULL + Keys.DELETE + text)


def reply(browser, name: str) -> str:
    return find(browser, f"#{name} section div")[0].get_property("textContent")


def choose(browser, strategy: str) -> None:
    from selenium.webdriver.common.by import By

    for label in find(browser, "#strategy label"):
        if label.text.strip() == strategy:
            label.find_element(By.CSS_SELECTOR, "input").click()


@pytest.mark.slow
def test_a_prompt_of_nothing_is_said_to_be_one(browser, address):
    browser.get(address)
    write(browser, "")
    find(browser, "#run")[0].click()
    wait_for(browser, ".toast-wrap", "Write a prompt first")
