"""`hf-d2sd bench`: strategies that answer alike, times that are pairs, runs that go on, and inputs that are wrong."""

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from words import WORDS, save_word_target

import hf_d2sd.benchmark.probing as probing
import hf_d2sd.benchmark.run as running
import hf_d2sd.target as target_module
from hf_d2sd import D2SDAssistant, D2SDDrafterConfig, D2SDDrafterModel, records
from hf_d2sd.benchmark.options import BenchOptions
from hf_d2sd.benchmark.report import ReportOptions, report_run
from hf_d2sd.benchmark.result import PROBES, ROWS, read_result
from hf_d2sd.benchmark.run import bench
from hf_d2sd.benchmark.strategies import all_strategies, find_strategy, grid
from hf_d2sd.benchmark.suites import read_suites
from hf_d2sd.benchmark.summary import instruments, ratios, summarize
from hf_d2sd.cli import main
from hf_d2sd.stats import Cycle
from hf_d2sd.training.shards import Row

ROOT = Path(__file__).parents[1]

GAMMA = 5
FAST = [name for name in all_strategies() if name != "ar-compiled"]  # compiling takes longer than all the rest
PROMPTS = [
    {"id": "1", "task": "short", "turns": ["a b c"]},
    {"id": "2", "task": "short", "turns": ["d e f a b"]},
    {"id": "3", "task": "long", "turns": ["g h i j k l m a", "n o"]},
]


def save_drafters(folder, **changes):
    drafters = []
    for seed in range(2):
        torch.manual_seed(seed)
        settings = dict(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            block_size=GAMMA,
            mask_token_id=3,
            target_layer_ids=[0, 1],
            num_target_layers=2,
            initializer_range=0.5,
        )
        drafters.append(D2SDDrafterModel(D2SDDrafterConfig(**{**settings, **changes})))
    D2SDAssistant.from_drafters(*drafters).save_pretrained(folder / "pair")
    drafters[0].save_pretrained(folder / "first")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_word_target(folder / "target")
    save_word_target(folder / "draft_lm", layers=1)
    save_drafters(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "suite.jsonl", PROMPTS)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(models, prompts, out, **changes) -> BenchOptions:
    settings = dict(
        target=str(models / "target"),
        drafters=[str(models / "pair")],
        draft_lm=str(models / "draft_lm"),
        prompts=[prompts],
        out=out,
        strategies=FAST,
        max_new_tokens=14,
        dtype="float32",
        device="cpu",
        probes=1,
        warmup_tokens=2,
    )
    return BenchOptions(**{**settings, **changes})


