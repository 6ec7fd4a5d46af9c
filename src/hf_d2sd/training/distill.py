"""`hf-d2sd distill`: the target writes the text its drafters learn from."""

import functools
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging
from transformers.utils.logging import tqdm

from .. import records
from ..binding import tokenizer_fingerprint
from ..checks import refuse_absent_device, refuse_missing_file, refuse_unknown_dtype, refuse_unwritable_folder
from ..pairs import refuse_missing_folder
from .chats import Chat, Talk, read_chats, require_datasets
from .engines import ENGINES, make_engine
from .shards import (
    Row,
    batched,
    read_left_out,
    read_rows,
    read_shard,
    refuse_missing_rows,
    shard_paths,
    write_shard,
)

logger = logging.get_logger(__name__)

_MARK = "\u241f"  # stands for the user's words where the chat template is opened
_QUESTION_TEMPERATURE = 0.8  # of a second turn that the target writes
_LATER = {"raw": False, "second_turns": 0}  # options that folders of earlier releases do not name, as they were then


@dataclass
class DistillOptions:
    """Write responses of a target to prompts, in shards; a run that was killed goes on where it stopped.

    The same command may run several times at once, on one device each: all write to the one folder.
    """

    target: str = field(metadata={"help": "folder or Hub id of the target"})
    out: Path = field(metadata={"help": "folder for the shards"})
    prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "JSON lines or arrays with `messages`, `turns` (the user's), `conversations` (ShareGPT), "
            "`instruction` (Alpaca) or `prompt`; Parquet files; data sets of the Hub, NAME, NAME:SPLIT or "
            "NAME:CONFIG:SPLIT"
        },
    )
    max_prompts: int | None = field(default=None, metadata={"help": "at most this many prompts of each file"})
    self_prompts: int = field(default=0, metadata={"help": "prompts that the target writes itself"})
    openings: str | None = field(
        default=None,
        metadata={"help": "text file: beginnings of self-written prompts, a line each, used in turn; \\n: a new line"},
    )
    answered: list[str] = field(
        default_factory=list,
        metadata={"help": "folders of earlier rows: chats whose first prompt was answered there are left out"},
    )
    second_turns: int = field(
        default=0, metadata={"help": "more turns of each chat, whose question the target writes itself"}
    )
    raw: bool = field(
        default=False, metadata={"help": "prompts as they are, without a chat template: for base models"}
    )
    system: str | None = field(default=None, metadata={"help": "system message of every chat that has none"})
    template_options: str = field(
        default="{}", metadata={"help": 'JSON options of the chat template, e.g. {"enable_thinking": true}'}
    )
    temperature: float = field(default=0.0, metadata={"help": "of responses; 0 is greedy"})
    max_new_tokens: int = field(default=512, metadata={"help": "of a response"})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "longer prompts are left out"})
    batch_size: int = field(default=64, metadata={"help": "chats in a shard, and side by side in a batch"})
    engine: str = field(
        default="auto",
        metadata={
            "help": "batches: all of a shard wait for the longest reply; continuous: Transformers' continuous "
            "batching, slots are refilled; auto: continuous on a GPU, where it can",
            "choices": list(ENGINES),
        },
    )
    slots: int | None = field(
        default=None, metadata={"help": "continuous: replies side by side; default: by the memory, on a CPU 32"}
    )
    dtype: str = field(default="bfloat16", metadata={"help": "of the target"})
    device: str | None = field(default=None, metadata={"help": "of the target; default: a GPU if there is one"})
    stop_after: float | None = field(default=None, metadata={"help": "minutes; the same command then goes on"})
    seed: int = 0

    def __post_init__(self):
        self.out = Path(self.out)
        if self.temperature < 0 or self.max_new_tokens < 2 or self.batch_size < 1 or self.self_prompts < 0:
            raise ValueError(
                "temperature and self_prompts must be at least 0, batch_size at least 1, and max_new_tokens at least "
                f"2; got {self.temperature}, {self.self_prompts}, {self.batch_size} and {self.max_new_tokens}."
            )
        if self.second_turns < 0 or (self.slots is not None and self.slots < 1):
            raise ValueError(
                f"second_turns must be at least 0 and slots at least 1; got {self.second_turns} and {self.slots}."
            )
        if not self.prompts and not self.self_prompts:
            raise ValueError("Nothing to answer: pass --prompts FILE, --self_prompts N, or both.")
        asked = [
            f"--{name}" for name in ("system", "self_prompts", "second_turns") if self.raw and getattr(self, name)
        ]
        if asked:
            raise ValueError(f"{', '.join(asked)}: of the chat template, which --raw leaves out. Drop one of them.")
        require_datasets(self.prompts)
        refuse_unknown_dtype(self.dtype, "auto")
        refuse_absent_device(self.device)
        try:
            self.template = json.loads(self.template_options)
        except json.JSONDecodeError as error:
            raise ValueError(f"--template_options is no JSON: {self.template_options!r} ({error}).") from error
        if not isinstance(self.template, dict):
            raise ValueError(f"--template_options is {self.template_options!r}; it must be a JSON object.")

    def check_places(self) -> None:
        """Raises `ValueError` for what is missing of files and folders, or in the way of the shards."""
        refuse_missing_folder(self.target)
        refuse_unwritable_folder("--out", self.out)
        refuse_missing_file("--openings", self.openings)
        for source in self.prompts:
            if Path(source).suffix in (".json", ".jsonl", ".parquet"):  # others may be data sets of the Hub
                refuse_missing_file("--prompts", source)
        refuse_missing_rows(map(Path, self.answered))

    @property
    def generation(self) -> dict:
        sampling = dict(do_sample=True, temperature=self.temperature) if self.temperature else dict(do_sample=False)
        return dict(max_new_tokens=self.max_new_tokens, **sampling)


