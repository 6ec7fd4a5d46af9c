"""The target's hidden states at the layers that drafters read: computed in training, or once and kept in bf16."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ..capturing import embeddings_first, select_layers
from ..target import execution_device
from .shards import Row, batched, read_shard, shard_paths, write_atomically, write_once


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
    output = target.base_model(input_ids=tokens, use_cache=False, output_hidden_states=select_layers(layer_ids))
    states = embeddings_first(output.hidden_states, selected=True)
    features = torch.cat([states[i + 1].to(tokens.device) for i in layer_ids], dim=-1)  # (B, T, F)
    return [row_features[: len(row.tokens)] for row_features, row in zip(features, rows)]


class CachedFeatures:
    """Features on disk, one file beside each shard of rows; a file that is there is not computed again."""

    def __init__(self, folder: Path, layer_ids: list[int]):
        self.rows_folder, self.layer_ids = folder, layer_ids
        self.folder = folder / f"features-{'-'.join(map(str, layer_ids))}"

    def fill(self, target, batch_size: int) -> None:
        """Compute what is missing; can be killed and started again, and run in several processes at once.

        Raises:
            ValueError: for features that were computed of other rows.
        """
        self.folder.mkdir(exist_ok=True)
        paths = shard_paths(self.rows_folder)

        def write(cached: Path) -> None:
            rows = read_shard(self.rows_folder / cached.name)
            metadata = {"rows": _digest(rows), "layer_ids": json.dumps(self.layer_ids)}
            write_atomically({"features": self._of_shard(target, rows, batch_size)}, cached, metadata)

        for path in tqdm(paths, desc="features"):
            write_once(self.folder / path.name, write)
        for path in paths:  # some may still be in the hands of another process
            write_once(self.folder / path.name, write, wait=True)
            _check(self.folder / path.name, read_shard(path))

    def _of_shard(self, target, rows: list[Row], batch_size: int) -> Tensor:
        """(all the shard's tokens, F), bf16, in the shard's order."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))  # like lengths together
        features = [torch.empty(0)] * len(rows)
        for batch in batched(order, batch_size):
            for i, states in zip(batch, compute_features(target, [rows[i] for i in batch], self.layer_ids)):
                features[i] = states.to("cpu", torch.bfloat16)
        return torch.cat(features) if features else torch.empty(0, 0, dtype=torch.bfloat16)

    def locate(self) -> list["CachedRow"]:
        """Every row with the place of its features, in the order of `read_rows`."""
        located = []
        for path in shard_paths(self.rows_folder):
            start = 0
            for row in read_shard(path):
                located.append(CachedRow(row.tokens, row.prompt_length, self.folder / path.name, start))
                start += len(row.tokens)
        return located


class CachedRow(Row):
    """A row that knows where its features are; they are read when asked for."""

    def __init__(self, tokens: Tensor, prompt_length: int, path: Path, start: int):
        super().__init__(tokens, prompt_length)
        object.__setattr__(self, "_place", (path, start))

    def read_features(self) -> Tensor:
        """(T, F), bf16."""
        path, start = self._place
        with safe_open(path, "pt") as file:
            return file.get_slice("features")[start : start + len(self.tokens)]


def _digest(rows: list[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.tokens.to(torch.int32).numpy().tobytes() + b"|")
    return digest.hexdigest()[:32]


def _check(path: Path, rows: list[Row]) -> None:
    try:
        with safe_open(path, "pt") as file:
            tokens, seen = file.get_slice("features").get_shape()[0], (file.metadata() or {}).get("rows")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it: it is computed again.") from error
    if seen != _digest(rows) or tokens != sum(len(row.tokens) for row in rows):
        raise ValueError(f"{path} holds features of other rows than {path.name} now has. Delete the folder.")
