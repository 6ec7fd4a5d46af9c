"""Text as it is committed, piece by piece, each with who drafted it: a streamer for `generate`."""

from collections.abc import Callable, Iterator
from queue import Queue
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .compat import BaseStreamer
from .modeling import D2SDAssistant

_UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are no whole character


class Piece(NamedTuple):
    """Some text, and the source of the token that completed it: first, second, context or target."""

    text: str
    source: str


class SourceStreamer(BaseStreamer):
    """Pass it as `streamer` to `generate`; it hands out a `Piece` for each token that completes some text.

    Joined, the pieces are the decoded reply. A character of several tokens belongs to the last of them. Without
    `on_piece` the pieces are kept, to be iterated over, from another thread while `generate` runs, or afterwards.

    Args:
        tokenizer: the target's, or a processor that has one.
        assistant: the one that `generate` is called with; `None` for plain decoding, where the target writes all.
        on_piece: called with each piece as it comes.
        timeout: seconds that an iteration waits for a piece; by default without end.
        decode_options: for `tokenizer.decode`; `skip_special_tokens` is on by default.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        assistant: D2SDAssistant | None = None,
        on_piece: Callable[[Piece], None] | None = None,
        timeout: float | None = None,
        **decode_options: bool,
    ):
        self._tokenizer, self._assistant, self._timeout = tokenizer, assistant, timeout
        self._decode_options = {"skip_special_tokens": True, **decode_options}
        self._pieces: Queue[Piece | None] = Queue()
        self._on_piece = on_piece if on_piece is not None else self._pieces.put
        self.tokens: list[int] = []  # of the reply
        self._begin()

    def _begin(self) -> None:
        self._prompt_is_next = True
        self._context: list[int] = []  # the tokens of the latest piece: some decoders join words by what stands before
        self._waiting: list[int] = []  # tokens after these, without a piece
        self._source = "target"

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, L) first, then new tokens (n,)."""
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"SourceStreamer takes one sequence, got a batch of {value.shape[0]}.")
        if self._prompt_is_next:
            self._prompt_is_next, self.tokens = False, []
            return
        new = value.flatten().tolist()
        self.tokens += new
        sources = ["target"] * len(new)
        if self._assistant is not None:
            sources = self._assistant.last_stats.token_sources[-len(new) :]
        for token, source in zip(new, sources, strict=True):
            self._add(token, source)

    def _add(self, token: int, source: str) -> None:
        self._waiting.append(token)
        self._source = source
        before, after = self._decode(self._context), self._decode(self._context + self._waiting)
        if len(after) > len(before) and not after.endswith(_UNFINISHED):
            self._hand_out(after[len(before) :])

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, **self._decode_options)

    def _hand_out(self, text: str) -> None:
        self._context, self._waiting = self._waiting, []
        self._on_piece(Piece(text, self._source))

    def end(self) -> None:
        """The reply is over: what is left may be a character that was never finished."""
        rest = self._decode(self._context + self._waiting)[len(self._decode(self._context)) :]
        if rest:
            self._hand_out(rest)
        self._begin()
        self._pieces.put(None)

    def __iter__(self) -> Iterator[Piece]:
        """The pieces of one reply, up to its end.

        Raises:
            queue.Empty: where none comes within `timeout`.
        """
        return iter(lambda: self._pieces.get(timeout=self._timeout), None)