def distill(options: DistillOptions) -> dict:
    """Write all shards that are not there yet; returns counts of rows, tokens, missing shards and what was left out.

    Raises:
        ValueError: for prompts that cannot be read, a target without a chat template, or a folder that was begun with
            other options.
    """
    started = time.monotonic()
    options.check_places()
    unusable: Counter[str] = Counter()
    chats = read_chats(options.prompts, options.max_prompts, options.seed, options.raw, unusable)
    writer = Writer(options)
    options.out.mkdir(parents=True, exist_ok=True)
    records.begin(
        options.out / "distill.json", _settings(options, tokenizer_fingerprint(writer.tokenizer)), later=_LATER
    )
    chats += [Chat([{"role": "user", "content": text}]) for text in write_prompts(writer)]
    chats = without_answered(without_repetitions(chats), options.answered, writer.opening_tokens)
    # Neighbours of like length share a batch; the batches come in random order, so that any part is a fair sample.
    chats.sort(key=lambda chat: chat.order)
    batches = list(enumerate(batched(chats, options.batch_size)))
    random.Random(options.seed).shuffle(batches)
    for index, batch in tqdm(batches, desc="shards", smoothing=0.05):
        if options.stop_after is not None and time.monotonic() - started > 60 * options.stop_after:
            break
        records.write_once(
            options.out / f"rows-{index:05d}.safetensors",
            functools.partial(_write_answers, writer, batch, options.seed + index),
        )
    missing = sum(not (options.out / f"rows-{index:05d}.safetensors").exists() for index, _ in batches)
    left_out = unusable + sum(map(read_left_out, shard_paths(options.out)), Counter())
    if left_out:
        logger.warning("Left out: " + "; ".join(f"{reason} ({number})" for reason, number in left_out.items()) + ".")
    return {**count(options.out), "missing_shards": missing, "left_out": dict(left_out)}


def _write_answers(writer: "Writer", chats: list[Chat], seed: int, path: Path) -> None:
    left_out: Counter[str] = Counter()
    rows = writer.answer(chats, seed, left_out)
    write_shard(path, rows, left_out)


def _settings(options: DistillOptions, tokenizer: str) -> dict:
    """What the shards of a folder are made of, as JSON."""
    free = {"out", "device", "stop_after", "engine", "slots"}
    return {name: value for name, value in asdict(options).items() if name not in free} | {"tokenizer": tokenizer}


def without_repetitions(chats: list[Chat]) -> list[Chat]:
    """The first of those chats whose turns are equal but for case and white space, and that are else the same."""
    first: dict[tuple, Chat] = {}
    for chat in chats:
        turns = (" ".join(turn.casefold().split()) for turn in chat.turns)
        first.setdefault((chat.others, *turns), chat)
    return list(first.values())


def without_answered(
    chats: list[Chat], folders: list[str], opening_tokens: Callable[[Chat], list[int] | None]
) -> list[Chat]:
    """Those chats whose first prompt, as `opening_tokens` renders it, no row of the folders begins with."""
    if not folders:
        return chats
    answered = {row.tokens[: row.prompt_length].numpy().tobytes() for row in read_rows(*map(Path, folders))}
    return [
        chat
        for chat in chats
        if (tokens := opening_tokens(chat)) is None or torch.tensor(tokens).numpy().tobytes() not in answered
    ]


