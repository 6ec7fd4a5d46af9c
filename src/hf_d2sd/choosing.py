"""The target's choice of each token, made exactly as plain `generate` makes it, and where generation ends."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .compat import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteriaList,
    is_stock_processor,
    keeps_state_of_batch,
    processor_of_row,
)

_KEEP_GOING = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)


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

    def add_hidden_states(self, layers: tuple[Tensor, ...], row: int, node: int | None = None) -> None:
        """Of one row of a forward: all its tokens, or one node's."""
        if self.hidden_states is not None:
            tokens = slice(None) if node is None else slice(node, node + 1)
            self.hidden_states += (tuple(layer[row : row + 1, tokens] for layer in layers),)

    def cut(self, count: int) -> None:
        """Keep what belongs to the first `count` tokens."""
        self.scores, self.logits, self.hidden_states = (
            entries and entries[:count] for entries in (self.scores, self.logits, self.hidden_states)
        )


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
    ends_alone: bool = True  # where not, criteria only note in `done_at` that they hold, and the row goes on

    def __post_init__(self):
        criteria = list(self.stopping_criteria)
        self.max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=None)
        self._eos = {t for c in criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.tolist()}
        self._criteria = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        self.length = self.input_ids.shape[1]
        self._sequence = self.input_ids.new_empty(1, self.length + 256)
        self._sequence[:, : self.length] = self.input_ids
        self._vectorised = not (self.do_sample or self.logits_processor)
        # Tokens that processors may forbid, where they do nothing else: any other greatest one is the choice.
        keeps_going = all(type(processor) in _KEEP_GOING for processor in self.logits_processor)
        self._may_forbid: set[int] | None = None
        if keeps_going and not self.do_sample and self.record.scores is None and self.record.logits is None:
            self._may_forbid = {t for each in self.logits_processor for t in each.eos_token_id.tolist()}
        self._greedy: list[int] = []
        self.finished = False
        self.done_at: int | None = None  # the length at which a criterion held first

    @property
    def vectorised(self) -> bool:
        """Whether the choices are the greatest logits, with nothing to process or draw."""
        return self._vectorised

    @property
    def asks_for_greatest(self) -> bool:
        """Whether each node's greatest token is to be known: all choices are such ones, or nearly all."""
        return self._vectorised or self._may_forbid is not None

    @property
    def sequence(self) -> Tensor:
        """(1, length): the prompt and all chosen tokens."""
        return self._sequence[:, : self.length]

    @property
    def room(self) -> int | None:
        """How many tokens may still be chosen; `None` for no limit."""
        return None if self.max_length is None else self.max_length - self.length

    def look(self, logits: Tensor) -> None:
        """Take the logits (N, V) of the nodes that will be asked for."""
        self._logits = logits

    def know(self, greatest: list[int]) -> None:
        """The N nodes' greatest tokens on the host: the choices themselves, where nothing processes or draws."""
        self._greedy = greatest

    def is_finished(self) -> bool:
        return self.finished

    def follow(self) -> None:
        """Choose no more: from now on `know` is told the choices themselves, processed and drawn."""
        self._vectorised = True

    def choose(self, node: int) -> int:
        """The target's token at a node, appended to the sequence; `finished` says whether generation ends with it."""
        if self._vectorised:
            token = self._greedy[node]
            if self.record.scores is not None or self.record.logits is not None:
                logits = self._node_logits(node)
                self.record.add(logits, logits)
        elif self._may_forbid is not None and self._greedy[node] not in self._may_forbid:
            token = self._greedy[node]
        else:
            logits = self._node_logits(node)
            scores = self.logits_processor(self.sequence, logits)
            self.record.add(logits, scores)
            token = self._pick(scores)
        self._append(token)
        ends = self._ends(token)
        if ends and self.done_at is None:
            self.done_at = self.length
        self.finished = ends if self.ends_alone else self.room == 0
        return token

    def cut(self, length: int) -> None:
        """Forget what was chosen beyond a length."""
        self.record.cut(length - self.input_ids.shape[1])
        self.length = length

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
        self._sequence[:, self.length].fill_(token)  # no tensor of the host
        self.length += 1

    def _ends(self, token: int) -> bool:
        ended = token in self._eos or self.room == 0
        for criterion in self._criteria:
            ended |= bool(torch.as_tensor(criterion(self.sequence, self.record.scores)).all())
        return ended


