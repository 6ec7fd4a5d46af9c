"""What people have, read as chats: JSON lines and arrays, Parquet files, data sets of the Hub; in several layouts."""

import importlib.util
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .. import records

logger = logging.get_logger(__name__)

_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",  # from here on ShareGPT's names
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
}


class UnusableRow(ValueError):
    """No chat can be made of a row; the text says why."""


@dataclass(frozen=True)
class Chat:
    """Messages as chat templates take them, with one of the user's at least, and the tools that are offered."""

    messages: list[dict]
    tools: list | None = None

    @property
    def turns(self) -> list[str]:
        """What the user says."""
        return [message["content"] for message in self.messages if message["role"] == "user"]

    @property
    def others(self) -> str:
        """All that is beside the user's turns, as JSON; empty where nothing is."""
        plain = self.tools is None and len(self.turns) == len(self.messages)
        return "" if plain else json.dumps([self.messages, self.tools], sort_keys=True, default=str)

    @property
    def order(self) -> tuple:
        """Sorted by it, chats of like length are neighbours, and plain ones in the order of their turns."""
        return len(self.turns), len(self.turns[0]), self.turns, self.others


@dataclass
class Talk:
    """A chat as it goes on: what was said so far ends, after `advance`, where the assistant is to speak."""

    chat: Chat
    messages: list[dict] = field(default_factory=list)
    taken: int = 0

    def advance(self) -> bool:
        """Go on to the next place where the assistant is to speak; False where the chat ends."""
        while (message := self._next) is not None:
            self.messages.append(message)
            self.taken += 1
            following = self._next
            more_results = following is not None and following["role"] == "tool"
            if message["role"] == "user" or (message["role"] == "tool" and not more_results):
                return True
        return False

    def reply(self, text: str) -> None:
        """What the target said; a chat that has an assistant's turn here goes on with that one."""
        if self._next is None or self._next["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": text})

    @property
    def _next(self) -> dict | None:
        return self.chat.messages[self.taken] if self.taken < len(self.chat.messages) else None


# Files and data sets -------------------------------------------------------------------------------------------------


def read_chats(
    sources: list[str], limit: int | None, seed: int, raw: bool = False, left_out: Counter | None = None
) -> list[Chat]:
    """The chats of each source, in random order within it. Rows that cannot be used are named in a warning.

    Args:
        sources: JSON lines or an array of them, a Parquet file, a folder or a Hub id `NAME[:CONFIG][:SPLIT]` of
            `datasets`.
        limit: of chats of each source.
        raw: a chat is one text, of a target without a chat template.
        left_out: takes the count of rows that cannot be used.

    Raises:
        ValueError: for a source that is torn, in another encoding than UTF-8, or without any row that can be used.
        OSError: for a source that is not there.
    """
    chats = []
    for source in sources:
        found, unusable = _read_source(source, limit, seed, partial(chat_of, raw=raw))
        count = sum(map(len, unusable.values()))
        said = f"{source}: {count} of {count + len(found)} rows cannot be used: {_told(unusable)}."
        if unusable and not found:
            raise ValueError(said)
        if unusable:
            logger.warning(said)
        if left_out is not None and unusable:
            left_out["cannot be used"] += count
        chats += found
    return chats


def require_datasets(sources: list[str]) -> None:
    """Raises `ValueError` where a source needs the package `datasets`, which is not installed."""
    needing = [source for source in sources if _needs_datasets(source)]
    if needing and importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"--prompts {needing[0]}: no file of JSON; Parquet and data sets of the Hub are read by `datasets`, which "
            "is not installed: pip install 'hf-d2sd[data]'."
        )


def _needs_datasets(source: str) -> bool:
    path = Path(source)
    if path.suffix == ".parquet" or path.is_dir():
        return True
    return not path.exists() and path.suffix not in (".json", ".jsonl") and bool(_HUB.fullmatch(source))


def _read_source(
    source: str, limit: int | None, seed: int, read: Callable[[Any], Chat]
) -> tuple[list[Chat], dict[str, list[int]]]:
    """Chats, and the numbers of the rows, from 1, that give none, by what is wrong with them."""
    rows = _load(source) if _needs_datasets(source) else records.read_values(Path(source))
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    found: list[Chat] = []
    unusable = defaultdict(list)
    for index in order:
        if limit is not None and len(found) >= limit:
            break
        number, row = rows[index]
        try:
            found.append(read(row))
        except UnusableRow as error:
            unusable[str(error)].append(number)
    return found, unusable