@pytest.fixture(scope="module")
def result(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    sweep = ["budget=4,8", "K=0,2"]
    file, names = write_lines(folder / "suite.jsonl", PROMPTS), [*FAST, "dflash:block=3"]
    bench(options(models, file, folder / "run", strategies=names, sweep=sweep))
    return read_result(folder / "run"), folder / "run"


class TestRuns:
    def test_every_strategy_answers_as_plain_generate(self, result):
        rows = result[0].rows
        assert [tuple(row["key"]) for row in rows] == [
            ("suite", "1", 0),
            ("suite", "2", 0),
            ("suite", "3", 0),
            ("suite", "3", 1),
        ]
        for row in rows:
            assert set(row["strategies"]) == {*FAST, "dflash:block=3", *grid(["budget=4,8", "K=0,2"])}
            assert all(cell["same"] for cell in row["strategies"].values())

    def test_tokens_steps_and_rows_are_those_of_the_strategy(self, result):
        for row in result[0].rows:
            cells = row["strategies"]
            assert cells["ar"]["decoded"] == cells["ar"]["steps"] == cells["ar"]["tokens"] - 1 == cells["ar"]["rows"]
            for name, cell in cells.items():
                assert cell["steps"] <= cell["decoded"] <= cell["tokens"], name
            assert cells["dflash"]["rows"] <= GAMMA * cells["dflash"]["passes"]
            assert cells["d2sd-wide:budget=4,K=2"]["rows"] <= 4 * cells["d2sd-wide:budget=4,K=2"]["passes"]
            assert cells["dflash"]["steps"] == cells["dflash"]["passes"]

    def test_nobody_follows_the_target_while_calls_of_ours_are_timed(self, models, prompts, tmp_path, monkeypatch):
        """They would take other products then, and be slower than what a user's call is."""
        followed, of = [], target_module.for_few_tokens

        def noting(model):
            twin = of(model)
            followed.append(twin is model)
            return twin

        monkeypatch.setattr(target_module, "for_few_tokens", noting)
        bench(options(models, prompts, tmp_path / "run", strategies=["ar", "d2sd", "auto"], max_samples=1))
        assert len(followed) > 2 and not any(followed)

    def test_the_native_loop_and_ours_yield_alike_with_one_drafter(self, result):
        cells = result[0].cells
        assert cells["dflash"]["all"].alpha.value == pytest.approx(cells["dflash-native"]["all"].alpha.value, rel=0.2)

    def test_strategies_take_turns_in_being_first(self, result):
        assert len({tuple(row["order"]) for row in result[0].rows}) > 1

    def test_a_later_turn_holds_the_plain_answers_before_it(self, result, models):
        rows = result[0].rows
        assert rows[3]["prompt_tokens"] > rows[2]["prompt_tokens"] + len("n o".split())

    def test_probes_tell_stages_trees_and_memory(self, result):
        probed = result[0].probed("d2sd")
        assert set(probed.stage_ms) == set(probing.STAGES) and all(ms > 0 for ms in probed.stage_ms.values())
        assert sum(probed.committed.values()) == pytest.approx(1)
        assert sum(probed.sources.values()) == pytest.approx(1)
        assert result[0].probed("dflash").stage_ms.get("draft 2") is None
        assert result[0].probed("ar").peak_mb >= 0

    def test_a_killed_run_goes_on_and_repeats_nothing(self, models, prompts, tmp_path, monkeypatch):
        stock, written = records.append, []

        def killed(path, row):
            if len(written) == 2:
                with open(path, "a") as file:
                    file.write(json.dumps(row)[:40])  # torn off
                raise KeyboardInterrupt
            written.append(row["key"])
            stock(path, row)

        monkeypatch.setattr(records, "append", killed)
        settings = options(models, prompts, tmp_path / "run", strategies=["dflash"])
        with pytest.raises(KeyboardInterrupt):
            bench(settings)
        monkeypatch.setattr(records, "append", stock)
        before = records.read(tmp_path / "run" / ROWS)
        bench(settings)
        after = records.read(tmp_path / "run" / ROWS)
        assert len(before) == 2 and after[:2] == before
        assert sorted(row["key"] for row in after) == [
            ["suite", "1", 0],
            ["suite", "2", 0],
            ["suite", "3", 0],
            ["suite", "3", 1],
        ]
        first = (tmp_path / "run" / "report.md").read_text()
        bench(settings)  # nothing is left to do
        assert (tmp_path / "run" / "report.md").read_text() == first
        assert len(records.read(tmp_path / "run" / PROBES)) == 2  # one a task

    def test_a_run_of_other_settings_is_not_mixed_in(self, models, prompts, tmp_path):
        bench(options(models, prompts, tmp_path / "run", strategies=["dflash"], probes=0))
        with pytest.raises(ValueError, match="other settings: max_new_tokens"):
            bench(options(models, prompts, tmp_path / "run", strategies=["dflash"], max_new_tokens=9))

    def test_sampling_is_compared_seed_by_seed(self, models, prompts, tmp_path):
        names = ["dflash", "d2sd", "d2sd-wide"]
        bench(options(models, prompts, tmp_path / "run", strategies=names, temperature=1.0, probes=0))
        rows = records.read(tmp_path / "run" / ROWS)
        assert all(row["strategies"][name]["same"] for row in rows for name in names)

    def test_a_first_drafter_alone_runs_what_it_can(self, models, prompts, tmp_path):
        settings = options(
            models, prompts, tmp_path / "run", drafters=[str(models / "first")], draft_lm=None, probes=0
        )
        with pytest.raises(ValueError, match="assisted needs a draft LM"):
            bench(settings)
        settings.strategies = [
            name for name in FAST if name not in ("assisted", "d2sd", "d2sd-3", "d2sd-wide", "d2sd-context")
        ]
        assert set(bench(settings)["speed-ups"]) == set(settings.strategies) - {"ar"}

    def test_where_texts_part_the_targets_preference_is_told(self, models, prompts, tmp_path, monkeypatch):
        stock = running.measure

        def changed(target, strategy, models, input_ids, options):
            done = stock(target, strategy, models, input_ids, options)
            if strategy.name == "dflash":
                done.tokens[-1] = (done.tokens[-1] + 1) % len(WORDS)
            return done

        monkeypatch.setattr(running, "measure", changed)
        bench(options(models, prompts, tmp_path / "run", strategies=["dflash"], probes=0))
        for row in records.read(tmp_path / "run" / ROWS):
            plain, cell = row["strategies"]["ar"], row["strategies"]["dflash"]
            assert not cell["same"] and cell["parts"]["at"] == plain["tokens"] - 1 and cell["parts"]["gap"] > 0

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["ar-compiled", "d2sd-wide:compile=1"])
    def test_what_is_compiled_answers_alike_and_is_compiled_before_the_clock_runs(
        self, models, tmp_path, name, monkeypatch
    ):
        torch._dynamo.reset()
        lengths = (5, 200, 3, 230)
        rows = [{"id": str(n), "turns": [" ".join("abcdefg"[i % 7] for i in range(n))]} for n in lengths]
        graphs = []
        stock = running.Runner.measure_round

        def counted(runner, entry):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            return stock(runner, entry)

        monkeypatch.setattr(running.Runner, "measure_round", counted)
        file = write_lines(tmp_path / "suite.jsonl", rows)
        bench(options(models, file, tmp_path / "run", strategies=[name], probes=0))
        assert graphs[0] > 0 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs[0]
        assert all(row["strategies"][name]["same"] for row in records.read(tmp_path / "run" / ROWS))


