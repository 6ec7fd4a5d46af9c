"""`hf-d2sd distill`: rows are what the target writes, once each, however often the run is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar, enable_progress_bar
from words import WORDS, save_word_target

from hf_d2sd.cli import main
from hf_d2sd.training import distill as module
from hf_d2sd.training.distill import DistillOptions, Writer, distill, without_repetitions
from hf_d2sd.training.shards import Row, read_rows, shard_paths, write_shard


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_word_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    letters = WORDS[5:]
    rows = [{"turns": [f"{letters[i]} {letters[j]}"]} for i in range(5) for j in range(5)]
    rows += [{"turns": ["a b c", "d e"]}, {"messages": [{"role": "user", "content": "k l"}]}, {"prompt": "A  B"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(target, out, **changes) -> DistillOptions:
    return DistillOptions(
        **{"target": str(target), "out": out, "dtype": "float32", "batch_size": 4, "max_new_tokens": 12, **changes}
    )


def as_text(rows: list[Row]) -> list[tuple]:
    return sorted((row.prompt_length, *row.tokens.tolist()) for row in rows)


class TestRows:
    def test_responses_are_plain_greedy_text(self, target, prompts, tmp_path):
        counts = distill(options(target, tmp_path / "out", prompts=[prompts]))
        model = tf.AutoModelForCausalLM.from_pretrained(target).eval()
        rows = read_rows(tmp_path / "out")
        for row in rows:
            expected = model.generate(row.tokens[None, : row.prompt_length], do_sample=False, max_new_tokens=12)
            assert row.tokens.tolist() == expected[0].tolist()
        assert counts == {
            "shards": len(shard_paths(tmp_path / "out")),
            "rows": 28,  # 25 pairs of letters, one of them again in capitals, two more, a second turn
            "prompt_tokens": sum(row.prompt_length for row in rows),
            "response_tokens": sum(row.response_length for row in rows),
            "missing_shards": 0,
        }

    def test_a_second_turn_follows_the_targets_own_reply(self, target, prompts, tmp_path):
        distill(options(target, tmp_path / "out", prompts=[prompts]))
        decode = Writer(options(target, tmp_path / "out", prompts=[prompts])).tokenizer.decode
        rows = read_rows(tmp_path / "out")
        first = next(row for row in rows if decode(row.tokens[: row.prompt_length]) == "<user> a b c <reply>")
        reply = decode(first.tokens[first.prompt_length :], skip_special_tokens=True)
        whole = f"<user> a b c <reply> {reply} <end> <user> d e <reply>"
        assert sum(decode(row.tokens[: row.prompt_length]) == whole for row in rows) == 1

    def test_system_message_and_template_options_reach_the_template(self, target, prompts, tmp_path):
        settings = dict(prompts=[prompts], system="q q", template_options='{"enable_thinking": true}', max_prompts=3)
        distill(options(target, tmp_path / "out", **settings))
        decode = Writer(options(target, tmp_path / "out", **settings)).tokenizer.decode
        for row in read_rows(tmp_path / "out"):
            text = decode(row.tokens[: row.prompt_length])
            assert text.startswith("<system> q q <end> <user>") and text.endswith("<reply> <think>")

    def test_long_prompts_are_left_out(self, target, prompts, tmp_path):
        distill(options(target, tmp_path / "out", prompts=[prompts], max_prompt_tokens=4))
        assert {row.prompt_length for row in read_rows(tmp_path / "out")} == {4}

    def test_prompts_that_were_answered_before_are_left_out(self, target, prompts, tmp_path):
        distill(options(target, tmp_path / "some", prompts=[prompts], max_prompts=10))
        some, folders = read_rows(tmp_path / "some"), [str(tmp_path / "some")]
        counts = distill(options(target, tmp_path / "rest", prompts=[prompts], answered=folders))
        rest = read_rows(tmp_path / "rest")
        distill(options(target, tmp_path / "all", prompts=[prompts]))
        assert 0 < counts["rows"] == 28 - len(some)
        assert as_text(some + rest) == as_text(read_rows(tmp_path / "all"))

    def test_answered_without_rows(self, target, prompts, tmp_path):
        with pytest.raises(ValueError, match="has no rows"):
            distill(options(target, tmp_path / "rest", prompts=[prompts], answered=[str(tmp_path)]))

    @pytest.mark.parametrize(("largest", "size"), [(2**16 - 1, 2), (2**16, 4), (200_000, 4)])
    def test_tokens_take_two_bytes_where_they_fit(self, tmp_path, largest, size):
        rows = [Row(torch.tensor([5, largest, 7]), 1), Row(torch.tensor([0, 9]), 2)]
        write_shard(tmp_path / "rows-00000.safetensors", rows)
        assert as_text(read_rows(tmp_path)) == as_text(rows)
        tokens = load_file(tmp_path / "rows-00000.safetensors")["tokens"]
        assert tokens.element_size() == size

    def test_repetitions_are_dropped(self):
        assert without_repetitions([["A b"], ["a  B "], ["a b", "c"], ["c"]]) == [["A b"], ["a b", "c"], ["c"]]

    def test_a_row_stays_held_out_whatever_is_around_it(self):
        rows = [Row(torch.arange(i, i + 9), 3) for i in range(1000)]
        share = sum(row.is_held_out(10) for row in rows)
        assert 60 < share < 140
        assert [row.is_held_out(10) for row in rows[::7]] == [Row(row.tokens, 3).is_held_out(10) for row in rows[::7]]


class TestPromptsOfItsOwn:
    def test_they_begin_with_an_opening_and_are_answered(self, target, tmp_path):
        openings = tmp_path / "openings.txt"
        openings.write_text("c a b\nf g h i\n\n")
        assert module.read_openings(str(openings)) == ["c a b", "f g h i"]
        settings = dict(self_prompts=90, openings=str(openings), batch_size=64)
        distill(options(target, tmp_path / "out", **settings))
        files = sorted((tmp_path / "out" / "prompts").glob("*.json"))
        texts = [text for file in files for text in json.loads(file.read_text())["prompts"]]
        assert len(set(texts)) >= 90
        assert {text.startswith("c a b") for text in texts} == {True, False}
        assert all(text.startswith(("c a b", "f g h i")) for text in texts)
        assert len(read_rows(tmp_path / "out")) <= 90

    def test_progress_bars_may_be_off(self, target, tmp_path):
        disable_progress_bar()
        try:
            distill(options(target, tmp_path / "out", self_prompts=2, batch_size=4))
        finally:
            enable_progress_bar()
        assert read_rows(tmp_path / "out")

    def test_an_opening_may_have_several_lines(self, tmp_path):
        (tmp_path / "openings.txt").write_text("a\\nb\nc\n")
        assert module.read_openings(str(tmp_path / "openings.txt")) == ["a\nb", "c"]
        assert module.read_openings(None) == [""]

    def test_a_target_that_never_ends_a_turn_is_an_error(self, target, tmp_path, monkeypatch):
        monkeypatch.setattr(Writer, "write_prompts", lambda *_, **__: [])
        with pytest.raises(ValueError, match="--prompts"):
            distill(options(target, tmp_path / "out", self_prompts=5))


class TestAKilledRun:
    def test_it_goes_on_and_ends_as_an_unbroken_one(self, target, prompts, tmp_path):
        """SIGKILL as soon as the first shards are there, twice; sampled, so that a wrong seed would show."""
        settings = dict(prompts=[prompts], temperature=1.0, batch_size=2, max_new_tokens=200)
        out = tmp_path / "killed"
        arguments = [f"--{name}={value}" for name, value in {**settings, "prompts": prompts}.items()]
        command = [sys.executable, "-m", "hf_d2sd.cli", "distill", "--target", target, "--out", out, *arguments]
        for shards in (2, 5):
            with subprocess.Popen([*map(str, command), "--dtype=float32"], stderr=subprocess.DEVNULL) as process:
                deadline = time.monotonic() + 120
                while len(shard_paths(out)) < shards and time.monotonic() < deadline and process.poll() is None:
                    time.sleep(0.005)
                os.kill(process.pid, signal.SIGKILL)
        assert shards <= len(shard_paths(out)) < 14
        before = {path: path.stat().st_mtime_ns for path in shard_paths(out)}
        distill(options(target, out, **settings))
        assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items()), "written anew"
        distill(options(target, tmp_path / "unbroken", **settings))
        assert as_text(read_rows(out)) == as_text(read_rows(tmp_path / "unbroken"))

    def test_it_can_stop_after_some_minutes(self, target, prompts, tmp_path):
        counts = distill(options(target, tmp_path / "out", prompts=[prompts], stop_after=0.0))
        assert counts["rows"] == 0 and counts["missing_shards"] == 7
        assert not shard_paths(tmp_path / "out")
        assert distill(options(target, tmp_path / "out", prompts=[prompts]))["rows"] == 28


class TestSeveralProcesses:
    def test_two_share_one_folder_and_write_what_one_writes(self, target, prompts, tmp_path):
        settings = dict(prompts=[prompts], self_prompts=40, temperature=1.0, batch_size=4, max_new_tokens=100)
        arguments = [f"--{name}={value}" for name, value in {**settings, "prompts": prompts}.items()]
        command = ["-m", "hf_d2sd.cli", "distill", "--target", target, "--out", tmp_path / "shared", *arguments]
        running = [
            subprocess.Popen([sys.executable, *map(str, command), "--dtype=float32"], stderr=subprocess.DEVNULL)
            for _ in range(2)
        ]
        assert [process.wait(timeout=300) for process in running] == [0, 0]
        distill(options(target, tmp_path / "alone", **settings))
        assert as_text(read_rows(tmp_path / "shared")) == as_text(read_rows(tmp_path / "alone"))


class TestErrors:
    def test_other_options_in_the_same_folder(self, target, prompts, tmp_path):
        distill(options(target, tmp_path / "out", prompts=[prompts], max_prompts=2))
        with pytest.raises(ValueError, match="temperature: 0.0 there, 0.5 now"):
            distill(options(target, tmp_path / "out", prompts=[prompts], max_prompts=2, temperature=0.5))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"text": "a"}', r"line 2: expected `turns`.*\['text'\]"),
            ('{"turns": []}', "line 2"),
            ("{", "line 2: no JSON"),
        ],
    )
    def test_a_prompt_that_cannot_be_read(self, target, tmp_path, line, message):
        path = tmp_path / "prompts.jsonl"
        path.write_text('{"prompt": "a"}\n' + line + "\n")
        with pytest.raises(ValueError, match=message):
            distill(options(target, tmp_path / "out", prompts=[str(path)]))

    @pytest.mark.parametrize(
        "changes", [{}, {"self_prompts": 1, "temperature": -1}, {"self_prompts": 1, "batch_size": 0}]
    )
    def test_options_that_make_no_sense(self, target, tmp_path, changes):
        with pytest.raises(ValueError):
            options(target, tmp_path, **changes)

    def test_a_truncated_shard_and_a_folder_without_rows(self, tmp_path):
        with pytest.raises(ValueError, match="hf-d2sd distill"):
            read_rows(tmp_path)
        path = tmp_path / "rows-00000.safetensors"
        write_shard(path, [Row(torch.arange(9), 3)])
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(ValueError, match="rows-00000.safetensors is damaged"):
            read_rows(tmp_path)

    def test_a_full_disk_leaves_what_was_there(self, tmp_path, monkeypatch):
        path = tmp_path / "rows-00000.safetensors"
        write_shard(path, [Row(torch.arange(9), 3)])

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("hf_d2sd.training.shards.save_file", full)
        with pytest.raises(OSError, match="could not be written.*No space left"):
            write_shard(path, [Row(torch.arange(5), 3)])
        assert read_rows(tmp_path)[0].tokens.tolist() == list(range(9))

    def test_a_target_without_a_chat_template(self, target, tmp_path, monkeypatch):
        tokenizer = tf.AutoTokenizer.from_pretrained(target)
        tokenizer.chat_template = None
        monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
        with pytest.raises(ValueError, match="no chat template"):
            distill(options(target, tmp_path, self_prompts=1))

    def test_the_command_says_it_in_one_line(self, target, tmp_path):
        with pytest.raises(SystemExit, match="^hf-d2sd distill: Nothing to answer"):
            main(["distill", "--target", str(target), "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            main(["write"])
        assert stop.value.code == 2
