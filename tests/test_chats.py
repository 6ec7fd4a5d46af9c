"""Rows as people have them become chats; what cannot be used is named, what is torn is an error."""

import importlib.util
import json
import sys
from collections import Counter

import pytest

from hf_d2sd.training.chats import Chat, Talk, UnusableRow, chat_of, read_chats, require_datasets
from hf_d2sd.training.distill import DistillOptions

HI = [{"role": "user", "content": "hi"}]
SAID = [*HI, {"role": "assistant", "content": "yo"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prompts.jsonl"


class TestLayouts:
    @pytest.mark.parametrize(
        ("row", "messages"),
        [
            ({"prompt": "hi"}, HI),
            ({"prompt": HI, "chosen": [], "rejected": []}, HI),
            ({"turns": ["hi"]}, HI),
            ({"messages": SAID, "prompt": "no"}, SAID),
            ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, SAID),
            ({"conversations": SAID}, SAID),
            ({"conversations": SAID, "system": "s"}, [{"role": "system", "content": "s"}, *SAID]),
            ({"instruction": "hi", "input": "", "output": "yo"}, HI),
            ({"instruction": "hi", "input": "you"}, [{"role": "user", "content": "hi\nyou"}]),
            ({"instruction": "hi", "history": [["hi", "yo"]]}, [*SAID, *HI]),
            ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}]}]}, HI),
            ({"messages": [{**HI[0], "tool_calls": None, "name": None}], "tools": None, "turns": None}, HI),
            (
                {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
                [*HI, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
            ),
        ],
    )
    def test_they_are_read_as_messages(self, row, messages):
        assert chat_of(row) == Chat(messages)

    def test_arguments_of_a_call_that_are_a_text_of_json_become_an_object(self):
        text = {**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}
        row = {"messages": [*HI, {"role": "assistant", "tool_calls": [text]}], "tools": '[{"type": "function"}]'}
        chat = chat_of(row)
        assert chat.messages[1]["tool_calls"] == [CALL] and chat.tools == [{"type": "function"}]

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            (None, "a NoneType, no object"),
            ({"text": "a"}, r"none of `turns`, `messages`.*it has \['text'\]"),
            ({"turns": []}, "no turn of the user's"),
            ({"turns": "hi"}, "`turns` that is a str"),
            ({"prompt": "  "}, "without text"),
            ({"prompt": 3}, "no text but a int"),
            ({"messages": [{"role": "assistant", "content": "a"}]}, "no turn of the user's"),
            ({"messages": [{"role": "narrator", "content": "a"}]}, "the role 'narrator'"),
            ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]}, "image"),
            ({"messages": ["hi"]}, "a message that is a str"),
            ({"instruction": "hi", "history": [["a"]]}, "`history`"),
            ({"prompt": "hi", "tools": "{"}, "`tools` that are no JSON"),
            ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "without `function`"),
        ],
    )
    def test_what_cannot_be_used_says_why(self, row, reason):
        with pytest.raises(UnusableRow, match=reason):
            chat_of(row)

    def test_a_base_model_takes_one_text(self):
        assert chat_of({"text": "a"}, raw=True) == chat_of({"prompt": "a"}, raw=True)
        for row in ({"messages": SAID}, {"turns": ["a", "b"]}, {"prompt": "a", "system": "s"}):
            with pytest.raises(UnusableRow, match="takes a chat template"):
                chat_of(row, raw=True)


class TestTalks:
    def roles(self, *roles: str) -> list[str]:
        """What was said at each place where the assistant is to speak; a reply of the target's is in capitals."""
        talk = Talk(Chat([{"role": {"s": "system", "u": "user", "a": "assistant", "t": "tool"}[role], "content": role}
                          for role in roles]))  # fmt: skip
        found = []
        while talk.advance():
            found.append("".join(message["content"] for message in talk.messages))
            talk.reply("A")
        return found

    def test_the_target_speaks_after_each_turn_and_the_assistants_own_turn_is_kept(self):
        assert self.roles(*"suaua") == ["su", "suau"]
        assert self.roles(*"uu") == ["u", "uAu"]
        assert self.roles(*"auau") == ["au", "auau"]

    def test_results_of_several_calls_are_read_before_it_speaks(self):
        assert self.roles(*"uattu") == ["u", "uatt", "uattAu"]


