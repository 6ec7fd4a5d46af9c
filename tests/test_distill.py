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
from tokenizers import processors
from transformers.utils.logging import disable_progress_bar, enable_progress_bar
from words import WORDS, save_word_target

from hf_d2sd.cli import main
from hf_d2sd.training import distill as module
from hf_d2sd.training.chats import Chat
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


def chat(turns: list[str]) -> Chat:
    return Chat([{"role": "user", "content": turn} for turn in turns])


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
            "left_out": {},
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

    def test_long_prompts_are_left_out_and_counted_however_often_the_run_is_started(self, target, prompts, tmp_path):
        settings = options(target, tmp_path / "out", prompts=[prompts], max_prompt_tokens=4)
        for _ in range(2):
            assert distill(settings)["left_out"] == {"longer than max_prompt_tokens": 1}
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
        first, again, longer, other = map(chat, (["A b"], ["a  B "], ["a b", "c"], ["c"]))
        assert without_repetitions([first, again, longer, other]) == [first, longer, other]

    def test_chats_that_differ_beside_the_users_turns_are_no_repetitions(self):
        plain, system = chat(["a"]), Chat([{"role": "system", "content": "b"}, {"role": "user", "content": "A"}])
        tools = Chat(plain.messages, [{"type": "function"}])
        assert without_repetitions([plain, system, tools, tools]) == [plain, system, tools]

    def test_a_row_stays_held_out_whatever_is_around_it(self):
        rows = [Row(torch.arange(i, i + 9), 3) for i in range(1000)]
        share = sum(row.is_held_out(10) for row in rows)
        assert 60 < share < 140
        assert [row.is_held_out(10) for row in rows[::7]] == [Row(row.tokens, 3).is_held_out(10) for row in rows[::7]]


class TestChats:
    """What the rows of a chat begin with, as the template writes it."""

    def prompts_of(self, target, tmp_path, *rows: dict, **settings) -> list[str]:
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = options(target, tmp_path / "out", prompts=[str(path)], **settings)
        distill(settings)
        decode = Writer(settings).tokenizer.decode
        return sorted(
            (decode(row.tokens[: row.prompt_length]) for row in read_rows(tmp_path / "out")),
            key=lambda text: len(text),
        )

    def test_a_system_message_and_the_assistants_turns_are_kept(self, target, tmp_path):
        said = [("system", "q"), ("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "never seen")]
        messages = [{"role": role, "content": content} for role, content in said]
        first = "<system> q <end> <user> a <reply>"
        found = self.prompts_of(target, tmp_path, {"messages": messages})
        assert found == [first, f"{first} b c <end> <user> d <reply>"]

    def test_the_systems_message_of_a_chat_comes_before_that_of_the_options(self, target, tmp_path):
        own = {"messages": [{"role": "system", "content": "q"}, {"role": "user", "content": "a"}]}
        found = self.prompts_of(target, tmp_path, own, {"prompt": "a b c"}, system="x")
        assert found == ["<system> q <end> <user> a <reply>", "<system> x <end> <user> a b c <reply>"]

    def test_tools_and_their_results_reach_the_template(self, target, tmp_path):
        tokenizer = tf.AutoTokenizer.from_pretrained(target)
        tokenizer.chat_template = (
            "{% for t in tools or [] %}{{ t['function']['name'] }} {% endfor %}{% for m in messages %}"
            "{% for c in m['tool_calls'] or [] %}<think> {{ c['function']['arguments']['x'] }} {% endfor %}"
            "{{ m['role'][0] }} {{ m['content'] }} {% endfor %}<reply>"
        )
        folder = tmp_path / "target"
        tf.AutoModelForCausalLM.from_pretrained(target).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        call = {"type": "function", "function": {"name": "f", "arguments": '{"x": "k"}'}}
        messages = [
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "c"},
            {"role": "tool", "content": "d"},
        ]
        row = {"messages": messages, "tools": json.dumps([{"type": "function", "function": {"name": "f"}}])}
        assert self.prompts_of(folder, tmp_path, row) == ["f u b <reply>", "f u b <think> k a t c t d <reply>"]

    def test_what_the_template_refuses_is_left_out_and_counted(self, target, tmp_path):
        tokenizer = tf.AutoTokenizer.from_pretrained(target)
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "<user> {{ m['content'] }} {% endfor %}<reply>"
        )
        folder = tmp_path / "target"
        tf.AutoModelForCausalLM.from_pretrained(target).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        path = tmp_path / "chats.jsonl"
        refused = {"messages": [{"role": "system", "content": "q"}, {"role": "user", "content": "a"}]}
        path.write_text(json.dumps(refused) + '\n{"prompt": "b"}\n')
        counts = distill(options(folder, tmp_path / "out", prompts=[str(path)]))
        assert counts["rows"] == 1 and counts["left_out"] == {"refused by the chat template: no system": 1}
        with pytest.raises(ValueError, match="refuses --system and a user's turn: no system"):
            distill(options(folder, tmp_path / "other", prompts=[str(path)], system="q"))

    def test_rows_that_cannot_be_used_are_counted_beside_the_others(self, target, tmp_path):
        path = tmp_path / "chats.jsonl"
        path.write_text('{"prompt": "a"}\n{"text": "b"}\nnull\n')
        counts = distill(options(target, tmp_path / "out", prompts=[str(path)]))
        assert counts["rows"] == 1 and counts["left_out"] == {"cannot be used": 2}


