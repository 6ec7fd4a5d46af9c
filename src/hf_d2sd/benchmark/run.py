"""`hf-d2sd bench`: answer every prompt with every strategy, in turn, and write down what happened."""

import json
import platform
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import tqdm

from .. import __version__
from ..decoding import buffer_size
from ..modeling import D2SDAssistant, D2SDConfig
from ..pairs import load_assistant, read_pair_config, refuse_missing_folder
from .measuring import Measurement, measure
from .options import BenchOptions
from .probing import probe
from .strategies import PLAIN, Models, Strategy, all_strategies
from .suites import Prompt, chat_text, read_suites, refuse_too_long

_DEEPEST = 16  # tokens that a tree may go beyond a text's end
ROWS, PROBES, RUN = "rows.jsonl", "probes.jsonl", "run.json"


@dataclass(frozen=True)
class Round:
    """One turn of one prompt, answered by all strategies."""

    prompt: Prompt
    turn: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.prompt.suite, self.prompt.id, self.turn


def bench(options: BenchOptions) -> dict:
    """Measure, then report; returns the strategies' speed-ups and acceptance lengths.

    Raises:
        ValueError: for what is wrong with the options, the prompts or the models' configs, before a model is loaded.
    """
    from .report import report  # late: it needs rich and matplotlib

    prompts = read_suites(options.prompts, options.max_samples)
    for name in (options.target, *options.drafters, *filter(None, [options.draft_lm])):
        refuse_missing_folder(name)
    config = AutoConfig.from_pretrained(options.target)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    drafter_config, given = read_drafters(options)
    known = all_strategies(**options.branching(drafter_config))
    strategies = options.chosen(known, given)

    def count_tokens(prompt: Prompt) -> int:
        answers = [""] * (len(prompt.turns) - 1)
        text = chat_text(tokenizer, list(prompt.turns), answers, options.system, options.template)
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    refuse_too_long(prompts, count_tokens, limit, options.max_new_tokens)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    begin_or_go_on(options, strategies)
    Runner(options, strategies, prompts, tokenizer, config).run()
    return report(options.out)


def read_drafters(options: BenchOptions) -> tuple[D2SDConfig | None, set[str]]:
    """The config of the drafters, without weights, and what they and the draft LM make possible."""
    given = set()
    if options.draft_lm is not None:
        AutoConfig.from_pretrained(options.draft_lm)
        given.add("draft_lm")
    if not options.drafters:
        return None, given
    config = read_pair_config(options.drafters)
    return config, given | ({"first", "second"} if config.second is not None else {"first"})


def begin_or_go_on(options: BenchOptions, strategies: list[Strategy]) -> None:
    """Note what the run is; one that was begun with other settings is not mixed with it.

    Raises:
        ValueError: naming the settings that differ.
    """
    path = options.out / RUN
    settings = options.settled()
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        differing = sorted(name for name in settings if settings[name] != before.get(name))
        if differing:
            raise ValueError(
                f"{options.out} holds a run with other settings: {', '.join(differing)} "
                f"({[before.get(name) for name in differing]} before, {[settings[name] for name in differing]} now). "
                "Name another folder."
            )
        return
    options.out.mkdir(parents=True, exist_ok=True)
    about = {s.name: {"about": s.about, "options": s.options, "ours": s.ours} for s in strategies}
    write_whole(path, {"settings": settings, "strategies": about, "environment": environment()})


