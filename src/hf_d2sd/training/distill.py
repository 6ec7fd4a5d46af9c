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
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import tqdm

from .. import records
from ..binding import tokenizer_fingerprint
from ..checks import refuse_absent_device, refuse_missing_file, refuse_unknown_dtype, refuse_unwritable_folder
from ..pairs import refuse_missing_folder
from .shards import Row, batched, read_rows, read_shard, refuse_missing_rows, shard_paths, write_shard

_MARK = "\u241f"  # stands for the user's words where the chat template is opened


@dataclass
class DistillOptions:
    """Write responses of a target to prompts, in shards; a run that was killed goes on where it stopped.

    The same command may run several times at once, on one device each: all write to the one folder.
    """

    target: str = field(metadata={"help": "folder or Hub id of the target"})
    out: Path = field(metadata={"help": "folder for the shards"})
    prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON lines with `turns` (user turns), `messages`, or `prompt`"},
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
    system: str | None = field(default=None, metadata={"help": "system message of every chat"})
    template_options: str = field(
        default="{}", metadata={"help": 'JSON options of the chat template, e.g. {"enable_thinking": true}'}
    )
    temperature: float = field(default=0.0, metadata={"help": "of responses; 0 is greedy"})
    max_new_tokens: int = field(default=512, metadata={"help": "of a response"})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "longer prompts are left out"})
    batch_size: int = field(default=64, metadata={"help": "chats side by side, and in a shard"})
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
        if not self.prompts and not self.self_prompts:
            raise ValueError("Nothing to answer: pass --prompts FILE, --self_prompts N, or both.")
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
        for file in self.prompts:
            refuse_missing_file("--prompts", file)
        refuse_missing_rows(map(Path, self.answered))

    @property
    def generation(self) -> dict:
        sampling = dict(do_sample=True, temperature=self.temperature) if self.temperature else dict(do_sample=False)
        return dict(max_new_tokens=self.max_new_tokens, **sampling)


def distill(options: DistillOptions) -> dict[str, int]:
    """Write all shards that are not there yet; returns counts of rows, tokens and missing shards.

    Raises:
        ValueError: for prompts that cannot be read, a target without a chat template, or a folder that was begun with
            other options.
    """
    started = time.monotonic()
    options.check_places()
    chats = read_chats(options.prompts, options.max_prompts, options.seed)
    writer = Writer(options)
    options.out.mkdir(parents=True, exist_ok=True)
    records.begin(options.out / "distill.json", _settings(options, tokenizer_fingerprint(writer.tokenizer)))
    chats += [[text] for text in write_prompts(writer)]
    chats = without_answered(without_repetitions(chats), options.answered, writer.opening_tokens)
    # Neighbours of like length share a batch; the batches come in random order, so that any part is a fair sample.
    chats.sort(key=lambda turns: (len(turns), len(turns[0]), turns))
    batches = list(enumerate(batched(chats, options.batch_size)))
    random.Random(options.seed).shuffle(batches)
    for index, batch in tqdm(batches, desc="shards", smoothing=0.05):
        if options.stop_after is not None and time.monotonic() - started > 60 * options.stop_after:
            break
        records.write_once(
            options.out / f"rows-{index:05d}.safetensors",
            lambda path, index=index, batch=batch: write_shard(path, writer.answer(batch, seed=options.seed + index)),
        )
    missing = sum(not (options.out / f"rows-{index:05d}.safetensors").exists() for index, _ in batches)
    return {**count(options.out), "missing_shards": missing}


def _settings(options: DistillOptions, tokenizer: str) -> dict:
    """What the shards of a folder are made of, as JSON."""
    free = {"out", "device", "stop_after"}
    return {name: value for name, value in asdict(options).items() if name not in free} | {"tokenizer": tokenizer}


def read_chats(paths: list[str], limit: int | None, seed: int) -> list[list[str]]:
    """The user turns of each line, in random order within a file.

    Raises:
        ValueError: naming file and line, where none of the known fields is there.
    """
    chats = []
    for path in map(Path, paths):
        found = [_user_turns(path, number, line) for number, line in records.read_numbered(path)]
        random.Random(seed).shuffle(found)
        chats += found[:limit]
    return chats


def _user_turns(path: Path, number: int, line: dict) -> list[str]:
    if "turns" in line:
        turns = line["turns"]
    elif "messages" in line:
        turns = [message["content"] for message in line["messages"] if message["role"] == "user"]
    else:
        turns = [line.get("prompt")]
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(
            f"{path}, line {number}: expected `turns`, `messages` or `prompt` with text of the user's; found "
            f"{sorted(line)}."
        )
    return turns


def without_repetitions(chats: list[list[str]]) -> list[list[str]]:
    """The first of those chats whose turns are equal but for case and white space."""
    first = {}
    for turns in chats:
        first.setdefault(tuple(" ".join(turn.casefold().split()) for turn in turns), turns)
    return list(first.values())


