"""`hf-d2sd generate`: one reply, coloured by who drafted each token, and plain decoding beside it if wanted."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from .answering import Answer, AnswerOptions, Comparison, answer
from .loading import Pair, PairPlan, chat_tokens, plan_pair, refuse_too_long


@dataclass
class PromptOptions(AnswerOptions):
    prompt: str | None = field(default=None, metadata={"help": "the user's message"})
    prompt_file: Path | None = field(default=None, metadata={"help": "a file that holds it; -: standard input"})
    raw: bool = field(default=False, metadata={"help": "take the prompt as it is, without the chat template"})

    def __post_init__(self):
        super().__post_init__()
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("Give the prompt by --prompt or by --prompt_file, one of the two.")
        if self.raw and self.system is not None:
            raise ValueError("--system belongs to the chat template, which --raw leaves out: drop one of them.")

    def read_prompt(self) -> str:
        """Raises `ValueError` where it is empty, and `OSError` where its file cannot be read."""
        if self.prompt_file is None:
            prompt = self.prompt or ""
        elif str(self.prompt_file) == "-":
            prompt = sys.stdin.read()
        else:
            prompt = Path(self.prompt_file).read_text(encoding="utf-8")
        if not prompt.strip():
            raise ValueError(f"The prompt is empty: {prompt!r}.")
        return prompt


@dataclass
class GenerateOptions(PromptOptions):
    """Answer a prompt and show which drafter wrote each token."""

    compare: bool = field(default=False, metadata={"help": "answer it with plain decoding too"})


def generate(options: GenerateOptions) -> dict | None:
    """Answer; shown in a terminal, returned for JSON anywhere else."""
    plan, input_ids = prepare(options)
    output = text_output() if shows_text(options) else None
    pair = plan.load()
    if options.compare:  # the first passes of either way prepare what later ones use again
        short = replace(options, max_new_tokens=min(8, options.max_new_tokens))
        for plain in (False, True):
            answer(pair, short, input_ids, plain=plain)
    run = functools.partial(answer, pair, options, input_ids)
    ask = run if output is None else functools.partial(output.reply, run, pair)
    drafted = ask()
    comparison = Comparison(drafted, ask(plain=True)) if options.compare else None
    if output is not None:
        output.summary(drafted, comparison)
        return None
    report = {"prompt_tokens": input_ids.shape[1], **drafted.report()}
    return report | ({"plain": comparison.report()} if comparison is not None else {})


def prepare(options: PromptOptions) -> tuple[PairPlan, Tensor]:
    """Everything checked that can be before weights are read, and the prompt's tokens (1, L)."""
    prompt = options.read_prompt()
    plan = plan_pair(options)
    if options.raw:
        input_ids = plan.tokenizer(prompt, return_tensors="pt").input_ids
    else:
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        input_ids = chat_tokens(plan.tokenizer, [*system, {"role": "user", "content": prompt}])
    refuse_too_long(input_ids.shape[1], options.max_new_tokens, plan)
    return plan, input_ids


def shows_text(options: AnswerOptions) -> bool:
    return options.format == "text" or (options.format == "auto" and sys.stdout.isatty())


def text_output() -> "TextOutput":
    from . import display  # rich is there for those who want to look

    return TextOutput(display)


class TextOutput:
    """Shows replies on standard output as they come."""

    def __init__(self, display):
        self.display = display
        self.console = display.Console(highlight=False)

    def reply(self, run: Callable[..., Answer], pair: Pair, **options) -> Answer:
        """Show what `run` streams."""
        display, plain = self.display, options.get("plain", False)
        if plain:
            self.console.rule("plain decoding", style="dim")
        before = pair.assistant.last_stats
        meter = display.Speedometer(
            lambda: None if plain or pair.assistant.last_stats is before else pair.assistant.last_stats
        )
        with display.Transcript(self.console, meter.status) as transcript:

            def show(piece) -> None:
                meter.tick()
                transcript.add(piece)

            return run(show, **options)

    def summary(self, drafted: Answer, comparison: Comparison | None) -> None:
        display = self.display
        self.console.rule(style="dim")
        self.console.print(display.legend(self.console))
        self.console.print(display.summary(drafted))
        if comparison is not None:
            self.console.print(display.verdict(comparison))
