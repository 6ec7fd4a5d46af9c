"""`hf-d2sd chat`: a conversation that keeps its cache, so that of each turn only what is new is read."""

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from transformers import Cache

from ..cache import keep_prefix
from .answering import Answer, AnswerOptions, Comparison, StopOnRequest, answer
from .generate import shows_text, text_output
from .loading import Pair, PairPlan, chat_tokens, plan_pair, refuse_too_long

HELP = """\
/clear    forget the conversation
/compare  answer the last message with plain decoding too
/stats    figures of the last answer
/quit     leave, as does the end of the input
Ctrl-C stops an answer; what is there of it stays in the conversation."""


@dataclass
class ChatOptions(AnswerOptions):
    """Talk with a target and see which drafter wrote each token."""


class Conversation:
    """Messages, and the cache of what the target has read and written so far.

    Args:
        run: answers; `apps.answering.answer` by default.
    """

    def __init__(self, pair: Pair, plan: PairPlan, options: ChatOptions, run: Callable[..., Answer] = answer):
        self._pair, self._plan, self._options, self._run = pair, plan, options, run
        self.clear()

    def clear(self) -> None:
        system = self._options.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.last: Answer | None = None
        self._forget_cache()

    def _forget_cache(self) -> None:
        self._cache: Cache | None = None
        self._cached: list[int] = []  # the tokens that it holds

    @property
    def turn(self) -> int:
        return sum(message["role"] == "assistant" for message in self.messages)

    def ask(self, text: str, **options) -> Answer:
        """Answer the user's next message.

        Raises:
            ValueError: where the conversation no longer fits; it is then as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        input_ids = chat_tokens(self._pair.tokenizer, messages)
        refuse_too_long(input_ids.shape[1], self._options.max_new_tokens, self._plan)
        self._reuse_cache(input_ids[0].tolist())
        self.last = self._run(
            self._pair,
            replace(self._options, seed=self._options.seed + self.turn),
            input_ids,
            cache=self._cache,
            **options,
        )
        self._cache = self.last.cache
        self._cached = self.last.sequence[: self.last.cache.get_seq_length()]
        self._input_ids = input_ids
        self.messages = [*messages, {"role": "assistant", "content": self.last.text}]
        return self.last

    def _reuse_cache(self, tokens: list[int]) -> None:
        """Crop the cache to what it shares with a prompt: a template may write an old reply in another way.

        The prompt's last token is read in any case.
        """
        shared = next((i for i, (a, b) in enumerate(zip(self._cached, tokens)) if a != b), len(self._cached))
        shared = min(shared, len(tokens) - 1)
        if self._cache is not None and (shared == 0 or not keep_prefix(self._cache, shared)):
            self._forget_cache()

    def compare(self, **options) -> Comparison:
        """The last message answered with plain decoding, from its beginning.

        Raises:
            ValueError: before the first message.
        """
        if self.last is None:
            raise ValueError("There is nothing to compare yet: say something first.")
        count = len(self.last.tokens)  # an answer that was stopped is compared as far as it goes
        plain = self._run(
            self._pair,
            replace(self._options, seed=self._options.seed + self.turn - 1, max_new_tokens=count),
            self._input_ids,
            plain=True,
            **options,
        )
        return Comparison(self.last, plain)


def chat(options: ChatOptions) -> None:
    """Read messages from standard input until it ends; replies as text, or as a JSON line each."""
    plan = plan_pair(options)
    chat_tokens(plan.tokenizer, [{"role": "user", "content": "?"}])  # refused without a template
    as_text = shows_text(options)
    output = text_output() if as_text else None
    pair = plan.load()
    session = _TextSession(output) if as_text else _JsonSession()
    conversation = Conversation(pair, plan, options, session.run)
    session.begin()
    for line in session.lines():
        try:
            if not obey(line.strip(), conversation, session):
                break
        except ValueError as error:
            session.complain(str(error))
        except KeyboardInterrupt:  # between answers, or the second one in an answer, which is then as if never asked
            session.interrupted()


def obey(line: str, conversation: Conversation, session: "_TextSession | _JsonSession") -> bool:
    """One line of input; `False` for the one that ends the chat."""
    if line == "/quit":
        return False
    if line == "/clear":
        conversation.clear()
        session.say("The conversation is empty again.")
    elif line == "/compare":
        session.show_comparison(conversation.compare())
    elif line == "/stats":
        session.show_figures(conversation.last)
    elif line.startswith("/"):
        session.say(HELP)
    elif line:
        with stopped_by_interrupt() as stop:
            reply = conversation.ask(line, stop=stop)
        session.show_answer(reply, stop.requested)
    return True


@contextlib.contextmanager
def stopped_by_interrupt() -> Iterator[StopOnRequest]:
    """Within, a first Ctrl-C ends the reply at the next token, and a second one interrupts as usual."""
    stop = StopOnRequest()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(number, frame) -> None:
        signal.signal(signal.SIGINT, before)
        stop.request()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class _TextSession:
    """A chat in a terminal."""

    def __init__(self, output):
        self._output = output

    def begin(self) -> None:
        self._output.console.print(self._output.display.legend(self._output.console))
        self.say("A line is a message; /help tells the commands.")

    def lines(self) -> Iterator[str]:
        while True:
            try:
                yield self._output.console.input("[bold]> [/bold]")
            except KeyboardInterrupt:
                self.interrupted()
            except EOFError:
                return

    def run(self, pair: Pair, options: ChatOptions, input_ids, **kwargs) -> Answer:
        return self._output.reply(lambda show, **more: answer(pair, options, input_ids, show, **more), pair, **kwargs)

    def say(self, text: str) -> None:
        self._output.console.print(text, style="dim", markup=False)

    complain = say

    def interrupted(self) -> None:
        self.say("\n/quit leaves the chat.")

    def show_answer(self, reply: Answer, stopped: bool) -> None:
        stats = reply.stats
        line = f"{len(reply.tokens)} tokens, {reply.tokens_per_second:.1f} a second"
        if stats.cycles:
            line += f", {stats.mean_acceptance_length:.2f} a target pass"
        line += f"; {stats.prompt_tokens} tokens were new to read"
        self.say(f"{line}{'; stopped' if stopped else ''}")
        if stats.decisions is not None:
            self.say(str(stats.decisions))

    def show_figures(self, reply: Answer | None) -> None:
        if reply is None:
            self.say("There is no answer yet.")
        else:
            self._output.console.print(self._output.display.summary(reply))

    def show_comparison(self, comparison: Comparison) -> None:
        self._output.console.print(self._output.display.verdict(comparison))


class _JsonSession:
    """A chat for scripts: a message a line in, an object a line out."""

    run = staticmethod(answer)

    def begin(self) -> None:
        pass

    def lines(self) -> Iterator[str]:
        return iter(sys.stdin)

    def _write(self, **values) -> None:
        print(json.dumps(values), flush=True)

    def say(self, text: str) -> None:
        self._write(message=text)

    def complain(self, text: str) -> None:
        self._write(error=text)

    def interrupted(self) -> None:
        raise KeyboardInterrupt  # a script is ended

    def show_answer(self, reply: Answer, stopped: bool) -> None:
        self._write(new_prompt_tokens=reply.stats.prompt_tokens, stopped=stopped, **reply.report())

    def show_figures(self, reply: Answer | None) -> None:
        self._write(**(reply.report() if reply is not None else {"error": "There is no answer yet."}))

    def show_comparison(self, comparison: Comparison) -> None:
        self._write(plain=comparison.report())
