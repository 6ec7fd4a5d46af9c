"""Records on disk: what is written stays, what is torn is no record, and runs of other settings are not mixed."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from hf_d2sd import records

# The module by its file alone: what is killed here need not wait for torch.
PRELUDE = f"""
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("records", {records.__file__!r})
records = importlib.util.module_from_spec(spec)
spec.loader.exec_module(records)
path = Path(sys.argv[1])
"""


def run_killed(code: str, path) -> None:
    """Run the code, which kills itself."""
    done = subprocess.run([sys.executable, "-c", PRELUDE + code, str(path)], stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.jsonl"


class TestLines:
    def test_what_is_appended_is_read(self, path):
        records.append(path, {"a": "é\u2028\n"}, {"a": 2})
        records.append(path, {"a": [3]})
        assert records.read(path) == [{"a": "é\u2028\n"}, {"a": 2}, {"a": [3]}]
        assert path.read_bytes().count(b"\n") == 3

    def test_no_file_holds_no_record(self, path):
        assert records.read(path) == []
        with pytest.raises(FileNotFoundError):  # but one that somebody has named must be there
            list(records.read_numbered(path))

    def test_a_record_survives_a_kill_right_after_append(self, path):
        run_killed("records.append(path, {'a': 1})\nrecords.append(path, {'a': 2})\nos.kill(os.getpid(), 9)", path)
        assert records.read(path) == [{"a": 1}, {"a": 2}]

    def test_a_record_is_on_the_disk_when_append_returns(self, path, monkeypatch):
        synced = []
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
        records.append(path, {"a": 1})
        assert synced == [path.stat().st_size] and synced[0] > 0

    def test_a_torn_last_line_is_dropped_wherever_it_is_torn(self, path):
        whole, last = b'{"a": 1}\n{"a": 2}\n', '{"a": "é", "b": {"c": [3]}}'.encode()
        for cut in range(1, len(last)):
            path.write_bytes(whole + last[:cut])
            assert records.read(path) == [{"a": 1}, {"a": 2}], last[:cut]
            assert path.read_bytes() == whole + last[:cut]  # another process may be writing it
            records.append(path, {"a": 3})
            assert path.read_bytes() == whole + b'{"a": 3}\n'

    def test_a_line_that_was_cut_off_is_written_again(self, path):
        records.append(path, {"a": 1})
        with open(path, "a") as file:
            file.write('{"a": ')
        assert records.read(path) == [{"a": 1}]
        records.append(path, {"a": 2})
        assert records.read(path) == [{"a": 1}, {"a": 2}]

    def test_a_first_line_may_be_torn_too(self, path):
        path.write_text('{"a"')
        assert records.read(path) == []
        records.append(path, {"a": 1})
        assert path.read_text() == '{"a": 1}\n'

    def test_a_last_line_that_lacks_its_end_alone_is_a_record(self, path):
        path.write_text('{"a": 1}\n{"a": 2}')
        assert records.read(path) == [{"a": 1}, {"a": 2}]
        records.append(path, {"a": 3})
        assert records.read(path) == [{"a": 1}, {"a": 2}, {"a": 3}]

    @pytest.mark.parametrize("read", [records.read, lambda path: list(records.read_numbered(path))])
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"a": 1}\n\n{"a": \n{"a": 3}\n', r"records.jsonl, line 3: no JSON object \(Expecting value"),
            ('{"a": 1}\n{"a": \n', "line 2: no JSON object"),
            ('{"a": 1{"a": 2}\n', "line 1: no JSON object"),
            ('[1, 2]\n{"a": 3}\n', r"line 1: no JSON object \(a list\)"),
            (b'{"a": "\xc3"}\n', "line 1: no JSON object"),
        ],
    )
    def test_any_other_torn_line_is_an_error_with_its_number(self, path, text, message, read):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=message):
            read(path)

    def test_lines_of_a_file_by_hand_have_their_numbers_and_are_all_whole(self, path):
        path.write_text('\n{"a": 1}\r\n \n{"a": 2}')
        assert list(records.read_numbered(path)) == [(2, {"a": 1}), (4, {"a": 2})]
        path.write_text('{"a": 1}\n{"a": ')
        with pytest.raises(ValueError, match="line 2: no JSON object"):
            list(records.read_numbered(path))

    def test_a_file_of_lines_is_written_anew(self, path):
        records.append(path, {"a": 1}, {"a": 2})
        records.write_lines(path, [{"a": 2}, {"b": "é"}])
        assert path.read_text(encoding="utf-8") == '{"a": 2}\n{"b": "é"}\n'
        records.write_lines(path, [])
        assert records.read(path) == [] and path.exists()


class TestWhole:
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
    @pytest.mark.parametrize("shared", [False, True])
    def test_a_writer_that_raises_leaves_what_was_there(self, tmp_path, error, shared):
        path = tmp_path / "file"

        def write(partial):
            partial.write_text("half")
            raise error("No space left")

        with pytest.raises(error):
            records.write_whole(path, write, shared)
        assert list(tmp_path.iterdir()) == []
        records.write_text(path, "whole")
        with pytest.raises(error, match="No space left"):
            records.write_whole(path, write, shared)
        assert list(tmp_path.iterdir()) == [path] and path.read_text() == "whole"

    def test_a_disk_that_is_full_is_told_with_the_files_name(self, tmp_path):
        with pytest.raises(OSError, match="file could not be written, and what was there before is unchanged: .*such"):
            records.write_text(tmp_path / "nowhere" / "file", "whole")

    def test_a_writer_that_is_killed_leaves_what_was_there(self, tmp_path):
        path = tmp_path / "file"
        records.write_text(path, "whole")
        code = """
