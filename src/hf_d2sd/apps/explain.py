"""`hf-d2sd explain`: one HTML page that draws every cycle's tree and what the target made of it."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from ..checks import refuse_unwritable_file
from ..records import write_text
from ..streaming import SourceStreamer
from .answering import Answer, answer
from .generate import PromptOptions, prepare
from .page import Page, render


@dataclass
class ExplainOptions(PromptOptions):
    """Answer a prompt, and write a page that shows every tree of candidates and the path the target took."""

    max_new_tokens: int = field(default=64, metadata={"help": "the reply's greatest length"})
    out: Path = field(default=Path("explained.html"), metadata={"help": "the page"})

    def __post_init__(self):
        super().__post_init__()
        self.out = Path(self.out)
        refuse_unwritable_file("--out", self.out)


def explain(options: ExplainOptions) -> dict:
    """Write the page."""
    plan, input_ids = prepare(options)
    pair = plan.load()
    reply = answer(pair, options, input_ids, d2sd_trace=True)
    page = make_page(options, pair.tokenizer, input_ids[0].tolist(), reply)
    write_text(options.out, render(page))
    report = reply.report()
    report.pop("pieces")
    return {"out": str(options.out), "cycles": reply.stats.cycles, **report}


def make_page(options: ExplainOptions, tokenizer, prompt: list[int], reply: Answer) -> Page:
    """What the page shows, without a word of HTML."""
    drawn = {token for cycle in reply.stats.trace or [] for token in [*cycle.tokens, *cycle.emitted]}
    way = "greedy" if options.temperature == 0 else f"temperature {options.temperature}, seed {options.seed}"
    return Page(
        prompt=tokenizer.decode(prompt),
        texts=token_texts(tokenizer, reply.tokens),
        names={token: token_name(tokenizer, token) for token in drawn},
        stats=reply.stats,
        trace=reply.stats.trace or [],
        facts={
            "Target": public_name(options.target),
            "Drafters": ", ".join(map(public_name, options.drafters)),
            "Decoding": f"{way}, {reply.dtype}",
            "Chosen": str(reply.stats.decisions or "the same in each cycle, as the options say"),
            "Attention over trees": reply.stats.attention_backend,
            "Speed": f"{reply.tokens_per_second:.1f} tokens a second after the first, while every tree was kept",
            "Versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
        },
    )


def public_name(name: str) -> str:
    """A Hub id, or a folder's own name: where that lies is nobody's business who reads the page."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def token_texts(tokenizer, tokens: list[int]) -> list[str]:
    """The text that each token of a reply adds; a character of several tokens is the last one's."""
    texts: list[str] = []
    pieces: list[str] = []
    streamer = SourceStreamer(tokenizer, on_piece=lambda piece: pieces.append(piece.text), skip_special_tokens=False)
    streamer.put(torch.tensor([[0]]))  # what stands for the prompt
    for token in tokens:
        streamer.put(torch.tensor([token]))
        texts.append("".join(pieces))
        pieces.clear()
    streamer.end()
    texts[-1] += "".join(pieces)
    return texts


def token_name(tokenizer, token: int) -> str:
    """A token by itself; the vocabulary's own spelling for one that is not whole characters."""
    text = tokenizer.decode([token])
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