def write_prompts(writer: "Writer") -> list[str]:
    """Prompts that the target samples at the opened user's turn (arXiv 2406.08464), a file for each batch."""
    options = writer.options
    folder = options.out / "prompts"
    folder.mkdir(exist_ok=True)
    openings = read_openings(options.openings)

    def write(path: Path) -> None:
        index = int(path.stem)
        texts = writer.write_prompts(openings[index % len(openings)], seed=options.seed - 1 - index)
        records.write_json(path, {"prompts": texts}, indent=None)

    found: dict[str, None] = {}
    shown = 0  # a bar that is switched off has no count of its own
    with tqdm(total=options.self_prompts, desc="prompts") as bar:
        for index in itertools.count():
            if len(found) >= options.self_prompts:
                return list(found)[: options.self_prompts]
            if index >= 20 and len(found) < index:
                raise ValueError(
                    f"{index} batches of {options.batch_size} gave only {len(found)} prompts: the target does not end "
                    "a user's turn that it writes. Pass prompts of your own with --prompts."
                )
            found |= dict.fromkeys(json.loads(_wait_for(folder, index, write).read_text(encoding="utf-8"))["prompts"])
            bar.update(min(len(found), options.self_prompts) - shown)
            shown = min(len(found), options.self_prompts)


def _wait_for(folder: Path, index: int, write: Callable[[Path], None], ahead: int = 8) -> Path:
    """The file of a batch; while another process writes it, this one writes batches that come after."""
    path, behind = folder / f"{index:05d}.json", 0
    while not path.exists():
        if not records.write_once(folder / f"{index + behind:05d}.json", write):
            behind = (behind + 1) % ahead
            if not behind:
                time.sleep(0.5)
    return path


