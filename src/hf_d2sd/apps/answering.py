"""One reply of a target, with drafters or without, timed from the outside."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, StoppingCriteria, StoppingCriteriaList

from ..modeling import CACHE_NAME
from ..stats import D2SDStats
from ..streaming import Piece, SourceStreamer
from .loading import FASTEST, Pair, PairOptions, dtype_field


@dataclass
class AnswerOptions(PairOptions):
    dtype: str = dtype_field(FASTEST)
    max_new_tokens: int = field(default=256, metadata={"help": "the reply's greatest length"})
    temperature: float = field(default=0.0, metadata={"help": "0: greedy"})
    top_p: float | None = field(default=None, metadata={"help": "sampling; default: the target's"})
    top_k: int | None = field(default=None, metadata={"help": "sampling; default: the target's"})
    seed: int = field(default=0, metadata={"help": "of sampling"})
    system: str | None = field(default=None, metadata={"help": "the system message; default: the chat template's"})
    format: str = field(
        default="auto",
        metadata={
            "help": "text, or json for scripts; auto: text in a terminal, else json",
            "choices": ["auto", "text", "json"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if self.temperature < 0:
            raise ValueError(f"--temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            raise ValueError("--top_p and --top_k are for sampling: give a --temperature above 0 too.")

    def sampling(self) -> dict:
        """What `generate` takes of it."""
        if self.temperature == 0:
            return {"do_sample": False}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": True, **{name: value for name, value in chosen.items() if value is not None}}


@dataclass(frozen=True)
class Answer:
    """A reply, and what it took."""

    tokens: list[int]  # of the reply, the end-of-sequence token included
    pieces: list[Piece]
    first_token_seconds: float  # until the first token came: the prefill
    seconds: float  # from then on
    stats: D2SDStats  # empty for plain decoding
    sequence: list[int]  # prompt and reply
    cache: Cache
    plain: bool = False  # without drafters
    dtype: str = "float32"  # of the target

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens_per_second(self) -> float:
        """After the first token, which is the prefill's; 0 without a second one."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 else 0.0

    def report(self) -> dict:
        """For JSON."""
        report: dict = {
            "text": self.text,
            "dtype": self.dtype,
            "new_tokens": len(self.tokens),
            "first_token_seconds": round(self.first_token_seconds, 4),
            "tokens_per_second": round(self.tokens_per_second, 2),
        }
        if not self.plain:
            report |= {
                "mean_acceptance_length": round(self.stats.mean_acceptance_length, 3) if self.stats.cycles else None,
                "acceptance_histogram": self.stats.acceptance_histogram,
                "tokens_by_source": self.stats.tokens_by_source,
                "attention_backend": self.stats.attention_backend,
                "decisions": str(self.stats.decisions) if self.stats.decisions is not None else None,
                "pieces": [list(piece) for piece in self.pieces],
            }
        return report


class StopOnRequest(StoppingCriteria):
    """Ends a reply at the next token once `request()` was called."""

    def __init__(self):
        self.requested = False

    def request(self) -> None:
        self.requested = True

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        return torch.full((len(input_ids),), self.requested, device=input_ids.device)


class _Clock(SourceStreamer):
    """Also notes when the first token came."""

    first_token_at = math.nan

    def put(self, value: Tensor) -> None:
        if math.isnan(self.first_token_at) and not self._prompt_is_next:
            self.first_token_at = time.perf_counter()
        super().put(value)


def answer(
    pair: Pair,
    options: AnswerOptions,
    input_ids: Tensor,
    on_piece: Callable[[Piece], None] = lambda piece: None,
    *,
    plain: bool = False,
    cache: Cache | None = None,
    stop: StopOnRequest | None = None,
    **generate_options,
) -> Answer:
    """Let the target reply to `input_ids` (1, L).

    Args:
        plain: without drafters.
        cache: of an earlier answer to the beginning of the same conversation; it is taken over.
    """
    input_ids = input_ids.to(pair.target.device)
    assistant = None if plain else pair.assistant
    pieces: list[Piece] = []

    def take(piece: Piece) -> None:
        pieces.append(piece)
        on_piece(piece)

    clock = _Clock(pair.tokenizer, assistant, take)
    drafting = {} if plain else {"assistant_model": assistant, **options.d2sd_options(), **generate_options}
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    out = pair.target.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=options.max_new_tokens,
        streamer=clock,
        stopping_criteria=StoppingCriteriaList([stop] if stop is not None else []),
        return_dict_in_generate=True,
        **options.sampling(),
        **({} if cache is None else {CACHE_NAME: cache}),
        **drafting,
    )
    ended = time.perf_counter()
    return Answer(
        tokens=out.sequences[0, input_ids.shape[1] :].tolist(),
        pieces=pieces,
        first_token_seconds=clock.first_token_at - started,
        seconds=ended - clock.first_token_at,
        stats=D2SDStats() if assistant is None else assistant.last_stats,
        sequence=out.sequences[0].tolist(),
        cache=out[CACHE_NAME],
        plain=plain,
        dtype=str(pair.target.dtype).removeprefix("torch."),
    )


@dataclass(frozen=True)
class Comparison:
    """A reply with drafters beside the plain one."""

    drafted: Answer
    plain: Answer

    @property
    def same_text(self) -> bool:
        return self.drafted.tokens == self.plain.tokens

    @property
    def speed_ratio(self) -> float | None:
        """How many times as fast the drafters made it, after the first token; `None` for replies of one token."""
        both = self.drafted.tokens_per_second, self.plain.tokens_per_second
        return both[0] / both[1] if all(both) else None

    @property
    def first_difference(self) -> int | None:
        """The first token at which they part."""
        tokens = zip(self.drafted.tokens, self.plain.tokens)
        shorter = min(len(self.drafted.tokens), len(self.plain.tokens))
        return None if self.same_text else next((i for i, (a, b) in enumerate(tokens) if a != b), shorter)

    def report(self) -> dict:
        ratio = self.speed_ratio
        return {
            **self.plain.report(),
            "same_text": self.same_text,
            "first_difference": self.first_difference,
            "speed_ratio": round(ratio, 3) if ratio is not None else None,
        }