class TestSecondTurns:
    def test_the_target_asks_and_answers_after_its_own_reply(self, target, prompts, tmp_path):
        plain, more = tmp_path / "plain", tmp_path / "more"
        settings = dict(prompts=[prompts], max_prompts=8, max_new_tokens=60, batch_size=8)
        distill(options(target, plain, **settings))
        counts = distill(options(target, more, second_turns=2, **settings))
        firsts, rows = as_text(read_rows(plain)), as_text(read_rows(more))
        assert set(firsts) < set(rows), "the chats' own turns are answered as ever"
        chats = len(set(firsts))
        assert len(rows) + counts["left_out"]["second turn without an end"] >= 2 * chats
        decode = Writer(options(target, more, **settings)).tokenizer.decode
        texts = sorted((decode(list(tokens)).removesuffix("<end>").strip() for _, *tokens in rows), key=len)
        model = tf.AutoModelForCausalLM.from_pretrained(target).eval()
        for length, *tokens in set(rows) - set(firsts):
            prompt = decode(tokens[:length])
            before = [text for text in texts if prompt.startswith(f"{text} <end> <user> ")][-1]
            question = prompt[len(f"{before} <end> <user> ") :].removesuffix(" <reply>")
            assert len(question) >= 12 and prompt.endswith(" <reply>")
            expected = model.generate(torch.tensor([tokens[:length]]), do_sample=False, max_new_tokens=60)
            assert expected[0].tolist() == tokens

    def test_a_seed_decides_them(self, target, prompts, tmp_path):
        settings = dict(prompts=[prompts], max_prompts=6, max_new_tokens=20, batch_size=6, second_turns=1)
        found = []
        for name, seed in (("a", 0), ("b", 0)):
            distill(options(target, tmp_path / name, seed=seed, **settings))
            found.append(as_text(read_rows(tmp_path / name)))
        writer = Writer(options(target, tmp_path / "a", **settings))
        chats = [chat(["b c"]), chat(["d"]), chat(["a b"]), chat(["e"])]
        assert found[0] == found[1]
        assert as_text(writer.answer(chats, seed=0)) != as_text(writer.answer(chats, seed=1))

    def test_a_folder_that_an_earlier_release_began_goes_on(self, target, prompts, tmp_path):
        distill(options(target, tmp_path / "out", prompts=[prompts], stop_after=0.0))
        note = tmp_path / "out" / "distill.json"
        earlier = json.loads(note.read_text())
        del earlier["raw"], earlier["second_turns"]
        note.write_text(json.dumps(earlier))
        with pytest.raises(ValueError, match="second_turns: 0 there, 1 now"):
            distill(options(target, tmp_path / "out", prompts=[prompts], second_turns=1))
        assert distill(options(target, tmp_path / "out", prompts=[prompts]))["rows"] == 28


class TestRaw:
    @pytest.fixture
    def base(self, target, tmp_path_factory):
        """A target without a chat template, whose tokenizer begins a text with a token of its own."""
        folder = tmp_path_factory.mktemp("base")
        tokenizer = tf.AutoTokenizer.from_pretrained(target)
        tokenizer.chat_template = None
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<system> $A", special_tokens=[("<system>", WORDS.index("<system>"))]
        )
        tokenizer.save_pretrained(folder)
        tf.AutoModelForCausalLM.from_pretrained(target).save_pretrained(folder)
        return folder

    def test_without_it_the_error_names_it(self, base, prompts, tmp_path):
        with pytest.raises(ValueError, match="no chat template. For a base model pass --raw"):
            distill(options(base, tmp_path / "out", prompts=[prompts]))

    def test_prompts_are_read_as_they_are(self, base, tmp_path):
        path = tmp_path / "texts.jsonl"
        path.write_text('{"prompt": "a b"}\n{"text": "c d e"}\n{"turns": ["f", "g"]}\n')
        counts = distill(options(base, tmp_path / "out", prompts=[str(path)], raw=True))
        assert counts["left_out"] == {"cannot be used": 1}, "a conversation"
        model = tf.AutoModelForCausalLM.from_pretrained(base).eval()
        tokenizer = tf.AutoTokenizer.from_pretrained(base)
        expected = []
        for text in ("a b", "c d e"):
            inputs = tokenizer(text, return_tensors="pt")
            assert inputs.input_ids[0, 0] == WORDS.index("<system>")
            expected.append((inputs.input_ids.shape[1], model.generate(**inputs, do_sample=False, max_new_tokens=12)))
        assert as_text(read_rows(tmp_path / "out")) == [(length, *row[0].tolist()) for length, row in expected]

    @pytest.mark.parametrize("changes", [{"system": "q"}, {"self_prompts": 2}, {"second_turns": 1}])
    def test_what_takes_a_template_is_refused(self, base, prompts, tmp_path, changes):
        with pytest.raises(ValueError, match=f"--{next(iter(changes))}: of the chat template, which --raw leaves out"):
            options(base, tmp_path, prompts=[prompts], raw=True, **changes)


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
            ("{", "line 2: no JSON, or torn"),
            ('{"prompt": "b', "line 2: no JSON, or torn"),
        ],
    )
    def test_a_file_that_is_torn(self, target, tmp_path, line, message):
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

    def test_the_command_says_it_in_one_line(self, target, tmp_path):
        with pytest.raises(SystemExit, match="^hf-d2sd distill: Nothing to answer"):
            main(["distill", "--target", str(target), "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            main(["write"])
        assert stop.value.code == 2