def environment() -> dict:
    """What a reader must know of the machine and the software."""
    packages = {"hf_d2sd": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {
        "versions": {**packages, "python": platform.python_version()},
        "processor": processor_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "started": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Of the checkout that this package runs from; `None` where it was installed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


class Runner:
    """The models at work on all prompts."""

    def __init__(self, options: BenchOptions, strategies: list[Strategy], prompts: list[Prompt], tokenizer, config):
        self.options, self.strategies, self.tokenizer = options, strategies, tokenizer
        self.rounds = [Round(prompt, turn) for prompt in prompts for turn in range(len(prompt.turns))]
        dtype = getattr(torch, options.dtype)
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.target = AutoModelForCausalLM.from_pretrained(options.target, dtype=dtype).to(self.device).eval()
        draft_lm = None
        if options.draft_lm is not None:
            draft_lm = AutoModelForCausalLM.from_pretrained(options.draft_lm, dtype=dtype).to(self.device).eval()
        self.models = Models(load_drafters(options.drafters, dtype, self.device), draft_lm)
        self.rows = {tuple(row["key"]): row for row in read_rows(options.out / ROWS)}

    def run(self) -> None:
        """Measure what is not measured yet, then probe."""
        deadline = time.monotonic() + 60 * (self.options.stop_after or float("inf"))
        missing = [entry for entry in self.rounds if entry.key not in self.rows]
        probed = {tuple(row["key"]) for row in read_rows(self.options.out / PROBES)}
        unprobed = [entry for entry in self._to_probe() if entry.key not in probed]
        if missing or unprobed:
            self._warm_up()
        for entry in self._progress(missing, "prompts"):
            if time.monotonic() > deadline:
                return
            self.rows[entry.key] = row = self.measure_round(entry)
            append_line(self.options.out / ROWS, row)
        for entry in tqdm(unprobed, desc="probes", disable=None):
            if time.monotonic() > deadline:
                return
            append_line(self.options.out / PROBES, self.probe_round(entry))

    def measure_round(self, entry: Round) -> dict:
        """Every strategy's answer to one turn, in an order drawn for it, so that drift hits all alike."""
        input_ids = self.input_ids(entry)
        order = list(self.strategies)
        random.Random(f"{self.options.seed} {entry.key}").shuffle(order)
        results = {strategy.name: self._answer(strategy, input_ids) for strategy in order}
        plain = results[PLAIN].tokens
        measured = {
            strategy.name: self._described(results[strategy.name], plain, input_ids) for strategy in self.strategies
        }
        return {
            "key": entry.key,
            "task": entry.prompt.task,
            "prompt_tokens": input_ids.shape[1],
            "answer": self.tokenizer.decode(plain, skip_special_tokens=True),
            "order": [strategy.name for strategy in order],
            "strategies": measured,
        }

    def probe_round(self, entry: Round) -> dict:
        input_ids = self.input_ids(entry)
        set_seed(self.options.seed)
        probes = {
            s.name: asdict(probe(self.target, s, self.models, input_ids, self._arguments())) for s in self.strategies
        }
        return {"key": entry.key, "task": entry.prompt.task, "strategies": probes}

    def input_ids(self, entry: Round) -> torch.Tensor:
        """(1, L). The turns before it were answered by plain decoding."""
        suite, id_, turn = entry.key
        answers = [self.rows[suite, id_, before]["answer"] for before in range(turn)]
        turns = list(entry.prompt.turns[: turn + 1])
        text = chat_text(self.tokenizer, turns, answers, self.options.system, self.options.template)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(self.device)

    def _to_probe(self) -> list[Round]:
        """The first `probes` rounds of each task."""
        counts: dict[tuple[str, str], int] = {}
        chosen = []
        for entry in self.rounds:
            place = entry.prompt.suite, entry.prompt.task
            counts[place] = counts.get(place, 0) + 1
            if counts[place] <= self.options.probes:
                chosen.append(entry)
        return chosen

    def _warm_up(self) -> None:
        """A few tokens of each strategy; of a compiled one a whole answer for every size that its cache will have."""
        prompts = sorted((self.input_ids(e) for e in self.rounds if e.turn == 0), key=lambda ids: -ids.shape[1])
        by_size = {buffer_size(ids.shape[1] + self.options.max_new_tokens + _DEEPEST): ids for ids in prompts}
        for strategy in tqdm(self.strategies, desc="warm-up", disable=None):
            # Longest first: a static cache of Transformers keeps the greatest size that it ever had.
            for input_ids in [prompts[0], *by_size.values()] if strategy.compiled else prompts[:1]:
                new_tokens = self.options.max_new_tokens if strategy.compiled else self.options.warmup_tokens
                options = {**self._arguments(), "max_new_tokens": new_tokens}
                measure(self.target, strategy, self.models, input_ids, options)

    def _arguments(self) -> dict:
        options = {"max_new_tokens": self.options.max_new_tokens, "do_sample": self.options.temperature > 0}
        if self.options.temperature > 0:
            options |= {"temperature": self.options.temperature, "top_k": 0, "top_p": 1.0}
        pad = self.target.generation_config.pad_token_id
        if pad is None:
            eos = self.target.generation_config.eos_token_id
            options["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
        return options

    def _answer(self, strategy: Strategy, input_ids: torch.Tensor) -> Measurement:
        set_seed(self.options.seed)
        return measure(self.target, strategy, self.models, input_ids, self._arguments())

    def _described(self, result: Measurement, plain: list[int], input_ids: torch.Tensor) -> dict:
        row = {name: value for name, value in asdict(result).items() if name != "tokens"}
        row |= {"tokens": len(result.tokens), "decoded": result.decoded, "same": result.tokens == plain}
        if not row["same"] and not self.options.temperature:
            row["parts"] = self._parting(result.tokens, plain, input_ids)
        return row

    @torch.inference_mode()
    def _parting(self, tokens: list[int], plain: list[int], input_ids: torch.Tensor) -> dict:
        """Where a text leaves the plain one, and by how much the target prefers the plain token there."""
        at = next((i for i, (one, other) in enumerate(zip(tokens, plain)) if one != other), None)
        if at is None:
            return {"at": min(len(tokens), len(plain)), "gap": None}
        before = torch.tensor([plain[:at]], dtype=input_ids.dtype, device=input_ids.device)
        logits = self.target(torch.cat([input_ids, before], dim=1)).logits[0, -1].float()
        return {"at": at, "gap": float(logits[plain[at]] - logits[tokens[at]])}

    def _progress(self, missing: list[Round], what: str) -> Iterator[Round]:
        """The rounds under a bar that shows each strategy's speed-up so far."""
        from .summary import ratios

        with tqdm(total=len(self.rounds), initial=len(self.rounds) - len(missing), desc=what, disable=None) as bar:
            for entry in missing:
                yield entry
                bar.update()
                if hasattr(bar, "set_postfix"):
                    rows = list(self.rows.values())
                    names = [s.name for s in self.strategies if s.name != PLAIN]
                    speeds = {name: ratios(rows, name) for name in names}
                    bar.set_postfix({n: f"{sorted(v)[len(v) // 2]:.2f}x" for n, v in speeds.items() if v})


def load_drafters(names: list[str], dtype: torch.dtype, device: torch.device) -> D2SDAssistant | None:
    """A pair from one folder or id, or an assistant of a first drafter and perhaps a second."""
    if not names:
        return None
    return load_assistant(names, dtype).to(device)


def read_rows(path: Path) -> list[dict]:
    """The rows of a file; a last line that a kill cut off is not one, and is cut off for good."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.split("\n") if line]


def append_line(path: Path, row: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_whole(path: Path, content: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
