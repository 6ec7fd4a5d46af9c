"""The options of `hf-d2sd bench`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import refuse_absent_device
from ..options import command_fields, pair_options
from ..pairs import CONTEXT
from .strategies import PLAIN, WIDE_BUDGET, WIDTH, Strategy, all_strategies, find_strategy, grid

DTYPES = ("float32", "bfloat16", "float16")


if TYPE_CHECKING:
    TreeFields = Any
else:
    TreeFields = command_fields(*pair_options())


@dataclass(kw_only=True)
class BenchOptions(TreeFields):
    """Every strategy side by side on one's own model, prompts and hardware; a killed run goes on where it stopped."""

    target: str = field(metadata={"help": "folder or Hub id of the target"})
    prompts: list[Path] = field(
        metadata={"help": 'JSON lines, {"id", "task", "turns": [user turns]}, one file a suite'}
    )
    out: Path = field(metadata={"help": "folder for results and reports"})
    drafters: list[str] = field(
        default_factory=list, metadata={"help": "a pair, or a first drafter, or a first and a second: folders or ids"}
    )
    draft_lm: str | None = field(default=None, metadata={"help": "a small autoregressive LM, for `assisted`"})
    strategies: list[str] | None = field(
        default=None, metadata={"help": "names, or variants as in d2sd-wide:K=2,budget=32; default: all that can run"}
    )
    sweep: list[str] = field(
        default_factory=list, metadata={"help": "also every combination, as in budget=8,16,32 K=0,4 (of d2sd-wide)"}
    )
    max_samples: int | None = field(default=None, metadata={"help": "prompts of each task, evenly spread"})
    max_new_tokens: int = 128
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy"})
    system: str | None = field(default=None, metadata={"help": "system message of every chat"})
    template_options: str = field(default="{}", metadata={"help": "JSON options of the chat template"})
    dtype: str = field(default="bfloat16", metadata={"help": ", ".join(DTYPES)})
    device: str | None = field(default=None, metadata={"help": "default: a GPU if there is one"})
    threads: int | None = field(default=None, metadata={"help": "of torch on a CPU; default: as many as it takes"})
    warmup_tokens: int = field(default=16, metadata={"help": "each strategy writes so many before anything is timed"})
    probes: int = field(default=2, metadata={"help": "prompts of each task answered again under instruments"})
    stop_after: float | None = field(default=None, metadata={"help": "minutes; the same command then goes on"})
    seed: int = 0

    def __post_init__(self):
        self.out, self.prompts = Path(self.out), [Path(file) for file in self.prompts]
        leasts = dict(max_samples=1, max_new_tokens=2, temperature=0, num_branches=0, tree_budget=2, tree_width=2)
        for name, least in {**leasts, "threads": 1, "warmup_tokens": 2, "probes": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}.")
        refuse_absent_device(self.device)
        if not self.prompts:
            raise ValueError("Nothing to answer: pass --prompts FILE [FILE ...].")
        if self.drafters == CONTEXT:
            raise ValueError("drafters is context: that is a strategy, which needs no drafters. Leave them out.")
        if len(self.drafters) > 2:
            raise ValueError(f"drafters are a pair, or a first and a second one; got {len(self.drafters)}.")
        try:
            self.template = json.loads(self.template_options)
        except json.JSONDecodeError as error:
            raise ValueError(f"template_options is no JSON: {self.template_options!r} ({error}).") from error
        if not isinstance(self.template, dict):
            raise ValueError(f"template_options is {self.template_options!r}; it must be a JSON object.")
        self.chosen(all_strategies(), {"first", "second", "draft_lm"})  # names are wrong before a model is looked at

    def chosen(self, known: dict[str, Strategy], given: set[str]) -> list[Strategy]:
        """The strategies to run, plain decoding first.

        Args:
            given: which of "first", "second" and "draft_lm" there are.

        Raises:
            ValueError: for an unknown strategy, or one that lacks what it needs.
        """
        names = self.strategies
        if names is None:
            names = [name for name, strategy in known.items() if strategy.needs is None or strategy.needs in given]
        names = dict.fromkeys([PLAIN, *names, *grid(self.sweep)])
        strategies = [find_strategy(name, known) for name in names]
        for strategy in strategies:
            lacks = strategy.needs if strategy.options.get("num_branches") != 0 else strategy.needs and "first"
            if lacks is not None and lacks not in given:
                raise ValueError(f"{strategy.name} needs {_WAYS[lacks]}")
        return strategies

    def branching(self, config) -> dict[str, int]:
        """K, W and nodes: the command's where given, else the pair's, else the library's."""
        pair = {name: getattr(config, name, None) for name in pair_options()}
        return {
            "num_branches": _first(self.num_branches, pair["num_branches"], 4) or 4,
            "width": _first(self.tree_width, pair["tree_width"] if pair["tree_width"] != 1 else None, WIDTH),
            "budget": _first(self.tree_budget, pair["tree_budget"], WIDE_BUDGET),
        }

    def settled(self) -> dict:
        """What a run that goes on must have in common with the one before, as JSON."""
        changeable = {"out", "stop_after", "max_samples", "probes"}
        values = {name: value for name, value in asdict(self).items() if name not in changeable}
        for name in ("target", "drafters", "draft_lm", "prompts"):
            value = values[name]
            values[name] = [_shown(one) for one in value] if isinstance(value, list) else value and _shown(value)
        return values


def _shown(name: str | Path) -> str:
    """Of a file or folder its own name: where it lies is nobody's business. Hub ids stay as they are."""
    return Path(name).resolve().name if Path(name).exists() else str(name)


_WAYS = {
    "first": "a drafter: pass --drafters PAIR, or --drafters FIRST.",
    "second": "both drafters: pass --drafters PAIR, or --drafters FIRST SECOND.",
    "draft_lm": "a draft LM: pass --draft_lm FOLDER (`hf-d2sd train --role lm` makes one).",
}


def _first(*values):
    return next(value for value in values if value is not None)
