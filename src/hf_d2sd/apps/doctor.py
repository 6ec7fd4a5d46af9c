"""`hf-d2sd doctor`: whether a pair of drafters is right for a target, and what to do where it is not."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

from torch import Tensor

from ..attention import TreeAttention
from ..modeling import D2SDAssistant
from ..pairs import CONTEXT
from .answering import AnswerOptions, answer
from .cards import published_acceptance, read_card
from .findings import Finding, fine, note, wrong
from .loading import Pair, PairOptions, PairPlan, chat_tokens, read_plan, refuse_too_long
from .structure import check_structure

PROMPTS = (
    "A shop sells pens for 3 dollars each. Mia buys 4 pens and pays with a 20 dollar note. How much does she get "
    "back? Explain it step by step.",
    "Write a Python function that returns the largest of three numbers, and explain how it works.",
    "Why does the moon seem to change its shape in the course of a month?",
    "Give three tips for writing a clear email.",
)
_LARGEST_FLOAT32 = 4e9  # parameters of a target that is also run in float32


@dataclass
class DoctorOptions(PairOptions):
    """Check a target with its drafters, from their configs to the texts they make; the exit status is 1 if anything is
    wrong."""

    prompts: str | None = field(default=None, metadata={"help": "JSON lines, as of distill; default: its own"})
    max_prompts: int = field(default=4, metadata={"help": "how many prompts are answered"})
    max_new_tokens: int = field(default=64, metadata={"help": "of each reply"})
    format: str = field(
        default="auto",
        metadata={
            "help": "text: a table; json: a line each; auto: text in a terminal, else json",
            "choices": ["auto", "text", "json"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.drafters == CONTEXT:
            raise ValueError("--drafters context names no drafters, so that there are none to check: name some.")
        for name in ("max_prompts", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1.")

    def answering(self) -> AnswerOptions:
        """Greedy replies."""
        shared = {f.name: getattr(self, f.name) for f in fields(PairOptions)}
        return AnswerOptions(**shared, max_new_tokens=self.max_new_tokens)

    def judging(self) -> AnswerOptions:
        """The same with the pair's own trees in every cycle: what pays here says nothing of the drafters."""
        options = self.answering()
        options.auto = bool(self.auto)
        return options


def doctor(options: DoctorOptions) -> None:
    """Show every finding as it comes.

    Raises:
        SystemExit: with status 1, if anything is wrong.
    """
    as_text = options.format == "text" or (options.format == "auto" and sys.stdout.isatty())
    findings = _show(examine(options)) if as_text else _print(examine(options))
    if any(finding.level == "wrong" for finding in findings):
        raise SystemExit(1)


def _print(findings: Iterator[Finding]) -> list[Finding]:
    shown = []
    for finding in findings:
        print(json.dumps(finding.report()), flush=True)
        shown.append(finding)
    return shown


def _show(findings: Iterator[Finding]) -> list[Finding]:
    from .display import Console, Live, findings_table, findings_verdict  # rich is there for those who want to look

    console, shown = Console(highlight=False), []
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for finding in findings:
            shown.append(finding)
            live.update(findings_table(shown), refresh=True)
    console.print(findings_verdict(shown))
    return shown