def read_openings(path: str | None) -> list[str]:
    r"""Beginnings of prompts, one a line, with `\n` for a new line; the empty one where there is no file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path is not None else []
    return [line.replace("\\n", "\n") for line in lines if line.strip()] or [""]


class Writer:
    """The target, its tokenizer and its chat template, and the engine that it writes with."""

    def __init__(self, options: DistillOptions):
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.target, padding_side="left")
        if self.tokenizer.chat_template is None and not options.raw:
            raise ValueError(
                f"The tokenizer of {options.target} has no chat template. For a base model pass --raw, which takes "
                "prompts as they are."
            )
        self._template = functools.partial(self.tokenizer.apply_chat_template, tokenize=False, **options.template)
        if not options.raw:
            self._try_template()

    def _try_template(self) -> None:
        """Raises `ValueError` where it refuses the system message or the options, before the model is read."""
        try:
            around = self._render([{"role": "user", "content": _MARK}]).split(_MARK)
        except Exception as error:  # whatever a template may raise
            system = "--system and " if self.options.system else ""
            raise ValueError(
                f"The chat template of {self.options.target} refuses {system}a user's turn: {error}. "
                f"--template_options is {self.options.template_options}."
            ) from error
        if (self.options.self_prompts or self.options.second_turns) and len(around) != 2:
            raise ValueError(
                f"The chat template of {self.options.target} does not show the user's words once, as they are: "
                "--self_prompts and --second_turns cannot be written at it. Pass --prompts."
            )

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """Read when it is first asked for: after all that can be wrong without it."""
        options = self.options
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with torch.inference_mode(False):  # weights that may be used outside of it too
            return AutoModelForCausalLM.from_pretrained(options.target, dtype=options.dtype).to(device).eval()

    @functools.cached_property
    def eos(self) -> list[int]:
        eos = self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    @functools.cached_property
    def _engine(self) -> Callable:
        return make_engine(self.options.engine, self.model, self.options.slots)

    def _refuse_template_errors(self) -> None:
        """Where the template refuses the plainest chat, it would refuse all."""
        try:
            self._render([{"role": "user", "content": _MARK}])
        except TemplateError as error:
            system = "--system and " if self.options.system else ""
            raise ValueError(
                f"The chat template of {self.options.target} refuses {system}a user's turn: {error}. "
                f"--template_options is {self.options.template_options}."
            ) from error

    def _render(self, messages: list[dict], tools: list | None = None) -> str:
        if self.options.raw:
            return messages[-1]["content"]
        own = self.options.system if messages[0]["role"] != "system" else None
        system = [{"role": "system", "content": own}] if own else []
        return self._template(system + messages, tools=tools, add_generation_prompt=True)

    @functools.cached_property
    def _open_turn(self) -> str:
        """The template up to the user's words."""
        return self._before_question([])

    def _before_question(self, messages: list[dict], tools: list | None = None) -> str:
        """A chat up to the words that the user says next."""
        return self._render([*messages, {"role": "user", "content": _MARK}], tools).split(_MARK)[0]

    def write_prompts(self, opening: str, seed: int) -> list[str]:
        """One batch of prompts that begin with `opening`; those without an end, and very short ones, are left out."""
        torch.manual_seed(seed)
        copies = [self._tokens(self._open_turn + opening)] * self.options.batch_size
        questions = self._write_questions(copies, opening, temperature=1.0)
        return [text for text in questions if text is not None]

    def _write_questions(self, prompts: list[list[int]], opening: str, temperature: float) -> list[str | None]:
        """A user's words after each prompt, which ends where they begin; None where they have no end, or are short."""
        responses = self._generate(prompts, do_sample=True, temperature=temperature, max_new_tokens=128)
        texts = [
            opening + self.tokenizer.decode(response, skip_special_tokens=True).rstrip()
            if int(response[-1]) in self.eos
            else ""
            for response in responses
        ]
        return [text if len(text.strip()) >= 12 else None for text in texts]

    def answer(self, chats: list[Chat], seed: int, left_out: Counter | None = None) -> list[Row]:
        """A row for each place of each chat where the assistant is to speak, all before it being the row's prompt.

        Assistant's turns that a chat has are kept in what follows; where it has none, the target's own reply is.

        Args:
            left_out: takes the counts of what could not be answered, by reason; a chat ends there.
        """
        torch.manual_seed(seed)
        left_out = Counter() if left_out is None else left_out
        rows: list[Row] = []
        talks = every = [Talk(chat) for chat in chats]
        while talks := [talk for talk in talks if talk.advance()]:
            talks = self._reply(talks, rows, left_out)
        talks = [talk for talk in every if talk.messages[-1]["role"] == "assistant"]
        for _ in range(self.options.second_turns):
            talks = self._reply(self._ask(talks, left_out), rows, left_out)
        return rows

    def _reply(self, talks: list[Talk], rows: list[Row], left_out: Counter) -> list[Talk]:
        """Let the target speak in each of the talks; returns those that go on."""
        talks, prompts = self._prompts(talks, self._render, left_out)
        for talk, prompt, response in zip(talks, prompts, self._generate(prompts, **self.options.generation)):
            rows.append(Row(torch.cat([torch.tensor(prompt), response]), len(prompt)))
            talk.reply(self.tokenizer.decode(response, skip_special_tokens=True))
        return talks

    def _ask(self, talks: list[Talk], left_out: Counter) -> list[Talk]:
        """Let the target write the user's next turn of each of the talks; returns those where it did."""
        talks, prompts = self._prompts(talks, self._before_question, left_out)
        asked = []
        for talk, question in zip(talks, self._write_questions(prompts, "", _QUESTION_TEMPERATURE)):
            if question is None:
                left_out["second turn without an end"] += 1
                continue
            talk.messages.append({"role": "user", "content": question})
            asked.append(talk)
        return asked

    def _prompts(
        self, talks: list[Talk], render: Callable[..., str], left_out: Counter
    ) -> tuple[list[Talk], list[list[int]]]:
        """Those talks whose prompt can be read, and the prompts' tokens."""
        kept, prompts = [], []
        for talk in talks:
            try:
                tokens = self._tokens(render(talk.messages, talk.chat.tools))
            except TemplateError as error:
                left_out[f"refused by the chat template: {error}"] += 1
                continue
            if len(tokens) > self.options.max_prompt_tokens or not tokens:
                left_out["longer than max_prompt_tokens" if tokens else "empty prompt"] += 1
                continue
            kept.append(talk)
            prompts.append(tokens)
        return kept, prompts

    def opening_tokens(self, chat: Chat) -> list[int] | None:
        """The prompt of a chat's first reply; None where the chat template refuses it."""
        talk = Talk(chat)
        talk.advance()
        _, prompts = self._prompts([talk], self._render, Counter())
        return prompts[0] if prompts else None

    def _tokens(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt, add_special_tokens=self.options.raw).input_ids

    def _generate(self, prompts: list[list[int]], **options) -> list[Tensor]:
        """The response (R,) to each prompt, its end-of-sequence token included."""
        if not prompts:
            return []
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token_id = self.eos[0] if self.eos else 0
        ends = dict(eos_token_id=self.eos or None, pad_token_id=self.tokenizer.pad_token_id)
        return self._engine(prompts, {**options, **ends})


def count(folder: Path) -> dict[str, int]:
    """Shards, rows, and tokens in prompts and in responses."""
    totals = Counter(shards=0, rows=0, prompt_tokens=0, response_tokens=0)
    for path in shard_paths(folder):
        rows = read_shard(path)
        prompt_tokens = sum(row.prompt_length for row in rows)
        tokens = sum(len(row.tokens) for row in rows)
        totals.update(shards=1, rows=len(rows), prompt_tokens=prompt_tokens, response_tokens=tokens - prompt_tokens)
    return dict(totals)
