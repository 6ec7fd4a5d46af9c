"""What drafters learn from the target: hidden states and likeliest tokens, computed in training, or once and kept."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from .. import records
from ..compat import execution_device, read_text
from .shards import Row, batched, read_shard, shard_paths, write_tensors


@torch.inference_mode()
def compute_teacher(target, rows: Sequence[Row], top_k: int) -> list["Teacher"]:
    """What the target thinks of each row's tokens; padding as in `compute_features`."""
    tokens = nn.utils.rnn.pad_sequence([row.tokens for row in rows], batch_first=True)
    tokens = tokens.to(execution_device(target.get_input_embeddings()))
    hidden = target.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    head = target.get_output_embeddings()
    teachers = []
    for row, states in zip(rows, hidden):
        best = head(states[: len(row.tokens) - 1]).float().log_softmax(-1).topk(top_k)
        ids = nn.functional.pad(best.indices, (0, 0, 1, 0))  # the first token is nobody's guess
        teachers.append(Teacher(ids, nn.functional.pad(best.values, (0, 0, 1, 0), value=-torch.inf)))
    return teachers


@dataclass(frozen=True)
class Teacher:
    """At each token of a row, the k tokens that the target found likeliest in its place, given those before it."""

    ids: Tensor  # (T, k)
    log_probs: Tensor  # (T, k)


@torch.inference_mode()
def compute_features(target, rows: Sequence[Row], layer_ids: list[int]) -> list[Tensor]:
    """(T, F) for each row. Padding stands on the right, out of every token's causal sight: it needs no mask."""
    tokens = nn.utils.rnn.pad_sequence([row.tokens for row in rows], batch_first=True)  # (B, T)
    tokens = tokens.to(execution_device(target.get_input_embeddings()))
    _, states = read_text(target, tokens, layer_ids)
    features = torch.cat([states[i + 1].to(tokens.device) for i in layer_ids], dim=-1)  # (B, T, F)
    return [row_features[: len(row.tokens)] for row_features, row in zip(features, rows)]


class TokenCache(ABC):
    """Tensors of every token, one file beside each shard of rows; a file that is there is not computed again."""

    name: str  # of the folder, inside that of the rows
    tensors: tuple[str, ...]

    @abstractmethod
    def compute(self, target, rows: Sequence[Row]) -> list[tuple[Tensor, ...]]:
        """For each row one tensor (T, ...) of each name."""

    def fill(self, folder: Path, target, batch_size: int) -> None:
        """Compute what is missing of a folder of rows; can be killed, and run in several processes at once.

        Raises:
            ValueError: for tensors that were computed of other rows, and damaged files.
        """
        (folder / self.name).mkdir(exist_ok=True)
        paths = shard_paths(folder)

        def write(cached: Path) -> None:
            rows = read_shard(folder / cached.name)
            write_tensors(cached, self._of_shard(target, rows, batch_size), {"rows": _digest(rows)})

        for path in tqdm(paths, desc=self.name):
            records.write_once(self._beside(path), write)
        for path in paths:  # some may still be in the hands of another process
            records.write_once(self._beside(path), write, wait=True)
            self._check(self._beside(path), read_shard(path))

    def read(self, row: "PlacedRow") -> list[Tensor]:
        """(T, ...) of each name."""
        with safe_open(self._beside(row.shard), "pt") as file:
            return [file.get_slice(name)[row.start : row.start + len(row.tokens)] for name in self.tensors]

    def _beside(self, shard: Path) -> Path:
        return shard.parent / self.name / shard.name

    def _of_shard(self, target, rows: list[Row], batch_size: int) -> dict[str, Tensor]:
        """(all the shard's tokens, ...) of each name, in the shard's order."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))  # like lengths together
        of_rows = [()] * len(rows)
        for batch in batched(order, batch_size):
            for i, values in zip(batch, self.compute(target, [rows[i] for i in batch])):
                of_rows[i] = [value.cpu() for value in values]
        columns = zip(*of_rows) if rows else [[torch.empty(0, 0)]] * len(self.tensors)
        return dict(zip(self.tensors, map(torch.cat, columns)))

    def _check(self, path: Path, rows: list[Row]) -> None:
        try:
            with safe_open(path, "pt") as file:
                tokens = file.get_slice(self.tensors[0]).get_shape()[0]
                seen = (file.metadata() or {}).get("rows")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({error}). Delete it: it is computed again.") from error
        if seen != _digest(rows) or tokens != sum(len(row.tokens) for row in rows):
            raise ValueError(f"{path} was computed of other rows than {path.name} now has. Delete the folder.")


class FeatureCache(TokenCache):
    """`compute_features`, in bf16."""

    tensors = ("features",)

    def __init__(self, layer_ids: list[int]):
        self.layer_ids = layer_ids
        self.name = f"features-{'-'.join(map(str, layer_ids))}"

    def compute(self, target, rows: Sequence[Row]) -> list[tuple[Tensor, ...]]:
        return [(features.to(torch.bfloat16),) for features in compute_features(target, rows, self.layer_ids)]


class TeacherCache(TokenCache):
    """`compute_teacher`."""

    tensors = ("ids", "log_probs")

    def __init__(self, top_k: int):
        self.top_k = top_k
        self.name = f"teacher-{top_k}"

    def compute(self, target, rows: Sequence[Row]) -> list[tuple[Tensor, ...]]:
        teachers = compute_teacher(target, rows, self.top_k)
        return [(teacher.ids.to(torch.int32), teacher.log_probs) for teacher in teachers]


@dataclass(frozen=True)
class PlacedRow(Row):
    """A row that knows where it stands, so that a `TokenCache` finds what is its."""

    shard: Path
    start: int  # its first token's place among the shard's


def read_placed_rows(folder: Path) -> list[PlacedRow]:
    """In the order of `read_rows`."""
    placed = []
    for path in shard_paths(folder):
        start = 0
        for row in read_shard(path):
            placed.append(PlacedRow(row.tokens, row.prompt_length, path, start))
            start += len(row.tokens)
    return placed


def _digest(rows: list[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.tokens.to(torch.int32).numpy().tobytes() + b"|")
    return digest.hexdigest()[:32]
