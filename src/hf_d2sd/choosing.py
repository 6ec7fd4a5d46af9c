"""The target's choice of each token, made exactly as plain `generate` makes it, and where generation ends."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList


@dataclass
class Record:
    """What `return_dict_in_generate` returns beside the sequence: one entry a token, or `None` if not asked for."""

    scores: tuple[Tensor, ...] | None = None  # (1, V) each, processed
    logits: tuple[Tensor, ...] | None = None  # (1, V) each, as the target gave them
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None  # layers of (1, prompt, H) first, then (1, 1, H)

    def add(self, logits: Tensor, scores: Tensor) -> None:
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)

    def add_hidden_states(self, layers: tuple[Tensor, ...], node: int | None = None) -> None:
        """Of one forward: all its tokens, or one node's."""
        if self.hidden_states is not None:
            tokens = slice(None) if node is None else slice(node, node + 1)
            self.hidden_states += (tuple(layer[:, tokens] for layer in layers),)


@dataclass
class Chooser:
    """Chooses a token at a node, appends it to the sequence, and says whether generation ends with it.

    Processors and draws are applied one node after the other, on the tokens before it, for the nodes on the path
    alone: the same calls in the same order as in plain decoding, so that a seed gives the same text. The two stock
    criteria are checked on integers; every other criterion is called after each token, as plain decoding calls it.
    """

    input_ids: Tensor  # (1, L), the prompt
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    do_sample: bool
    record: Record = field(default_factory=Record)

    def __post_init__(self):
        criteria = list(self.stopping_criteria)
        self.max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=None)
        self._eos = {t for c in criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.tolist()}
        self._criteria = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        self.length = self.input_ids.shape[1]
        self._sequence = self.input_ids.new_empty(1, self.length + 256)
        self._sequence[:, : self.length] = self.input_ids
        self._vectorised = not (self.do_sample or self.logits_processor)
        self._greedy: list[int] = []
        self.finished = False

    @property
    def sequence(self) -> Tensor:
        """(1, length): the prompt and all chosen tokens."""
        return self._sequence[:, : self.length]

    @property
    def room(self) -> int | None:
        """How many tokens may still be chosen; `None` for no limit."""
        return None if self.max_length is None else self.max_length - self.length

    def look(self, logits: Tensor) -> Tensor:
        """Take the logits (N, V) of the nodes that will be asked for; returns each node's greatest token (N,)."""
        self._logits = logits
        return logits.argmax(-1) if self._vectorised else logits.new_zeros(len(logits), dtype=torch.long)

    def know(self, greatest: list[int]) -> None:
        """The same N tokens on the host: the choices themselves, where nothing processes or draws."""
        self._greedy = greatest

    def is_finished(self) -> bool:
        return self.finished

    def choose(self, node: int) -> int:
        """The target's token at a node, appended to the sequence; `finished` says whether generation ends with it."""
        if self._vectorised:
            token = self._greedy[node]
            if self.record.scores is not None or self.record.logits is not None:
                logits = self._node_logits(node)
                self.record.add(logits, logits)
        else:
            logits = self._node_logits(node)
            scores = self.logits_processor(self.sequence, logits)
            self.record.add(logits, scores)
            token = self._pick(scores)
        self._append(token)
        self.finished = self._ends(token)
        return token

    def _node_logits(self, node: int) -> Tensor:
        return self._logits[node : node + 1].to(self.input_ids.device, torch.float32, copy=True)

    def _pick(self, scores: Tensor) -> int:
        if self.do_sample:
            return int(torch.multinomial(scores.softmax(-1), num_samples=1))
        return int(scores.argmax(-1))

    def _append(self, token: int) -> None:
        if self.length == self._sequence.shape[1]:
            grown = self._sequence.new_empty(1, 2 * self.length)
            grown[:, : self.length] = self._sequence
            self._sequence = grown
        self._sequence[0, self.length] = token
        self.length += 1

    def _ends(self, token: int) -> bool:
        ended = token in self._eos or self.room == 0
        for criterion in self._criteria:
            ended |= bool(torch.as_tensor(criterion(self.sequence, self.record.scores)).all())
        return ended
