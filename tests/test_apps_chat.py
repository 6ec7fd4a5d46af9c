"""`hf-d2sd chat`: every turn is the plain reply to the whole conversation, and reads only what is new."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
import transformers as tf
from tiny import prompt, tiny_target
from words import save_word_drafters, save_word_target

from hf_d2sd.apps.chat import ChatOptions, Conversation, chat, stopped_by_interrupt
from hf_d2sd.apps.loading import plan_pair
from hf_d2sd.cache import keep_prefix
from hf_d2sd.modeling import CACHE_NAME

NEW = 12
TURNS = ["a b c", "d e", "f g h i"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return save_word_target(folder / "target"), *save_word_drafters(folder)


def options(folders, **changes) -> ChatOptions:
    target, first, second = map(str, folders)
    settings = dict(target=target, drafters=[first, second], max_new_tokens=NEW, dtype="float32")
    return ChatOptions(**{**settings, **changes})


@pytest.fixture
def conversation(folders):
    chosen = options(folders)
    plan = plan_pair(chosen)
    return Conversation(plan.load(), plan, chosen)


def plain_reply(conversation, messages) -> str:
    pair = conversation._pair
    inputs = pair.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = pair.target.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    return pair.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_each_turn_is_the_plain_reply_to_the_whole_conversation(conversation):
    for turn in TURNS:
        messages = [*conversation.messages, {"role": "user", "content": turn}]
        assert conversation.ask(turn).text == plain_reply(conversation, messages)
    assert conversation.turn == len(TURNS)


def test_only_the_new_turn_is_read(conversation):
    conversation.ask(TURNS[0])
    for turn in TURNS[1:]:
        known = len(conversation._cached)
        reply = conversation.ask(turn)
        prompt = len(reply.sequence) - len(reply.tokens)
        assert reply.stats.prompt_tokens == prompt - known < prompt / 2


def test_a_template_that_writes_old_replies_in_another_way_costs_only_the_changed_part(conversation):
    first = conversation.ask(TURNS[0])
    conversation.messages[-1]["content"] = "z " * 3  # as templates do that leave out what was thought
    messages = [*conversation.messages, {"role": "user", "content": TURNS[1]}]
    reply = conversation.ask(TURNS[1])
    assert reply.text == plain_reply(conversation, messages)
    prompt = len(reply.sequence) - len(reply.tokens)
    question = len(first.sequence) - len(first.tokens)
    assert reply.stats.prompt_tokens == prompt - question


def test_clear_forgets_everything(conversation):
    before = conversation.ask(TURNS[0]).text
    conversation.ask(TURNS[1])
    conversation.clear()
    assert conversation.ask(TURNS[0]).text == before


def test_compare_answers_the_last_message_plainly(conversation):
    with pytest.raises(ValueError, match="say something first"):
        conversation.compare()
    conversation.ask(TURNS[0])
    conversation.ask(TURNS[1])
    comparison = conversation.compare()
    assert comparison.same_text and comparison.plain.plain
    assert conversation.turn == 2, "a comparison is no turn"


def test_a_reply_that_is_stopped_stays_in_the_conversation(conversation):
    with stopped_by_interrupt() as stop:
        pieces = []

        def interrupt_once(piece) -> None:
            if not pieces:
                signal.raise_signal(signal.SIGINT)
            pieces.append(piece)

        reply = conversation.ask(TURNS[0], stop=stop, on_piece=interrupt_once)
    assert stop.requested and 1 <= len(reply.tokens) < NEW
    messages = [*conversation.messages, {"role": "user", "content": TURNS[1]}]
    assert conversation.ask(TURNS[1]).text == plain_reply(conversation, messages)


@pytest.fixture
def heeded_interrupts():
    """A process that was begun in the background may have been told to ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_interrupts")
def test_a_second_interrupt_is_a_real_one():
    with pytest.raises(KeyboardInterrupt), stopped_by_interrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_answer_that_is_interrupted_for_good_is_as_if_never_asked(conversation):
    conversation.ask(TURNS[0])
    messages = list(conversation.messages)

    def interrupt(piece) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask(TURNS[2], on_piece=interrupt)
    assert conversation.messages == messages
    expected = plain_reply(conversation, [*messages, {"role": "user", "content": TURNS[1]}])
    assert conversation.ask(TURNS[1]).text == expected


