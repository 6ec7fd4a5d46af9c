"""Rows of text on disk: safetensors shards of unpadded rows, written whole or not at all."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSORS = {"tokens", "lengths", "prompt_lengths"}


@dataclass(frozen=True)
class Row:
    """A prompt, rendered by the chat template, and what the target wrote after it."""

    tokens: Tensor  # (T,), int64
    prompt_length: int

    @property
    def response_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    def is_held_out(self, one_in: int) -> bool:
        """Whether the row is kept from training: by its content, so that it stays there when shards are added."""
        digest = hashlib.sha256(self.tokens.to(torch.int32).numpy().tobytes()).digest()
        return int.from_bytes(digest[:4], "little") % one_in == 0


def write_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Save a file that is there whole, or not at all, whenever the process is killed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written, and what was there before is unchanged: {error}") from error


def write_text_atomically(path: Path, text: str) -> None:
    """The same for a text; where several processes write the same file, each writes all of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


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


def write_shard(path: Path, rows: list[Row]) -> None:
    tokens = torch.cat([row.tokens for row in rows]) if rows else torch.zeros(0, dtype=torch.int64)
    small = not len(tokens) or int(tokens.max()) < 2**16
    write_atomically(
        {
            "tokens": tokens.to(torch.uint16 if small else torch.int32),
            "lengths": torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64),
            "prompt_lengths": torch.tensor([row.prompt_length for row in rows], dtype=torch.int64),
        },
        path,
    )


def refuse_other_options(there: dict, here: dict, folder: Path) -> None:
    """What is in a folder must have been begun with the same options.

    Raises:
        ValueError: naming the options that differ, with both values.
    """
    differing = [
        f"{name}: {there.get(name)!r} there, {here[name]!r} now" for name in here if here[name] != there.get(name)
    ]
    if differing:
        raise ValueError(f"{folder} was begun with other options ({'; '.join(differing)}). Use another --out.")


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows-*.safetensors"))


def read_shard(path: Path) -> list[Row]:
    """The rows of one shard, in order.

    Raises:
        ValueError: for a file that is truncated, or no shard of rows.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it and run `hf-d2sd distill` again.") from error
    if set(tensors) != _TENSORS:
        raise ValueError(f"{path} holds {sorted(tensors)}, not {sorted(_TENSORS)}: it is no shard of rows.")
    lengths, prompt_lengths = tensors["lengths"].tolist(), tensors["prompt_lengths"].tolist()
    total = len(tensors["tokens"])
    if sum(lengths) != total or len(lengths) != len(prompt_lengths) or any(map(int.__lt__, lengths, prompt_lengths)):
        raise ValueError(f"{path} is damaged: its lengths do not cut its {total} tokens into prompts and responses.")
    return list(map(Row, tensors["tokens"].long().split(lengths), prompt_lengths))


def read_rows(*folders: Path) -> list[Row]:
    """The rows of all shards of all folders.

    Raises:
        ValueError: if a folder has none, or a shard is damaged.
    """
    rows = []
    for folder in folders:
        paths = shard_paths(folder)
        if not any(rows_of_shard := [read_shard(path) for path in paths]):
            raise ValueError(f"{folder} has no rows: write them with `hf-d2sd distill --out {folder}`.")
        rows += [row for shard in rows_of_shard for row in shard]
    return rows


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line. A last line without its end was cut off by a kill, and is left out."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                if not line.endswith("\n"):
                    return
                raise ValueError(f"{path}, line {number}: no JSON ({error}).") from error


def append_json_line(path: Path, value: dict) -> None:
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a line that a kill cut off
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def batched(items: list, size: int) -> Iterable[list]:
    return (items[start : start + size] for start in range(0, len(items), size))