class TestFiles:
    def test_rows_that_cannot_be_used_are_named_and_counted(self, path, monkeypatch):
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in [{"prompt": "a"}, {"text": "b"}, None, {"prompt": "c"}])
        )
        left_out: Counter = Counter()
        warned = []
        monkeypatch.setattr("hf_d2sd.training.chats.logger.warning", warned.append)
        chats = read_chats([str(path)], None, 0, left_out=left_out)
        assert sorted(chat.turns[0] for chat in chats) == ["a", "c"]
        assert left_out == {"cannot be used": 2}
        (said,) = warned
        assert f"{path}: 2 of 4 rows cannot be used" in said and "row 2" in said and "row 3" in said

    def test_a_file_of_nothing_else_is_an_error(self, path):
        path.write_text('{"text": "b"}\n')
        with pytest.raises(ValueError, match=r"prompts.jsonl: 1 of 1 rows cannot be used: none of .* \(1: row 1\)"):
            read_chats([str(path)], None, 0)

    @pytest.mark.parametrize("text", ['{"prompt": "é"}\n', '[{"prompt": "é"}]', '[\n{"prompt":\n"é"}\n]\n'])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    def test_lines_or_an_array_with_a_byte_order_mark_or_without(self, path, text, encoding):
        path.write_text(text, encoding=encoding)
        assert read_chats([str(path)], None, 0) == [Chat([{"role": "user", "content": "é"}])]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"prompt": "a"}\n{"prompt": "é"}\n'.encode("latin-1"), "line 2: not in UTF-8.*iconv"),
            ('{"prompt": "a"}\n'.encode("utf-16"), "line 1: not in UTF-8"),
            (b'{"prompt": "a"}\n{"prom', "line 2: no JSON, or torn"),
            (b'[{"prompt": "a"}, {"pro', "no JSON array, or a torn one"),
            ('{"prompt": "é'.encode()[:-1], "line 1: not in UTF-8"),
        ],
    )
    def test_a_torn_file_or_one_in_another_encoding_is_an_error_that_names_it(self, path, content, message):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"prompts.jsonl.*{message}"):
            read_chats([str(path)], None, 0)

    def test_a_limit_takes_as_many_that_can_be_used(self, path):
        rows = [{"prompt": str(index)} if index % 2 else {"text": "x"} for index in range(40)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = read_chats([str(path)], 10, seed=3)
        assert len(found) == 10 and found != read_chats([str(path)], 10, seed=4)
        assert found == read_chats([str(path)], None, seed=3)[:10]


class TestDataSets:
    @pytest.mark.parametrize("source", ["prompts.parquet", "HuggingFaceH4/ultrachat_200k:test_sft", "a/b:c:d"])
    def test_the_package_is_asked_for_before_any_model_is_read(self, tmp_path, monkeypatch, source):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"`datasets`, which is not installed: pip install 'hf-d2sd\[data\]'"):
            DistillOptions("no-such-target", tmp_path, [source])
        require_datasets(["no-such-file.jsonl"])

    def test_a_file_that_is_not_there(self):
        for source in ("no/such.jsonl", "no-such-file"):
            with pytest.raises(FileNotFoundError):
                read_chats([source], None, 0)

    def test_parquet(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "set"
        folder.mkdir()
        messages = [[{"role": "user", "content": text}] for text in "abc"]
        rows = datasets.Dataset.from_dict({"messages": [*messages, None], "tools": [None, "[{}]", None, None]})
        rows.to_parquet(folder / "rows.parquet")
        left_out: Counter = Counter()
        for source in (folder / "rows.parquet", folder):
            chats = read_chats([str(source)], None, 0, left_out=left_out)
            assert sorted((chat.turns[0], chat.tools) for chat in chats) == [("a", None), ("b", [{}]), ("c", None)]
        assert left_out == {"cannot be used": 2}
        (tmp_path / "torn.parquet").write_bytes((folder / "rows.parquet").read_bytes()[:-9])
        with pytest.raises(ValueError, match="torn.parquet cannot be read"):
            read_chats([str(tmp_path / "torn.parquet")], None, 0)
        with pytest.raises(FileNotFoundError, match="missing.parquet"):
            read_chats([str(tmp_path / "missing.parquet")], None, 0)

    @pytest.mark.parametrize(
        ("source", "asked"),
        [
            ("a/b", ("a/b", None, "train")),
            ("a/b:test", ("a/b", None, "test")),
            ("a/b:main:test", ("a/b", "main", "test")),
        ],
    )
    def test_of_the_hub(self, monkeypatch, source, asked):
        """What is asked of `datasets`, which stands in here with one row."""
        calls = []

        class Stand:
            @staticmethod
            def load_dataset(name, config, split):
                calls.append((name, config, split))
                return [{"prompt": "a"}]

        monkeypatch.setitem(sys.modules, "datasets", Stand)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        assert [chat.turns for chat in read_chats([source], None, 0)] == [["a"]]
        assert calls == [asked]
