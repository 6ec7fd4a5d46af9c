"""The prompts of a benchmark: JSON lines of user turns, and the chats they become."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..records import read_numbered


@dataclass(frozen=True)
class Prompt:
    """One conversation to be answered turn by turn."""

    id: str
    suite: str  # the file's name without its ending
    task: str  # of the suite; Spec-Bench has several
    turns: tuple[str, ...]  # what the user says


def read_suites(files: Iterable[Path], max_samples: int | None = None) -> list[Prompt]:
    """The files' prompts, suite by suite.

    Args:
        max_samples: so many of each task, evenly spread over the file.

    Raises:
        ValueError: for a file that is missing or empty, a line that is no prompt, and an id that comes twice.
    """
    prompts: list[Prompt] = []
    for file in files:
        tasks: dict[str, list[Prompt]] = {}
        for prompt in _read(Path(file)):
            tasks.setdefault(prompt.task, []).append(prompt)
        for entries in tasks.values():
            prompts += _spread(entries, max_samples)
    seen = set()
    for prompt in prompts:
        if (prompt.suite, prompt.id) in seen:
            raise ValueError(f"The id {prompt.id!r} comes twice in {prompt.suite}: ids must tell prompts apart.")
        seen.add((prompt.suite, prompt.id))
    return prompts


def _spread(entries: list[Prompt], count: int | None) -> list[Prompt]:
    if count is None or count >= len(entries):
        return entries
    return [entries[number * len(entries) // count] for number in range(count)]


def _read(file: Path) -> list[Prompt]:
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    prompts = []
    for number, row in read_numbered(file):
        try:
            turns = row.get("turns") or [row["prompt"]]
            if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
                raise ValueError("its turns must be texts that are not empty")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{file}, line {number}: {error!r}. A line is {{"id": ..., "task": ..., "turns": [user turns]}}.'
            ) from error
        prompts.append(Prompt(str(row.get("id", number)), file.stem, str(row.get("task", file.stem)), tuple(turns)))
    if not prompts:
        raise ValueError(f"{file} holds no prompt.")
    return prompts


def chat_text(tokenizer, turns: list[str], answers: list[str], system: str | None, template_options: dict) -> str:
    """The chat up to the last of `turns`, ready to be answered; `answers` are those to the turns before it."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn, answer in zip(turns, [*answers, None]):
        messages.append({"role": "user", "content": turn})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in messages) + "\n\n"
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template_options)


def refuse_too_long(prompts: list[Prompt], count_tokens, limit: int | None, new_tokens: int) -> None:
    """Check, before a model is loaded, that every prompt and its answers fit.

    Args:
        count_tokens: of a prompt's first `n` turns, without answers.
        limit: tokens that the target was made for.

    Raises:
        ValueError: naming the longest prompt.
    """
    if limit is None:
        return
    lengths = {prompt: count_tokens(prompt) + len(prompt.turns) * new_tokens for prompt in prompts}
    longest = max(lengths, key=lengths.get)
    if lengths[longest] > limit:
        raise ValueError(
            f"{sum(length > limit for length in lengths.values())} prompts are longer than the target's limit of "
            f"{limit} tokens, answers of {new_tokens} tokens included; the longest, {longest.id!r} of "
            f"{longest.suite}, would come to {lengths[longest]}. Leave them out, or lower --max_new_tokens."
        )
