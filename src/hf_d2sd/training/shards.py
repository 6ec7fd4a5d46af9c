"""Rows of text on disk: safetensors shards of unpadded rows, written whole or not at all."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import records

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


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all."""
    records.write_whole(path, lambda partial: save_file(tensors, partial, metadata))


def write_shard(path: Path, rows: list[Row], left_out: dict[str, int] | None = None) -> None:
    """Rows, and the counts of what was left out of them, by reason."""
    tokens = torch.cat([row.tokens for row in rows]) if rows else torch.zeros(0, dtype=torch.int64)
    small = not len(tokens) or int(tokens.max()) < 2**16
    write_tensors(
        path,
        {
            "tokens": tokens.to(torch.uint16 if small else torch.int32),
            "lengths": torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64),
            "prompt_lengths": torch.tensor([row.prompt_length for row in rows], dtype=torch.int64),
        },
        {"left_out": json.dumps(left_out)} if left_out else None,
    )


def read_left_out(path: Path) -> Counter[str]:
    """The counts that a shard was written with; none where it has none."""
    return Counter(json.loads(read_metadata(path).get("left_out", "{}")))


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


def refuse_missing_rows(folders: Iterable[Path]) -> None:
    """The same error as that of `read_rows` for folders without shards, before anything is read."""
    for folder in folders:
        if not shard_paths(folder):
            raise ValueError(f"{folder} has no rows: write them with `hf-d2sd distill --out {folder}`.")


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


def batched(items: list, size: int) -> Iterable[list]:
    return (items[start : start + size] for start in range(0, len(items), size))
