"""The words that a call adds to a pruned draft vocabulary: those of its prompt, and of the text so far.

A drafter trained on the likeliest tokens alone can draft no other; but what a prompt is about is often said again. The
rows of the target's head that such tokens have are at hand.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .modeling import D2SDDrafterModel

MOST_WORDS = 1024  # that a call adds: beyond, they would cost more than they are drafted


class CallWords:
    """A call's own tokens, beside those of a drafter's vocabulary.

    Only a plain linear head's rows can be read one by one; with any other head, with a head of the drafter's own, and
    with the whole vocabulary there are no such tokens.

    Args:
        head: the target's LM head.
        reader: makes of rows (E, H) and a bias (E,) what gives logits (..., E) of hidden states.
    """

    def __init__(self, model: D2SDDrafterModel, head: nn.Module, reader: Callable[[Tensor, Tensor | None], Callable]):
        config = model.config
        plain = type(head) is nn.Linear and head.weight.device.type != "meta"
        self._head, self._reader = head, reader
        self._absent: bytearray | None = None  # by token, whether it can still be added
        tables = model.path_head is not None and config.path_kind != "projection"  # of its own vocabulary alone
        if plain and config.draft_vocab_size is not None and not config.own_head and not tables:
            absent = torch.ones(min(head.weight.shape[0], config.vocab_size), dtype=torch.uint8)
            absent[model.draft_token_ids.cpu()] = 0
            self._absent = bytearray(absent.numpy())
        self.count = 0
        self._added: list[int] = []  # of which no row was gathered yet
        self._ids = torch.empty(0, dtype=torch.long)  # (E,)
        self.rows: Tensor | None = None  # (E, H), once there is one
        self._read: Callable | None = None

    def __len__(self) -> int:
        return len(self._ids) + len(self._added)

    @property
    def ids(self) -> Tensor:
        """(E,), the tokens."""
        self._gather()
        return self._ids

    def add(self, tokens: Iterable[int]) -> None:
        """Let what is new among these be drafted, as long as there is room."""
        absent = self._absent
        if absent is None or self.count >= MOST_WORDS:
            return
        new = [token for token in dict.fromkeys(tokens) if token < len(absent) and absent[token]]
        new = new[: MOST_WORDS - self.count]
        for token in new:
            absent[token] = 0
        if new:
            self._put(new)
            self.count += len(new)

    def _put(self, new: list[int]) -> None:
        self._added += new  # a cycle that drafts nothing reads none

    def _gather(self) -> None:
        if not self._added:
            return
        weight, bias = self._head.weight.detach(), self._head.bias
        self._ids = torch.cat([self._ids.to(weight.device), torch.tensor(self._added, device=weight.device)])
        self._added = []
        self.rows = weight[self._ids]
        self._read = self._reader(self.rows, None if bias is None else bias.detach()[self._ids])

    def logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """(..., V' + E): the vocabulary's logits (..., V'), and those of the call's tokens behind them."""
        self._gather()
        if self._read is None:
            return logits
        return torch.cat([logits, self._read(hidden).to(logits)], dim=-1)