def without_answered(
    chats: list[list[str]], folders: list[str], opening_tokens: Callable[[list[str]], list[int]]
) -> list[list[str]]:
    """Those chats whose first prompt, as `opening_tokens` renders it, no row of the folders begins with."""
    answered = {row.tokens[: row.prompt_length].numpy().tobytes() for row in read_rows(*map(Path, folders))}
    return [turns for turns in chats if torch.tensor(opening_tokens(turns)).numpy().tobytes() not in answered]


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
    """The target, its tokenizer and its chat template."""

    def __init__(self, options: DistillOptions):
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.target, padding_side="left")
        if self.tokenizer.chat_template is None:
            raise ValueError(f"The tokenizer of {options.target} has no chat template.")
        self._template = functools.partial(self.tokenizer.apply_chat_template, tokenize=False, **options.template)
        self._try_template()

    def _try_template(self) -> None:
        """Raises `ValueError` where it refuses the system message or the options, before the model is read."""
        try:
            around = self._render([{"role": "user", "content": _MARK}]).split(_MARK)
        except Exception as error:  # whatever a template may raise
            raise ValueError(
                f"The chat template of {self.options.target} refuses a chat with --system and --template_options as "
                f"they are: {error}."
            ) from error
        if self.options.self_prompts and len(around) != 2:
            raise ValueError(
                f"The chat template of {self.options.target} does not show the user's words once, as they are: "
                "--self_prompts cannot be written at it. Pass --prompts."
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
        return [eos] if isinstance(eos, int) else list(eos or [self.tokenizer.eos_token_id])

    def _render(self, messages: list[dict]) -> str:
        system = [{"role": "system", "content": self.options.system}] if self.options.system else []
        return self._template(system + messages, add_generation_prompt=True)

    @functools.cached_property
    def _open_turn(self) -> tuple[str, str]:
        """The template around the user's words."""
        before, after = self._render([{"role": "user", "content": _MARK}]).split(_MARK)
        return before, after

    def write_prompts(self, opening: str, seed: int) -> list[str]:
        """One batch of prompts that begin with `opening`; those without an end, and very short ones, are left out."""
        text = self._open_turn[0] + opening
        torch.manual_seed(seed)
        copies = [text] * self.options.batch_size
        responses = self._generate(copies, do_sample=True, temperature=1.0, max_new_tokens=128)
        texts = [
            opening + self.tokenizer.decode(response, skip_special_tokens=True).rstrip()
            for response in responses
            if int(response[-1]) in self.eos
        ]
        return [text for text in texts if len(text.strip()) >= 12]

    def answer(self, chats: list[list[str]], seed: int) -> list[Row]:
        """A row for each turn of each chat, the turns before it and the target's replies being its prompt."""
        torch.manual_seed(seed)
        rows, open_chats = [], [(turns, []) for turns in chats]
        for turn in range(max(map(len, chats))):
            open_chats = [(turns, messages) for turns, messages in open_chats if turn < len(turns)]
            for turns, messages in open_chats:
                messages.append({"role": "user", "content": turns[turn]})
            prompts = [self._render(messages) for _, messages in open_chats]
            fits = [len(self._tokens(prompt)) <= self.options.max_prompt_tokens for prompt in prompts]
            open_chats = [chat for chat, fit in zip(open_chats, fits) if fit]
            prompts = [prompt for prompt, fit in zip(prompts, fits) if fit]
            if not prompts:
                break
            responses = self._generate(prompts, **self.options.generation)
            for prompt, response, (_, messages) in zip(prompts, responses, open_chats):
                tokens = torch.tensor(self._tokens(prompt))
                rows.append(Row(torch.cat([tokens, response]), len(tokens)))
                text = self.tokenizer.decode(response, skip_special_tokens=True)
                messages.append({"role": "assistant", "content": text})
        return rows

    def opening_tokens(self, turns: list[str]) -> list[int]:
        """The prompt of a chat's first reply."""
        return self._tokens(self._render([{"role": "user", "content": turns[0]}]))

    def _tokens(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def _generate(self, prompts: list[str], **options) -> list[Tensor]:
        """The response (R,) to each prompt, its end-of-sequence token included."""
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token_id = self.eos[0]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = self.model.generate(
            **inputs.to(self.model.device),
            **options,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.eos,
            cache_implementation="static",
            disable_compile=True,  # every batch has a width of its own: each would be compiled anew
        )
        responses = output[:, inputs.input_ids.shape[1] :].cpu()
        ends = torch.isin(responses, torch.tensor(self.eos))
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, responses.shape[1]).tolist()
        return [response[:length] for response, length in zip(responses, lengths)]


def count(folder: Path) -> dict[str, int]:
    """Shards, rows, and tokens in prompts and in responses."""
    totals = Counter(shards=0, rows=0, prompt_tokens=0, response_tokens=0)
    for path in shard_paths(folder):
        rows = read_shard(path)
        prompt_tokens = sum(row.prompt_length for row in rows)
        tokens = sum(len(row.tokens) for row in rows)
        totals.update(shards=1, rows=len(rows), prompt_tokens=prompt_tokens, response_tokens=tokens - prompt_tokens)
    return dict(totals)