class Page(html.parser.HTMLParser):
    """Notes what a page loads, and tags that are not closed in order."""

    VOID = {"meta", "br", "path", "use"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.loads, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        assert tag not in ("script", "link", "iframe", "img")

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


class TestReports:
    def test_the_page_is_whole_and_loads_nothing(self, result):
        page = Page((result[1] / "report.html").read_text(encoding="utf-8"))
        assert page.open == [] and page.loads == []
        text = " ".join(page.text)
        for title in (
            "Speed-up, all prompts",
            "Speed-up, suite: short",
            "α, suite: long",
            "Where rejections fall",
            "How right confidences are",
            "Time by stage",
            "Sweep",
        ):
            assert title in text

    def test_ids_on_the_page_are_told_apart(self, result):
        page = (result[1] / "report.html").read_text(encoding="utf-8")
        ids = re.findall(r'\bid="([^"]+)"', page)
        assert len(ids) == len(set(ids)) > 10
        assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)

    def test_what_a_run_is_called_is_no_markup(self, models, tmp_path):
        row = {"id": "1", "task": "<script>alert(1)</script>", "turns": ["a b"]}
        other = {"id": "2", "task": "b|c", "turns": ["a b"]}
        file = write_lines(tmp_path / "suite.jsonl", [row, other])
        bench(options(models, file, tmp_path / "run", strategies=["dflash"], probes=0))
        Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
        assert "b\\|c" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")

    def test_markdown_has_every_strategy_and_no_folder_of_this_machine(self, result):
        text = (result[1] / "report.md").read_text(encoding="utf-8")
        assert all(f"| {name} |" in text for name in FAST)
        kept = [file.read_text(encoding="utf-8") for file in result[1].iterdir() if file.suffix != ".partial"]
        assert not any(str(result[1].parent) in one or "/pair" in one or "/target" in one for one in kept)
        assert "The paper's ablations" in text and "The digest's headline" in text
        assert f"| {GAMMA} (trained) |" in text and "| 3 |" in text

    def test_the_summary_says_what_the_rows_say(self, result):
        summary = json.loads((result[1] / "summary.json").read_text(encoding="utf-8"))
        cell = summary["cells"]["d2sd"]["all"]
        rows = result[0].rows
        decoded = sum(row["strategies"]["d2sd"]["decoded"] for row in rows)
        assert cell["alpha"]["value"] == decoded / sum(row["strategies"]["d2sd"]["steps"] for row in rows)
        assert cell["speed"]["low"] <= cell["speed"]["value"] <= cell["speed"]["high"]
        assert {"all", "suite", "suite: short", "suite: long"} == set(summary["cells"]["d2sd"])

    def test_a_run_agrees_with_itself_and_not_with_one_that_was_slower(self, result, tmp_path):
        same = report_run(ReportOptions(result[1], compare=result[1]))
        assert same["agree"] and set(same["strategies"]) == set(result[0].names) - {"ar"}
        other = shutil.copytree(result[1], tmp_path / "other")
        rows = records.read(other / ROWS)
        for row in rows:
            row["strategies"]["d2sd"]["decode_seconds"] *= 50
        write_lines(other / ROWS, rows)
        apart = report_run(ReportOptions(result[1], compare=other))
        assert not apart["agree"] and not apart["strategies"]["d2sd"]["speed"]["agree"]
        assert apart["strategies"]["dflash"]["speed"]["agree"]

    def test_a_folder_without_a_run(self, tmp_path):
        with pytest.raises(ValueError, match="holds no run"):
            report_run(ReportOptions(tmp_path))

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
    @pytest.mark.parametrize("width", [390, 1280])
    def test_a_browser_shows_it_without_scrolling_sideways(self, result, width, tmp_path):
        page = (result[1] / "report.html").read_text(encoding="utf-8")
        style = f"width:{width}px;height:900px;border:0"
        frame = f'<iframe id="f" style="{style}" srcdoc="{html.escape(page, quote=True)}"></iframe>'
        script = (
            "<script>onload = () => { const d = f.contentDocument;"
            " const drawn = d.querySelectorAll('figure svg').length;"
            " document.title = `${d.documentElement.scrollWidth} ${drawn}`; }</script>"
        )
        (tmp_path / "frame.html").write_text(
            f"<!doctype html><body style='margin:0'>{frame}{script}", encoding="utf-8"
        )
        command = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom"
        command += " --disable-background-networking --disable-component-update --disable-sync --window-size=1400,1000"
        done = subprocess.run(
            [
                "chromium",
                *command.split(),
                f"--user-data-dir={tmp_path / 'profile'}",
                f"file://{tmp_path / 'frame.html'}",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        scroll, figures = map(int, re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups())
        assert scroll <= width and figures >= 8


def cell(decoded, seconds, steps=None, **changes):
    known = dict(
        decoded=decoded, decode_seconds=seconds, steps=steps or decoded, tokens=decoded + 1, prefill_seconds=1.0
    )
    return {**known, "passes": steps or decoded, "rows": 2 * decoded, "same": True, **changes}


def row(number, **cells):
    return {"key": ["s", str(number), 0], "task": "t", "strategies": cells}


class TestFigures:
    def test_ratios_are_of_pairs_and_by_token(self):
        rows = [row(0, ar=cell(10, 10.0), x=cell(20, 5.0)), row(1, ar=cell(10, 10.0), x=cell(10, 10.0))]
        assert ratios(rows, "x") == [4.0, 1.0]

    def test_a_prompt_that_ends_at_once_has_no_ratio(self):
        rows = [row(0, ar=cell(0, 0.0), x=cell(0, 0.0)), row(1, ar=cell(4, 4.0), x=cell(4, 2.0))]
        assert ratios(rows, "x") == [2.0]
        assert summarize(rows[:1], ["ar", "x"])["x"]["all"].speed is None

    def test_medians_alpha_and_intervals(self):
        rows = [row(n, ar=cell(12, 12.0), x=cell(12, 12.0 / (1 + n), steps=4 + n)) for n in range(5)]
        found = summarize(rows, ["x"])["x"]["all"]
        assert found.speed.value == 3 and 1 <= found.speed.low < 3 < found.speed.high <= 5
        assert found.alpha.value == 60 / 30 and found.alpha.low < 2 < found.alpha.high
        assert found.rows == 120 / 30 and found.tokens_per_second == 3
        alike = summarize([rows[2]] * 9, ["x"])["x"]["all"].speed
        assert (alike.low, alike.value, alike.high) == (3, 3, 3)

    def test_an_interval_holds_the_truth_about_as_often_as_it_says(self):
        rng, held = torch.Generator().manual_seed(0), 0
        for _ in range(100):
            speeds = (1 + torch.randn(40, generator=rng) * 0.2).clamp(min=0.2).tolist()
            rows = [row(n, ar=cell(1, 1.0), x=cell(1, 1 / speed)) for n, speed in enumerate(speeds)]
            estimate = summarize(rows, ["x"])["x"]["all"].speed
            held += estimate.low <= 1 <= estimate.high
        assert 86 <= held <= 100


CYCLE = Cycle(  # anchor 5; below it 7 and 8; below 7, 9
    row=0,
    tokens=[5, 7, 8, 9],
    parents=[-1, 0, 0, 1],
    depths=[0, 1, 1, 2],
    scores=[0.0, math.log(0.55), math.log(0.25), math.log(0.55 * 0.95)],
    ranks=[0, 0, 1, 0],
    sources=["target", "first", "second", "first"],
    path=[0, 1],
    emitted=[7, 3],
)


class TestProbes:
    def test_reliability_asks_only_where_the_target_answered(self):
        bins = probing.reliability([CYCLE])
        assert bins["first"][5] == [1, pytest.approx(0.55), 1]  # 7 was right
        assert bins["second"][2] == [1, pytest.approx(0.25), 0]  # 8 was not
        assert bins["first"][9] == [1, pytest.approx(0.95), 0]  # nor 9, below 7
        other = Cycle(**{**vars(CYCLE), "path": [0], "emitted": [8 + 3]})
        assert sum(entry[0] for source in probing.reliability([other]).values() for entry in source) == 2

    def test_boundaries_are_of_chains_and_add_up(self):
        chain = Cycle(
            0,
            [5, 7, 9],
            [-1, 0, 1],
            [0, 1, 2],
            [0.0, math.log(0.5), math.log(0.4)],
            [0] * 3,
            ["target", "first", "first"],
            [0, 1],
            [7, 4],
        )
        assert probing.boundaries([chain, CYCLE]) == [
            [0, pytest.approx(0.5)],
            [1, pytest.approx(0.1)],
            [0, pytest.approx(0.4)],
        ]
        ended = Cycle(**{**vars(chain), "path": [0], "emitted": [7]})  # 7 would have been accepted
        assert probing.boundaries([ended]) == []

    def test_nested_stages_take_their_own_time_alone(self, monkeypatch):
        now = iter([0, 1, 3, 6, 10, 15])
        monkeypatch.setattr(probing.time, "perf_counter", lambda: next(now))
        clock = probing.StageClock(torch.device("cpu"))
        with clock.stage("tree"):
            with clock.stage("draft 1"):
                pass
        assert dict(clock.seconds) == {"tree": 1 + 3, "draft 1": 2}

    def test_the_engine_is_as_it_was_afterwards(self):
        before = [getattr(owner, name) for owner, name, _ in probing._PLACES]
        with pytest.raises(RuntimeError), probing.StageClock(torch.device("cpu")).installed():
            assert getattr(*probing._PLACES[0][:2]) is not before[0]
            raise RuntimeError
        assert [getattr(owner, name) for owner, name, _ in probing._PLACES] == before

    def test_calibration_error_is_the_mean_distance(self):
        stats = {"reliability": {"first": [[0, 0, 0]] * 8 + [[2, 1.7, 1], [2, 1.9, 2]]}, "cycles": 1}
        empty = dict.fromkeys(("committed", "offered", "accepted", "sources"), {})
        probe = {"seconds": {}, "peak_bytes": None, "stats": {**stats, **empty, "boundaries": [], "nodes": 1}}
        found = instruments([{"strategies": {"x": probe}}], "x")
        assert found.calibration_error("first") == pytest.approx(0.5 * 0.35 + 0.5 * 0.05)


class TestBadInput:
    """Everything is refused before a model is loaded."""

    @pytest.fixture(autouse=True)
    def no_models(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr(running.AutoModelForCausalLM, "from_pretrained", refuse)
        monkeypatch.setattr(D2SDAssistant, "from_pretrained", refuse)
        monkeypatch.setattr(D2SDDrafterModel, "from_pretrained", refuse)

    @pytest.mark.parametrize(
        "changes, message",
        [
            (dict(strategies=["d3sd"]), "no strategy 'd3sd'; there are ar,"),
            (dict(strategies=["d2sd:depth=3"]), "'depth=3' must be KEY=NUMBER with a key of K,"),
            (dict(strategies=["assisted:K=3"]), "takes no options"),
            (dict(sweep=["K=1,two"]), "KEY=NUMBER,NUMBER"),
            (dict(drafters=[]), "needs a drafter: pass --drafters"),
            (dict(drafters=["context"]), "a strategy, which needs no drafters"),
            (dict(drafters=[], strategies=["d2sd"]), "needs both drafters"),
            (dict(drafters=["a", "b", "c"]), "got 3"),
            (dict(draft_lm=None), "assisted needs a draft LM"),
            (dict(max_new_tokens=1), "max_new_tokens must be at least 2; got 1"),
            (dict(dtype="int8"), "dtype must be one of"),
            (dict(template_options="{"), "no JSON"),
            (dict(max_new_tokens=5000), "longer than the target's limit of 2048 tokens"),
        ],
    )
    def test_options(self, models, prompts, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            bench(options(models, prompts, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()

    def test_no_prompts(self, models, tmp_path):
        with pytest.raises(ValueError, match="Nothing to answer"):
            BenchOptions(target=str(models / "target"), prompts=[], out=tmp_path)

    def test_a_second_drafter_is_missing(self, models, prompts, tmp_path):
        changes = dict(drafters=[str(models / "first")], strategies=["d2sd"])
        with pytest.raises(ValueError, match="d2sd needs both drafters"):
            bench(options(models, prompts, tmp_path / "run", **changes))

    @pytest.mark.parametrize(
        "text, message",
        [
            ("", "holds no prompt"),
            ("\n\n", "holds no prompt"),
            ("{\n", "line 1"),
            ('{"id": 1, "turns": []}\n', "line 1"),
            ('{"id": 1, "turns": [" "]}\n', "not empty"),
            ("[1, 2]\n", "line 1"),
            ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', "comes twice"),
        ],
    )
    def test_prompts(self, models, tmp_path, text, message):
        (tmp_path / "suite.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            bench(options(models, tmp_path / "suite.jsonl", tmp_path / "run"))

    def test_a_missing_file(self, models, tmp_path):
        with pytest.raises(ValueError, match="There is no file"):
            bench(options(models, tmp_path / "none.jsonl", tmp_path / "run"))

    @pytest.mark.parametrize("package", ["rich", "matplotlib"])
    def test_a_package_of_the_reports_is_missing(self, models, prompts, tmp_path, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=r"need rich and matplotlib: pip install 'hf-d2sd\[bench\]'"):
            bench(options(models, prompts, tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    def test_the_command_line_says_it_in_a_line(self, models, prompts, tmp_path):
        arguments = ["--target", str(models / "target"), "--prompts", str(prompts), "--out", str(tmp_path / "run")]
        with pytest.raises(SystemExit, match="hf-d2sd bench: There is no strategy 'x'"):
            main(["bench", *arguments, "--strategies", "x"])


def test_samples_are_spread_over_each_task(tmp_path):
    rows = [{"id": str(n), "task": "even" if n % 2 == 0 else "odd", "turns": ["a"]} for n in range(20)]
    file = write_lines(tmp_path / "s.jsonl", rows)
    assert [p.id for p in read_suites([file], 2)] == ["0", "10", "1", "11"]
    assert len(read_suites([file], 99)) == len(read_suites([file])) == 20


def test_variants_change_what_they_name_alone():
    known = all_strategies(num_branches=4, width=8, budget=16)
    variant = find_strategy("d2sd-wide:K=2,budget=32", known)
    assert variant.options == {"num_branches": 2, "tree_width": 8, "tree_budget": 32, "context": 0}
    assert known["d2sd-wide"].options["tree_budget"] == 16
    assert grid(["budget=8,16", "K=0,4"]) == [f"d2sd-wide:budget={b},K={k}" for b in (8, 16) for k in (0, 4)]
    assert grid([]) == []


def test_parts_of_an_acceptance_run_are_read_together_and_no_other_run(monkeypatch, tmp_path):
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    import acceptance

    for name in ("p0", "p0-0", "p0-1", "p07", "p0-wide"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"run": name}) + "\n" + '{"torn": ')
    assert {row["run"] for row in acceptance.read_rows(tmp_path / "p0.json")} == {"p0", "p0-0", "p0-1"}
    assert acceptance.read_rows(tmp_path / "none.json") == []


class TestScriptsThatGoOn:
    """benchmarks/acceptance.py and benchmarks/equality.py, without the models' part."""

    @pytest.fixture(autouse=True)
    def scripts(self, monkeypatch):
        for folder in ("examples", "benchmarks"):
            monkeypatch.syspath_prepend(str(ROOT / folder))

    def test_an_acceptance_run_is_not_mixed_with_one_of_other_settings(self, monkeypatch, tmp_path):
        import acceptance

        def run(*more):
            monkeypatch.setattr(sys, "argv", ["acceptance.py", "--out", str(tmp_path / "a.json"), *more])
            acceptance.main()

        monkeypatch.setattr(acceptance, "measure", lambda args: None)
        run("--parts", "2")
        run("--strategies", "wide tree, D²SD")
        with pytest.raises(ValueError, match="a.run.json is of .* other settings: nodes: 32 there, 16 now"):
            run("--nodes", "16")

    def test_each_number_of_nodes_has_its_row_with_heads_and_without(self, monkeypatch, tmp_path):
        import acceptance

        asked = ["--nodes", "16", "64", "--heads", "with", "without", "--strategies", "first drafter alone"]
        asked += ["wide tree, D²SD", "--out", str(tmp_path / "a.json")]
        monkeypatch.setattr(sys, "argv", ["acceptance.py", *asked])
        monkeypatch.setattr(acceptance, "measure", lambda args: None)
        acceptance.main()
        rows = list(json.loads((tmp_path / "a.json").read_text())["strategies"])
        with_heads = ["first drafter alone", "wide tree, D²SD, 16 nodes", "wide tree, D²SD, 64 nodes"]
        assert rows == with_heads + [f"{row}, without heads" for row in with_heads]

    def test_an_oracle_is_nothing_that_can_be_decoded(self, monkeypatch, tmp_path, capsys):
        import acceptance

        asked = ["--strategies", "oracle, D²SD", "--out", str(tmp_path / "a.json")]
        monkeypatch.setattr(sys, "argv", ["acceptance.py", *asked])
        with pytest.raises(SystemExit):
            acceptance.main()
        assert "oracles need --replay" in capsys.readouterr().err

    def test_an_equality_run_is_not_mixed_with_one_of_other_drafters(self, monkeypatch, tmp_path):
        import equality

        def run(weights: bytes, *more):
            (tmp_path / "model.safetensors").write_bytes(weights)
            folders = ["--pair", tmp_path, "--work", tmp_path / "work", "--out", tmp_path / "e.json", "--workers", 0]
            monkeypatch.setattr(sys, "argv", ["equality.py", *map(str, folders), *more])
            return equality.main()

        monkeypatch.setattr(equality, "load_smollm2", lambda dtype: None)
        assert run(b"one") == run(b"one", "--max-prompts", "3") == 0
        with pytest.raises(ValueError, match="other settings: drafters_sha256"):
            run(b"other")
        with pytest.raises(ValueError, match="max_new_tokens: 128 there, 64 now"):
            run(b"one", "--max-new-tokens", "64")


def test_coverage_of_a_draft_vocabulary(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from vocabulary import coverage

    chosen = [Row(torch.tensor([9, 3, 3, 3, 4, 4, 5]), 1)]  # by frequency: 3, 4, 5
    counted = [Row(torch.tensor([5, 3, 4, 5, 6]), 1), Row(torch.tensor([9, 9, 3]), 2)]
    assert coverage(chosen, counted, [2, 3], vocab_size=10) == pytest.approx({2: 3 / 5, 3: 4 / 5})
