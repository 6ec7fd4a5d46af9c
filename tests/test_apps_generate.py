"""`hf-d2sd generate`: what it shows and returns is what plain decoding says, and bad input ends before loading."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from tiny import OracleDrafts
from words import save_word_drafters, save_word_target

from hf_d2sd import Piece, apps
from hf_d2sd.apps import display, loading
from hf_d2sd.apps.generate import GenerateOptions, generate
from hf_d2sd.cli import main

NEW = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return save_word_target(folder / "target"), *save_word_drafters(folder)


@pytest.fixture(scope="module")
def plain(folders):
    """Prompt and plain greedy reply to "a b c"."""
    target, tokenizer = (
        tf.AutoModelForCausalLM.from_pretrained(folders[0]),
        tf.AutoTokenizer.from_pretrained(folders[0]),
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a b c"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = target.generate(**prompt, do_sample=False, max_new_tokens=NEW)
    text = tokenizer.decode(out[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    return out[0], text


def options(folders, **changes) -> GenerateOptions:
    target, first, second = map(str, folders)
    settings = dict(target=target, drafters=[first, second], prompt="a b c", max_new_tokens=NEW, dtype="float32")
    return GenerateOptions(**{**settings, **changes})


def test_the_report_is_the_plain_reply_with_the_source_of_each_piece(folders, plain, monkeypatch):
    sequence, text = plain
    OracleDrafts(monkeypatch, sequence, accuracy=0.8)
    report = generate(options(folders, compare=True))
    assert report["text"] == "".join(text for text, _ in report["pieces"]) == report["plain"]["text"] == text
    assert report["plain"]["same_text"] is True
    counts = report["tokens_by_source"]
    assert counts.pop("context") == 0, "trees of width 1 are D²SD as published"
    assert all(counts.values()) and sum(counts.values()) == report["new_tokens"]
    assert report["mean_acceptance_length"] > 1.2 and report["dtype"] == report["plain"]["dtype"] == "float32"
    json.dumps(report)


def test_a_seed_samples_the_same_text_both_ways(folders):
    texts = set()
    for seed in range(3):
        report = generate(options(folders, temperature=1.5, seed=seed, compare=True))
        assert report["plain"]["same_text"] is True
        texts.add(report["text"])
    assert len(texts) > 1


def test_options_reach_the_decoding(folders):
    report = generate(options(folders, num_branches=0, attention_backend="eager"))
    assert report["tokens_by_source"]["second"] == 0
    assert report["attention_backend"].startswith("eager")


def test_without_drafters_the_text_so_far_is_the_source(folders):
    report = generate(options(folders, drafters=["context"], compare=True, prompt="a b c a b c a b c"))
    assert report["text"] == report["plain"]["text"] and report["plain"]["same_text"]
    counts = report["tokens_by_source"]
    assert counts["context"] > 0 and counts["first"] == counts["second"] == 0
    with pytest.raises(ValueError, match="without drafters has no branches"):
        generate(options(folders, drafters=["context"], num_branches=2))


def test_everything_that_shows_sources_knows_all_of_them():
    from hf_d2sd import D2SDStats
    from hf_d2sd.apps import drawing, page

    sources = set(D2SDStats().tokens_by_source)
    assert sources == {"first", "second", "context", "target"}
    shown = display.STYLES, display.BRACKETS, display.LABELS, page._LABELS, page._BADGES, drawing.COLOURS
    assert [set(each) for each in shown] == [sources] * len(shown)
    style = page._asset("explain.css")
    for source in sources:
        assert f".{source} {{ --by: var(--{source})" in style and style.count(f"--{source}-wash: #") == 2
    assert len(set(drawing.COLOURS.values())) == len(set(display.STYLES.values())) == len(sources)


def test_raw_prompts_have_no_template(folders):
    with_template, raw = generate(options(folders)), generate(options(folders, raw=True))
    assert raw["prompt_tokens"] == 3 and with_template["prompt_tokens"] == 5


def test_a_prompt_may_stand_in_a_file(folders, tmp_path):
    (tmp_path / "prompt.txt").write_text("a b c")
    report = generate(options(folders, prompt=None, prompt_file=tmp_path / "prompt.txt"))
    assert report["text"] == generate(options(folders))["text"]


def test_one_drafter_decodes_alone(folders):
    report = generate(options(folders, drafters=[str(folders[1])]))
    assert report["text"] == generate(options(folders))["text"]
    assert report["tokens_by_source"]["second"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(target="./nowhere"), "no folder ./nowhere"),
        (dict(drafters=["/no/where"]), "no folder /no/where"),
        (dict(drafters=[]), "names 0"),
        (dict(drafters=["a", "b", "c"]), "names 3"),
        (dict(prompt=""), "prompt is empty"),
        (dict(prompt=" \n"), "prompt is empty"),
        (dict(prompt=None), "one of the two"),
        (dict(prompt="a", prompt_file="b"), "one of the two"),
        (dict(prompt="a " * 2100), r"has 2102 tokens and max_new_tokens is 24; the target has positions for 2048"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(top_p=0.9), "above 0"),
        (dict(raw=True, system="a"), "drop one of them"),
        (dict(num_branches=-1), "num_branches is -1"),
        (dict(block_size=9), "d2sd_block_size is 9; the first drafter was made for at most 4"),
        (dict(tree_width=2), "Set d2sd_tree_budget"),
    ],
)
def test_bad_input_is_refused_before_any_weight_is_read(folders, monkeypatch, changes, words):
    monkeypatch.setattr(loading.PairPlan, "load", lambda plan: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=words):
        generate(options(folders, **changes))


def test_drafters_of_another_target_are_refused_before_any_weight_is_read(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(loading.PairPlan, "load", lambda plan: pytest.fail("weights were read"))
    other = save_word_drafters(tmp_path, vocab_size=32)
    with pytest.raises(ValueError, match="vocab_size is 32, the target's is 31"):
        generate(options(folders, drafters=list(map(str, other))))


def test_a_tokenizer_without_chat_template_asks_for_raw(folders, tmp_path):
    target = save_word_target(tmp_path / "target")
    tokenizer = tf.AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = None
    (target / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(target)
    with pytest.raises(ValueError, match="With --raw"):
        generate(options(folders, target=str(target)))


def command(folders, *more: str) -> list[str]:
    target, first, second = map(str, folders)
    return [
        "generate",
        "--target",
        target,
        "--drafters",
        first,
        second,
        "--prompt",
        "a b c",
        "--dtype",
        "float32",
        *more,
    ]


def test_the_command_prints_json_where_there_is_no_terminal(folders, plain, capsys):
    main(command(folders, "--max_new_tokens", str(NEW)))
    assert json.loads(capsys.readouterr().out)["text"] == plain[1]


def test_as_text_without_colours_sources_stand_in_brackets(folders, plain, monkeypatch, capsys):
    OracleDrafts(monkeypatch, plain[0], accuracy=0.8)
    main(command(folders, "--max_new_tokens", str(NEW), "--format", "text", "--compare"))
    shown = capsys.readouterr().out
    reply, rest = shown.split("plain decoding")
    assert "[" in reply and "{" in reply and "\x1b" not in shown
    assert reply.translate(str.maketrans("", "", "[]{}─")).split() == plain[1].split()
    assert "The same text both ways, in float32" in rest and "first drafter" in rest


def test_the_command_says_what_is_wrong_in_one_line(folders):
    with pytest.raises(SystemExit, match=r"^hf-d2sd generate: The prompt is empty: ' '\.$"):
        main(["generate", "--target", "x", "--drafters", "y", "--prompt", " "])


def test_a_terminal_shows_colours(folders):
    leader, follower = pty.openpty()
    settings = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", "LINES": "20"}
    script = f"from hf_d2sd.cli import main; main({command(folders, '--max_new_tokens', '8')!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=follower, stdout=follower, stderr=subprocess.DEVNULL, env=settings
    )
    os.close(follower)
    written = b""
    try:
        while part := os.read(leader, 65536):
            written += part
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait() == 0
    shown = written.decode()
    assert "\x1b[32mfirst drafter" in shown and "tokens a target pass" in shown


class TestTranscript:
    def write(self, pieces, **settings) -> str:
        console = display.Console(file=io.StringIO(), width=20, highlight=False, **settings)
        with display.Transcript(console, lambda: display.Text("status")) as transcript:
            for piece in pieces:
                transcript.add(piece)
        return console.file.getvalue()

    @pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
    def test_sources_are_colours_unless_they_are_not_wanted(self, environment):
        pieces = [Piece("a", "target"), Piece(" b", "first"), Piece(" c", "second")]
        shown = self.write(pieces, force_terminal=True, color_system="standard", _environ=environment)
        assert ("\x1b[32m b" in shown) is (not environment)
        assert ("a[ b]{ c}" in shown) is bool(environment)

    def test_what_a_terminal_would_obey_is_not_written(self):
        shown = self.write([Piece("a\x1b[2J\rb\x9bc\td\n", "target")])
        assert "\x1b" not in shown and "\r" not in shown and "\x9b" not in shown
        assert shown.startswith("a\ufffd[2J\ufffdb\ufffdc")

    def test_markup_in_a_reply_is_text(self):
        assert "[bold]x[/bold]" in self.write([Piece("[bold]x[/bold]", "target")])

    def test_long_lines_are_wrapped_once_and_lose_nothing(self):
        words = [part for i in range(30) for part in (f"word{i} ", "")] + ["\n", "\n", "end"]
        settings = dict(force_terminal=True, color_system="standard", legacy_windows=False)
        console = display.Console(file=io.StringIO(), width=20, highlight=False, record=True, **settings)
        transcript = display.Transcript(console, lambda: display.Text(""))
        for word in words:  # outside `with` nothing is drawn but finished lines
            transcript.add(Piece(word, "first"))
        transcript.__exit__(None, None, None)
        lines = console.export_text().splitlines()
        assert " ".join(lines).split() == "".join(words).split()
        assert max(map(len, map(str.rstrip, lines))) <= 20


def test_without_rich_text_output_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "hf_d2sd.apps.display")
    monkeypatch.delattr(apps, "display")
    monkeypatch.setattr(loading.PairPlan, "load", lambda plan: pytest.fail("weights were read"))
    with pytest.raises(ImportError, match="pip install 'hf-d2sd\\[bench\\]'"):
        generate(options(folders, format="text"))


def test_a_reply_of_one_token_has_no_speed_and_no_cycle(folders):
    report = generate(options(folders, max_new_tokens=1, compare=True))
    assert report["mean_acceptance_length"] is None and report["plain"]["speed_ratio"] is None
    assert report["new_tokens"] == 1


class TestTheFastestDtype:
    """By what the device can, and as long as nobody names another."""

    @pytest.mark.parametrize(
        ("flags", "dtype"),
        [
            ({"avx2", "avx512_bf16"}, torch.bfloat16),
            ({"amx_bf16", "amx_tile"}, torch.bfloat16),
            ({"neon", "bf16"}, torch.bfloat16),
            ({"avx2", "avx512f", "amx_int8"}, torch.float32),
            (set(), torch.float32),
        ],
    )
    def test_of_a_cpu_follows_from_its_flags(self, monkeypatch, flags, dtype):
        monkeypatch.setattr(loading, "cpu_flags", lambda: flags)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        assert loading.fastest_dtype(torch.device("cpu")) == dtype
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert loading.fastest_dtype(torch.device("cpu")) == torch.float32, "there is nothing that would use the units"

    @pytest.mark.parametrize(
        ("capability", "dtype"),
        [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), torch.float32)],
    )
    def test_of_a_gpu_follows_from_its_capability(self, monkeypatch, capability, dtype):
        def supported(including_emulation: bool = True) -> bool:
            return including_emulation or capability[0] >= 8

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        assert loading.fastest_dtype(torch.device("cuda")) == dtype

    @pytest.mark.parametrize("asks_torch", [True, False])
    def test_flags_are_those_that_linux_names(self, monkeypatch, asks_torch):
        """With a torch that can be asked, and with an older one."""
        if asks_torch:
            if not hasattr(torch.cpu, "get_capabilities"):
                pytest.skip("this torch cannot be asked")
        else:
            monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        text = Path("/proc/cpuinfo").read_text()
        for unit in loading.BFLOAT16_UNITS:
            assert (unit in loading.cpu_flags()) == (re.search(rf"\b{unit}\b", text) is not None)

    def test_is_the_default_of_a_reply_and_any_other_can_be_named(self, folders, monkeypatch):
        target, first, second = map(str, folders)
        unnamed = GenerateOptions(target=target, drafters=[first, second], prompt="a b c")
        monkeypatch.setattr(loading, "fastest_dtype", lambda device: torch.bfloat16)
        pair = loading.plan_pair(unnamed).load()  # of a checkpoint in float32
        assert pair.target.dtype == pair.assistant.first.dtype == torch.bfloat16
        assert loading.plan_pair(options(folders, dtype="float16")).dtype == torch.float16
        assert loading.plan_pair(options(folders, dtype="auto")).dtype == "auto"

    def test_a_quantized_target_stays_as_it_is(self, folders):
        config = tf.AutoConfig.from_pretrained(folders[0])
        assert loading.dtype_of("fastest", "cpu", config) != "auto"
        config.quantization_config = {"quant_method": "torchao"}
        assert loading.dtype_of("fastest", "cpu", config) == "auto"


def test_what_was_chosen_is_one_line_unless_options_say_how_trees_are(folders, library_default, capsys):
    report = generate(options(folders))
    assert re.match(r"\d+ cycles: .*tokens a pass; cost .* plain steps, .* expected; why: \w", report["decisions"])
    assert "\n" not in report["decisions"]
    assert generate(options(folders, num_branches=1))["decisions"] is None
    generate(options(folders, format="text"))
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"chosen \d+ cycles: ", shown)


def test_dtype_is_that_of_target_and_drafters(folders):
    pair = loading.plan_pair(options(folders, dtype="bfloat16")).load()
    assert pair.target.dtype == pair.assistant.first.dtype == pair.assistant.second.dtype == torch.bfloat16