class Choosers:
    """The choosers of a batch's rows, and which of them still choose.

    As in plain decoding, a row ends by itself where there is an end-of-sequence token, and is filled up with padding;
    otherwise all rows go on until a criterion has held for each of them.
    """

    def __init__(
        self,
        input_ids: Tensor,  # (B, L)
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        do_sample: bool,
        make_record: Callable[[], Record] = Record,
    ):
        count = len(input_ids)
        alone = count == 1 or any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.rows = [
            Chooser(
                input_ids[row : row + 1],
                row_processors(logits_processor, row, count),
                stopping_criteria,
                do_sample,
                make_record(),
                alone,
            )
            for row in range(count)
        ]
        self.active = list(self.rows)
        self.prompt_length = input_ids.shape[1]

    @property
    def rooms(self) -> list[int] | None:
        """By row that still chooses, how many tokens may still be chosen; `None` for no limit."""
        rooms = [chooser.room for chooser in self.active]
        return [max(room, 1) for room in rooms if room is not None] or None

    @property
    def vectorised(self) -> bool:
        """Whether the choices are the greatest logits, with nothing to process or draw."""
        return self.rows[0].vectorised

    @property
    def ends(self) -> list[int]:
        """The tokens that end a row by themselves."""
        return sorted(self.rows[0]._eos) if self.rows[0].ends_alone else []

    @property
    def may_go_beyond(self) -> bool:
        """Whether rows may have chosen tokens behind the one that turns out to be the last; see `cut`."""
        return not self.rows[0].ends_alone and bool(self.rows[0]._criteria)

    def look(self, logits: Tensor) -> Tensor:
        """Take the logits (B, N, V) of the rows that still choose; returns each node's greatest token (B, N), or 0."""
        for chooser, row in zip(self.active, logits.unbind()):
            chooser.look(row)
        # `max` finds the same token as `argmax`, the first of equals, and on a CPU in a fraction of its time.
        greatest = self.rows[0].asks_for_greatest
        return logits.max(-1).indices if greatest else logits.new_zeros(logits.shape[:2], dtype=torch.long)

    def follow(self) -> None:
        """See `Chooser.follow`."""
        for chooser in self.rows:
            chooser.follow()

    def staying(self) -> list[int]:
        """Which of the rows that still choose have not ended."""
        done = [chooser.done_at for chooser in self.rows if chooser.done_at is not None]
        if not self.rows[0].ends_alone and len(done) == len(self.rows):
            for chooser in self.rows:
                chooser.finished |= chooser.length >= max(done)
        return [at for at, chooser in enumerate(self.active) if not chooser.finished]

    def select(self, staying: list[int]) -> None:
        """Let all rows but the given ones choose no more."""
        self.active = [self.active[at] for at in staying]

    def cut(self) -> None:
        """Rows that did not end by themselves may have gone beyond the end of the last one."""
        if not self.rows[0].ends_alone:
            end = max(row.done_at or 0 for row in self.rows)
            for chooser in self.rows:
                chooser.cut(end)


def row_processors(processors: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """Processors that take one row of a batch of `rows`, and treat it as they would within the batch.

    Raises:
        ValueError: for those that keep a state from step to step of the whole batch.
    """
    if rows == 1 or not processors:
        return processors
    return LogitsProcessorList([_row_processor(processor, row, rows) for processor in processors])


def _row_processor(processor, row: int, rows: int):
    if keeps_state_of_batch(processor):
        raise ValueError(
            f"{type(processor).__name__} keeps a state of the whole batch, whose rows advance unevenly here. Call "
            "generate once for each prompt, or without assistant_model."
        )
    return processor_of_row(processor, row, rows) if is_stock_processor(processor) else _InBatch(processor, row, rows)


@dataclass
class _InBatch:
    """A user's own processor sees its row where it stands in the batch, and copies of it in the others' places."""

    processor: Callable
    row: int
    rows: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        batch = input_ids.expand(self.rows, -1).contiguous(), scores.expand(self.rows, -1).contiguous()
        return self.processor(*batch)[self.row : self.row + 1]