def examine(options: DoctorOptions) -> Iterator[Finding]:
    """All findings, cheap checks first; nothing is loaded for drafters whose configs tell that they do not fit."""
    try:
        plan = read_plan(options)
        prompts = read_prompts(options, plan)
    except (ValueError, OSError, TypeError) as error:
        yield wrong("configs", _first_line(error), "Check the names that were given, and the folders' config.json.")
        return
    yield fine("configs", "Target, drafters and tokenizer can be read.")
    found = list(check_structure(plan))
    yield from found
    if any(finding.level == "wrong" for finding in found):
        return
    from . import parity  # noqa: F401  # without what it needs nothing is loaded in vain

    try:
        pair = plan.load()
    except (ValueError, OSError, RuntimeError) as error:
        yield wrong("weights", _first_line(error), "Download or save the checkpoint again.")
        return
    found = list(check_weights(pair.assistant))
    yield from found
    if any(finding.level == "wrong" for finding in found):
        return
    yield check_attention(pair, options)
    yield from examine_decoding(pair, options, prompts)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def read_prompts(options: DoctorOptions, plan: PairPlan) -> list[Tensor]:
    """(1, L) each: prompts as the chat template writes them, or as they are where there is none."""
    texts: Sequence[str] = PROMPTS
    if options.prompts is not None:
        from ..training.chats import read_chats

        texts = [chat.turns[0] for chat in read_chats([options.prompts], options.max_prompts, seed=0)]
    texts = texts[: options.max_prompts]
    if plan.tokenizer.chat_template is None:
        prompts = [plan.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    else:
        prompts = [chat_tokens(plan.tokenizer, [{"role": "user", "content": text}]) for text in texts]
    for input_ids in prompts:
        refuse_too_long(input_ids.shape[1], options.max_new_tokens, plan)
    return prompts


def check_weights(assistant: D2SDAssistant) -> Iterator[Finding]:
    """Matrices that say nothing. What is not finite, or no draft vocabulary, is refused when weights are read."""
    for role in ("first", "second"):
        model = getattr(assistant, role)
        if model is None:
            continue
        weights = {name: p for name, p in model.named_parameters() if p.numel() > 1}
        flat = [name for name, p in weights.items() if p.ndim > 1 and bool((p == p.flatten()[0]).all())]
        if flat:
            advice = "The checkpoint is damaged, or was never trained: get it again."
            yield wrong("weights", f"The {role} drafter has one number all over {', '.join(flat)}.", advice)
        else:
            count = sum(p.numel() for p in model.parameters())
            yield fine("weights", f"{role}: {count / 1e6:.1f} million parameters, all finite.")


def check_attention(pair: Pair, options: DoctorOptions) -> Finding:
    try:
        attention = TreeAttention.for_model(pair.target, options.attention_backend)
    except ValueError as error:
        return wrong("attention", _first_line(error), "Leave --attention_backend out.")
    return fine("attention", f"{attention}.")


def examine_decoding(pair: Pair, options: DoctorOptions, prompts: list[Tensor]) -> Iterator[Finding]:
    """What only running tells: texts, what pays, forwards, roles and acceptance, and where that is low, why."""
    from . import diagnosis, parity

    answering = options.judging()
    replies = [parity.reply_both_ways(pair, answering, input_ids) for input_ids in prompts]
    dtype = str(pair.target.dtype).removeprefix("torch.")
    yield parity.check_texts(replies, dtype)
    yield from check_costs(pair, options, prompts)  # before anything runs in another dtype
    acceptance = check_acceptance([reply.drafted.stats for reply in replies], options.drafters)
    reason = _why_not_float32(pair, dtype)
    if reason is not None:
        yield note("texts", f"Not compared in float32: {reason}.")
    elif dtype != "float32":
        pair.target.float(), pair.assistant.float()
        replies = [parity.reply_both_ways(pair, answering, input_ids) for input_ids in prompts]
        yield parity.check_texts(replies, "float32")
    rows = [reply.row for reply in replies]
    if reason is None:
        yield from parity.check_forwards(pair, rows[:2])
    bench = diagnosis.Bench(pair.target, rows)
    yield diagnosis.check_roles(pair.assistant, bench)
    yield acceptance
    if acceptance.level == "wrong":
        yield from diagnosis.diagnose(pair, bench)


def check_costs(pair: Pair, options: DoctorOptions, prompts: list[Tensor]) -> Iterator[Finding]:
    """What cycles cost here and what was chosen by that, where nothing is said of how trees are."""
    replies = [answer(pair, options.answering(), input_ids) for input_ids in prompts[:2]]  # it learns from the first
    decisions = replies[-1].stats.decisions
    if decisions is not None:
        yield fine("costs", f"{decisions}.\n{pair.assistant.costs}.")


def _why_not_float32(pair: Pair, dtype: str) -> str | None:
    if dtype == "float32":
        return None
    if getattr(pair.target, "is_quantized", False):
        return "the target is quantized"
    if len(getattr(pair.target, "hf_device_map", {})) > 1:
        return "the target is spread over several devices"
    count = sum(p.numel() for p in pair.target.parameters())
    return f"the target has {count / 1e9:.1f} billion parameters" if count > _LARGEST_FLOAT32 else None


def check_acceptance(all_stats: Sequence, drafters: list[str]) -> Finding:
    """Tokens a target pass over all prompts, beside what the card says."""
    cycles = sum(stats.cycles for stats in all_stats)
    if not cycles:
        return note("acceptance", "The replies are too short to have been drafted.", "Raise --max_new_tokens.")
    length = sum(sum(stats.committed_per_cycle) for stats in all_stats) / cycles
    card = read_card(drafters[0])
    published = published_acceptance(card) if card is not None else None
    words = f"α is {length:.2f} tokens a target pass over {cycles} passes"
    if card is None:
        words += "; the drafters have no model card to compare with"
    elif published is None:
        words += "; the card names none to compare with"
    else:
        words += f"; the card says {published:.2f}, on prompts of its own"
    advice = "Compare target, chat template and mask token with those of the training; what follows tries some."
    if published is not None and length - 1 < 0.5 * (published - 1):
        return wrong("acceptance", f"{words}: less than half of what it promises beyond plain decoding.", advice)
    if length < 1.1:
        return wrong("acceptance", f"{words}: the drafters are hardly ever right.", advice)
    return fine("acceptance", f"{words}.")