def test_an_interrupt_between_answers_ends_a_script_and_not_a_chat_in_a_terminal(folders, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", interrupt)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    with pytest.raises(KeyboardInterrupt):
        chat(options(folders, format="json"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    chat(options(folders, format="text"))
    assert capsys.readouterr().out.count("/quit leaves the chat") == 2


def test_a_conversation_that_grew_too_long_says_so_and_stays_as_it_was(conversation):
    conversation.ask(TURNS[0])
    messages = list(conversation.messages)
    with pytest.raises(ValueError, match="the target has positions for 2048"):
        conversation.ask("a " * 2100)
    assert conversation.messages == messages
    assert conversation.ask(TURNS[1]).text


class TestKeptPrefix:
    def cache(self, family: str, length: int):
        return tiny_target(family)(prompt(length), use_cache=True)[CACHE_NAME]

    def test_a_full_cache_is_cropped(self):
        cache = self.cache("llama", 15)
        assert keep_prefix(cache, 9) and cache.get_seq_length() == 9
        assert keep_prefix(cache, 9) and not keep_prefix(cache, 10)

    def test_a_sliding_cache_only_while_it_has_let_go_of_nothing(self):
        cache = self.cache("qwen3", 8)  # its window is 10
        assert keep_prefix(cache, 6) and cache.get_seq_length() == 6
        cache = self.cache("qwen3", 15)
        assert not keep_prefix(cache, 14) and cache.get_seq_length() == 15


def test_as_json_each_message_gets_one_line(folders, monkeypatch, capsys):
    lines = [TURNS[0], "", "/compare", TURNS[1], "/stats", "/what", "/clear", "/compare", "/quit", "never read"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    chat(options(folders))
    first, compared, second, stats, usage, cleared, nothing = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == compared["plain"]["text"] and compared["plain"]["same_text"]
    assert stats["text"] == second["text"] != first["text"]
    assert "/clear" in usage["message"] and "empty" in cleared["message"]
    assert "say something first" in nothing["error"]


def test_below_an_answer_stands_what_was_chosen(folders, library_default, monkeypatch, capsys):
    for named, shown in (({}, 1), (dict(num_branches=1), 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(TURNS[0]))
        chat(options(folders, format="text", **named))
        text = " ".join(capsys.readouterr().out.split())
        assert text.count("tokens were new to read") == 1
        assert len(re.findall(r"\d+ cycles: .* plain steps, .* expected; why: ", text)) == shown


def test_without_a_chat_template_there_is_no_chat(folders, tmp_path):
    target = save_word_target(tmp_path / "target")
    (target / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = tf.AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(target)
    with pytest.raises(ValueError, match="no chat template"):
        chat(options(folders, target=str(target)))


def test_in_a_terminal_ctrl_c_ends_the_answer_and_not_the_chat(folders):
    target, first, second = map(str, folders)
    arguments = ["chat", "--target", target, "--drafters", first, second, "--max_new_tokens", "2000"]
    script = (  # a target that takes its time, so that the answer does not end before it is stopped
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from hf_d2sd.apps import display; from hf_d2sd.cli import main; add = display.Transcript.add; "
        f"display.Transcript.add = lambda *piece: (time.sleep(0.1), add(*piece)); main({arguments!r})"
    )
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=follower,
        stdout=follower,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", "LINES": "20"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that its Ctrl-C is a signal
    )
    os.close(follower)
    try:
        read_until(leader, "> ")
        os.write(leader, b"a b c\n")
        read_until(leader, "tokens/s")
        os.write(leader, b"\x03")
        assert "stopped" in read_until(leader, "stopped")
        os.write(leader, b"\x03")
        read_until(leader, "/quit leaves")
        os.write(leader, b"/quit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(leader)


def read_until(leader: int, words: str, seconds: float = 240) -> str:
    shown, end = "", time.monotonic() + seconds
    while words not in shown:
        ready, _, _ = select.select([leader], [], [], max(end - time.monotonic(), 0))
        assert ready, f"{words!r} never came: {shown[-500:]!r}"
        shown += os.read(leader, 65536).decode(errors="replace")
    return shown
