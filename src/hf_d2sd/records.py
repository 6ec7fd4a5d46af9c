"""Records on disk: JSON lines, files that are there whole or not at all, and runs that are killed and go on."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

# JSON lines ----------------------------------------------------------------------------------------------------------


def append(path: Path, *records: dict) -> None:
    """Add records to a file; they are on the disk when this returns. A last line that a kill cut off goes."""
    with open(path, "a+b") as file:
        _end_with_a_whole_line(file)
        file.write(_as_lines(records).encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    """What a run has appended; nothing where there is no file. A last line that a kill cut off is left out.

    Raises:
        ValueError: naming file and line, for any other line that is no JSON object.
    """
    return [record for _, record in _numbered(path, torn_end=True)] if path.exists() else []


def read_numbered(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank, of a file that no run has written.

    Raises:
        ValueError: naming file and line, for what is no JSON object, a last line that is cut off included.
    """
    return _numbered(path, torn_end=False)


def read_values(path: Path) -> list[tuple[int, object]]:
    """(number, value) of a file that others wrote: of its lines that are not blank, or of the one array in it.

    Raises:
        ValueError: naming file and line, for text that is no UTF-8, and JSON that is torn.
    """
    content, found = path.read_bytes(), []
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {row}: not in UTF-8 ({error}). Convert it, for instance by iconv.") from error
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), 1))
        except ValueError as error:
            raise ValueError(f"{path}: no JSON array, or a torn one ({error}).") from error
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would end lines within a text, at U+2028
        try:
            found += [(number, json.loads(line))] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON, or torn ({error}).") from error
    return found


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """A file of records as `write_text` writes it."""
    write_text(path, _as_lines(records))


def _as_lines(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _numbered(path: Path, torn_end: bool) -> Iterator[tuple[int, dict]]:
    lines = path.read_bytes().split(b"\n")  # a kill may cut a character in two: decoded line by line
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = _parse(line)
        except ValueError as error:
            if torn_end and number == len(lines):
                return
            raise ValueError(f"{path}, line {number}: no JSON object ({error}).") from error
        yield number, record


def _parse(line: bytes) -> dict:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}")
    return record


def _end_with_a_whole_line(file: BinaryIO) -> None:
    """What `read` reads of the last line stays, with its end; what it leaves out goes."""
    if not file.tell():
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    last = content.rfind(b"\n") + 1
    try:
        _parse(content[last:])
        file.write(b"\n")
    except ValueError:
        file.truncate(last)


# Whole or not at all -------------------------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[Path], object], shared: bool = False) -> None:
    """Call `write(partial)`; the file or folder that this writes becomes `path`, whenever the process is killed.

    Args:
        shared: several processes may write it at once: each writes a partial file of its own.

    Raises:
        OSError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f".{path.name}.partial")
    _remove(partial)  # of a run that was killed
    try:
        write(partial)
        _put_in_place(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written, and what was there before is unchanged: {error}") from error
    finally:
        _remove(partial)


def write_text(path: Path, text: str) -> None:
    """A text, whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"), shared=True)


def write_json(path: Path, value: dict, indent: int | None = 2) -> None:
    """An object in a file of its own, whole or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_once(path: Path, write: Callable[[Path], None], wait: bool = False) -> bool:
    """Call `write(path)` unless the file is there; returns whether this process wrote it.

    Args:
        wait: where another process is writing the file, wait until it is there, instead of going on.
    """
    if path.exists():
        return False
    lock = path.parent / "locks" / f"{path.stem}.lock"
    lock.parent.mkdir(exist_ok=True)
    try:
        with FileLock(lock, blocking=wait):  # the system lets go of it when a process ends, however that comes
            if path.exists():
                return False
            write(path)
            return True
    except Timeout:
        return False


def _put_in_place(partial: Path, path: Path) -> None:
    if not (partial.is_dir() and path.is_dir()):
        os.replace(partial, path)
        return
    old = path.with_name(f".{path.name}.old.partial")  # a folder in use cannot be replaced, and must not be seen half
    _remove(old)
    os.replace(path, old)
    os.replace(partial, path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# Runs that go on -----------------------------------------------------------------------------------------------------


def begin(path: Path, run: dict, key: str | None = None, later: dict | None = None) -> None:
    """Note what a run is; where a run is noted, this one goes on with it, and its settings must be the same.

    Args:
        run: what the file is to hold.
        key: of the settings in it; default: all of it is settings.
        later: settings that runs of earlier releases do not name, with the values that those had.

    Raises:
        ValueError: naming the settings that differ, with both values.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, run)
        return
    there, here = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(run))
    refuse_other_settings({**(later or {}), **(there[key] if key else there)}, here[key] if key else here, path)


def refuse_other_settings(there: dict, here: dict, path: Path) -> None:
    """The settings of the run that `path` is of must be those of the run that goes on.

    Raises:
        ValueError: naming the settings that differ, with both values.
    """
    differing = [
        f"{name}: {there.get(name)!r} there, {here[name]!r} now" for name in here if here[name] != there.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} is of a run with other settings: {'; '.join(differing)}. Take those, or name another place."
        )