class _Numbered(Sequence):
    """The rows of a data set, with their numbers."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return index + 1, self.rows[index]


def _load(source: str) -> Sequence[tuple[int, Any]]:
    require_datasets([source])
    import datasets

    path = Path(source)
    if path.suffix == ".parquet" and not path.exists():
        raise FileNotFoundError(f"There is no file {source}.")
    try:
        if path.suffix == ".parquet" and path.is_file():
            return _Numbered(datasets.load_dataset("parquet", data_files=source, split="train"))
        name, *rest = [source] if path.exists() else source.split(":")
        config = rest[0] if len(rest) == 2 else None
        return _Numbered(datasets.load_dataset(name, config, split=rest[-1] if rest else "train"))
    except Exception as error:  # each reader of `datasets` has errors of its own
        raise ValueError(f"{source} cannot be read by `datasets`: {error.__cause__ or error}") from error


def _told(unusable: dict[str, list[int]], most: int = 5) -> str:
    parts = []
    for reason, numbers in unusable.items():
        shown = ", ".join(map(str, sorted(numbers)[:most])) + (", ..." if len(numbers) > most else "")
        parts.append(f"{reason} ({len(numbers)}: row {shown})")
    return "; ".join(parts)


# Layouts of a row ----------------------------------------------------------------------------------------------------


def chat_of(row: Any, raw: bool = False) -> Chat:
    """The chat of one row, in whichever layout.

    Raises:
        UnusableRow: saying what is wrong with it.
    """
    if not isinstance(row, dict):
        raise UnusableRow(f"a {type(row).__name__}, no object")
    there = {key: value for key, value in row.items() if value is not None}  # columns of a table are always there
    layouts = _LAYOUTS | {"text": lambda row: _one(row["text"])} if raw else _LAYOUTS
    key = next((key for key in layouts if key in there), None)
    if key is None:
        raise UnusableRow(f"none of {', '.join(f'`{name}`' for name in layouts)}; it has {sorted(map(str, row))}")
    messages = [_message(message) for message in layouts[key](there)]
    if not any(message["role"] == "user" for message in messages):
        raise UnusableRow("no turn of the user's")
    system = there.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    chat = Chat(messages, _tools(there.get("tools")))
    if raw and (len(messages) > 1 or chat.others):
        raise UnusableRow("a conversation, which takes a chat template")
    return chat


def _turns(row: dict) -> list:
    return [{"role": "user", "content": turn} for turn in _listed(row["turns"], "turns")]


def _alpaca(row: dict) -> list:
    history, more = row.get("history") or [], row.get("input")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UnusableRow("`history` that is no list of pairs")
    said = [(("user", asked), ("assistant", answered)) for asked, answered in history]
    text = f"{row['instruction']}\n{more}" if isinstance(more, str) and more.strip() else row["instruction"]
    return [{"role": role, "content": content} for pair in said for role, content in pair] + _one(text)


def _prompt(row: dict) -> list:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, list) else _one(prompt)


def _one(text: Any) -> list[dict]:
    return [{"role": "user", "content": text}]


# field: the messages of a row that has it; the first that is there counts
_LAYOUTS: dict[str, Callable[[dict], list]] = {
    "turns": _turns,
    "messages": lambda row: _listed(row["messages"], "messages"),
    "conversations": lambda row: _listed(row["conversations"], "conversations"),
    "conversation": lambda row: _listed(row["conversation"], "conversation"),
    "instruction": _alpaca,
    "prompt": _prompt,
}


def _listed(value: Any, name: str) -> list:
    if not isinstance(value, list):
        raise UnusableRow(f"`{name}` that is a {type(value).__name__}, no list")
    return value


def _message(message: Any) -> dict:
    """A message with a role that templates know, and text."""
    if not isinstance(message, dict):
        raise UnusableRow(f"a message that is a {type(message).__name__}")
    said = {key: value for key, value in message.items() if value is not None}
    role, content = said.pop("role", said.pop("from", None)), said.pop("content", said.pop("value", None))
    if role not in _ROLES:
        raise UnusableRow(f"a message of the role {role!r}")
    role = _ROLES[role]
    calls = [_with_arguments(call) for call in said.pop("tool_calls", None) or []]
    content = "" if content is None and calls else _as_text(content)
    if role == "user" and not content.strip():
        raise UnusableRow("a turn of the user's without text")
    kept = {key: said[key] for key in ("name", "tool_call_id", "reasoning_content") if key in said}
    return {"role": role, "content": content, **kept, **({"tool_calls": calls} if calls else {})}


def _as_text(content: Any) -> str:
    """The text of a message, which may come in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UnusableRow(f"content that is no text but a {type(content).__name__}")
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        kinds = sorted({str(part.get("type")) for part in content if isinstance(part, dict)})
        raise UnusableRow(f"content with parts that are no text: {kinds}")
    return "".join(texts)


def _with_arguments(call: Any) -> dict:
    """A call whose arguments are an object: templates write it as JSON, which a text of JSON would be quoted in."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise UnusableRow("a tool's call without `function`")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, "arguments of a tool's call")
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(tools: Any) -> list | None:
    if isinstance(tools, str):
        tools = _parsed(tools, "`tools`") if tools.strip() else None
    return _listed(tools, "tools") if tools else None


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UnusableRow(f"{name} that are no JSON") from error
