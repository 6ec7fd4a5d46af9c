"""`hf-d2sd bench`: answer every prompt with every strategy, in turn, and write down what happened."""

import functools
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import tqdm

from .. import records
from ..captured import buffer_size
from ..checks import refuse_unwritable_folder
from ..modeling import D2SDAssistant, D2SDConfig
from ..pairs import load_assistant, read_pair_config, refuse_missing_folder
from .machine import environment
from .measuring import Measurement, measure
from .options import BenchOptions
from .probing import probe
from .result import PROBES, ROWS, RUN
from .strategies import PLAIN, Models, Strategy, all_strategies
from .suites import Prompt, chat_text, read_suites, refuse_too_long
from .summary import ratios
from .writing import refuse_missing_packages, write_reports

_DEEPEST = 16  # tokens that a tree may go beyond a text's end


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
    refuse_missing_packages()
    refuse_unwritable_folder("--out", options.out)
    prompts = read_suites(options.prompts, options.max_samples)
    for name in (options.target, *options.drafters, *filter(None, [options.draft_lm])):
        refuse_missing_folder(name)
    config = AutoConfig.from_pretrained(options.target)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    drafter_config, given = read_drafters(options)
    strategies = options.chosen(all_strategies(**options.branching(drafter_config)), given)
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    refuse_too_long(prompts, functools.partial(_count_tokens, tokenizer, options), limit, options.max_new_tokens)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    about = {s.name: {"about": s.about, "options": s.options, "ours": s.ours} for s in strategies}
    run = {"settings": options.settled(), "strategies": about, "environment": environment()}
    records.begin(options.out / RUN, run, "settings")
    for name in (ROWS, PROBES):
        records.read(options.out / name)  # of a run that goes on: refused where it is damaged
    Runner(options, strategies, prompts, tokenizer, config).run()
    return write_reports(options.out)


def _count_tokens(tokenizer, options: BenchOptions, prompt: Prompt) -> int:
    answers = [""] * (len(prompt.turns) - 1)
    text = chat_text(tokenizer, list(prompt.turns), answers, options.system, options.template)
    return len(tokenizer(text, add_special_tokens=False).input_ids)


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
        self.rows = {tuple(row["key"]): row for row in records.read(options.out / ROWS)}

    def run(self) -> None:
        """Measure what is not measured yet, then probe."""
        deadline = time.monotonic() + 60 * (self.options.stop_after or float("inf"))
        missing = [entry for entry in self.rounds if entry.key not in self.rows]
        probed = {tuple(row["key"]) for row in records.read(self.options.out / PROBES)}
        unprobed = [entry for entry in self._to_probe() if entry.key not in probed]
        if missing or unprobed:
            self._warm_up()
        for entry in self._progress(missing, "prompts"):
            if time.monotonic() > deadline:
                return
            self.rows[entry.key] = row = self.measure_round(entry)
            records.append(self.options.out / ROWS, row)
        for entry in tqdm(unprobed, desc="probes", disable=None):
            if time.monotonic() > deadline:
                return
            records.append(self.options.out / PROBES, self.probe_round(entry))

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