def write(partial):
    partial.write_text("half")
    os.kill(os.getpid(), 9)
records.write_whole(path, write)
"""
        run_killed(code, path)
        assert path.read_text() == "whole" and (tmp_path / ".file.partial").read_text() == "half"
        records.write_whole(path, lambda partial: partial.write_text("new"))
        assert list(tmp_path.iterdir()) == [path] and path.read_text() == "new"

    def test_several_processes_may_write_one_file(self, tmp_path):
        path = tmp_path / "file.json"
        code = "for i in range(100):\n    records.write_json(path, {'text': sys.argv[2] * 10**5, 'i': i})"
        command = [sys.executable, "-c", PRELUDE + code, str(path)]
        writers = [subprocess.Popen([*command, letter], stderr=subprocess.PIPE) for letter in "ab"]
        while any(writer.poll() is None for writer in writers):
            if path.exists():
                assert len(set(json.loads(path.read_text())["text"])) == 1
        assert [writer.communicate()[1] for writer in writers] == [b"", b""]
        assert list(tmp_path.iterdir()) == [path]

    def test_json_is_for_people_too(self, tmp_path):
        records.write_json(tmp_path / "a.json", {"α": 1})
        assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "α": 1\n}\n'

    def test_a_file_never_takes_a_folders_place(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        with pytest.raises(OSError, match="could not be written"):
            records.write_text(tmp_path / "out", "whole")
        assert (tmp_path / "out" / "mine").read_text() == "mine" and list(tmp_path.iterdir()) == [tmp_path / "out"]


class TestWholeFolders:
    @staticmethod
    def writer(content: str):
        def write(partial):
            partial.mkdir()
            for name in "ab":
                (partial / name).write_text(content)

        return write

    def test_a_folder_is_seen_whole_or_not_at_all_at_every_step(self, tmp_path, monkeypatch):
        folder, seen = tmp_path / "best", []

        def noting(stock):
            def call(*args, **kwargs):
                result = stock(*args, **kwargs)
                seen.append([file.read_text() for file in sorted(folder.iterdir())] if folder.exists() else None)
                return result

            return call

        for owner, name in ((os, "replace"), (os, "unlink"), (os, "rename")):
            monkeypatch.setattr(owner, name, noting(getattr(owner, name)))
        records.write_whole(folder, self.writer("old"))
        records.write_whole(folder, self.writer("new"))
        assert [state for state in seen if state not in (None, ["old"] * 2, ["new"] * 2)] == []
        assert seen[-1] == ["new"] * 2 and list(tmp_path.iterdir()) == [folder]

    def test_what_a_killed_writer_left_is_in_nobodys_way(self, tmp_path):
        for name in (".best.partial", ".best.old.partial"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "stray").write_text("")
        records.write_whole(tmp_path / "best", self.writer("one"))
        records.write_whole(tmp_path / "best", self.writer("two"))
        assert sorted(file.name for file in (tmp_path / "best").iterdir()) == ["a", "b"]
        assert list(tmp_path.iterdir()) == [tmp_path / "best"]


def test_a_file_is_written_by_one_of_them(tmp_path):
    path, calls, started, finish = tmp_path / "rows-00000", [], threading.Event(), threading.Event()

    def slowly(path):
        calls.append("slow")
        started.set()
        finish.wait(timeout=60)
        path.write_text("whole")

    thread = threading.Thread(target=records.write_once, args=(path, slowly))
    thread.start()
    started.wait(timeout=60)
    assert not records.write_once(path, lambda _: calls.append("other"))  # in somebody's hands: go on elsewhere
    waiting = threading.Thread(target=records.write_once, args=(path, lambda _: calls.append("third"), True))
    waiting.start()
    finish.set()
    thread.join(timeout=60), waiting.join(timeout=60)
    assert calls == ["slow"] and path.read_text() == "whole"
    assert not records.write_once(path, lambda _: calls.append("again"))
    assert calls == ["slow"]


class TestRunsThatGoOn:
    def test_the_same_settings_go_on_and_the_note_stays(self, tmp_path):
        path = tmp_path / "new" / "run.json"
        records.begin(path, {"lr": 0.1, "layers": (1, 2)})
        noted = path.read_bytes()
        for layers in ((1, 2), [1, 2]):
            records.begin(path, {"lr": 0.1, "layers": layers})
        assert path.read_bytes() == noted and json.loads(noted) == {"lr": 0.1, "layers": [1, 2]}

    def test_other_settings_are_refused_with_both_values(self, tmp_path):
        path = tmp_path / "run.json"
        records.begin(path, {"lr": 0.1, "seed": 0, "name": "a"})
        noted = path.read_bytes()
        with pytest.raises(ValueError, match=r"run.json .* other settings: lr: 0.1 there, 0.2 now; name: 'a' there"):
            records.begin(path, {"lr": 0.2, "seed": 0, "name": "b"})
        with pytest.raises(ValueError, match="fresh: None there, 1 now"):
            records.begin(path, {"lr": 0.1, "seed": 0, "name": "a", "fresh": 1})
        assert path.read_bytes() == noted

    def test_what_is_noted_beside_the_settings_may_differ(self, tmp_path):
        path = tmp_path / "run.json"
        records.begin(path, {"settings": {"lr": 0.1}, "started": 1}, "settings")
        records.begin(path, {"settings": {"lr": 0.1}, "started": 2}, "settings")
        assert json.loads(path.read_text())["started"] == 1
        with pytest.raises(ValueError, match="lr: 0.1 there, 0.3 now"):
            records.begin(path, {"settings": {"lr": 0.3}, "started": 2}, "settings")
