"""The ways of decoding that a benchmark compares, by name: each is a set of arguments for `generate`."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..compat import compiled_everywhere
from ..modeling import D2SDAssistant
from ..options import sweep_keys

PLAIN = "ar"
NO_BUDGET = 100_000  # nodes: more than any tree has
WIDE_BUDGET, WIDTH = 16, 8  # of wide trees, where neither the command nor the pair says otherwise
KEYS = sweep_keys()


@dataclass
class Models:
    """What strategies decode with, apart from the target."""

    assistant: D2SDAssistant | None = None
    draft_lm: object | None = None

    def __post_init__(self):
        first = self.assistant.first if self.assistant is not None else None
        self.first = first
        self.reused = D2SDAssistant.from_drafters(first, first) if first is not None else None
        self.context = D2SDAssistant.from_context()


@dataclass(frozen=True)
class Strategy:
    """One way of decoding.

    Args:
        needs: what must be given for it: nothing, "first", "second" or "draft_lm".
        arguments: from the models and `options`, the keyword arguments of `generate`.
        options: d2sd options of this strategy, without their `d2sd_`.
    """

    name: str
    about: str
    needs: str | None
    arguments: Callable[[Models, dict], dict]
    options: dict[str, int | str] = field(default_factory=dict)
    ours: bool = False  # decoded by this library's engine
    compiled: bool = False  # its passes run as compiled graphs

    def generate_arguments(self, models: Models) -> dict:
        return self.arguments(models, {f"d2sd_{name}": value for name, value in self.options.items()})


def _stock(**arguments) -> Callable[[Models, dict], dict]:
    return lambda models, options: arguments


def _compiled(models: Models, options: dict) -> dict:
    return {"cache_implementation": "static", "compile_config": compiled_everywhere()}


def _assisted(models: Models, options: dict) -> dict:
    return {"assistant_model": models.draft_lm}


def _native(models: Models, options: dict) -> dict:
    return {"assistant_model": models.first, "speculation_type": "dflash"}


def _pair(models: Models, options: dict) -> dict:
    return {"assistant_model": models.assistant, **options}


def _reused(models: Models, options: dict) -> dict:
    return {"assistant_model": models.reused, **options}


def _context(models: Models, options: dict) -> dict:
    return {"assistant_model": models.context, **options}


def all_strategies(num_branches: int = 4, width: int = WIDTH, budget: int = WIDE_BUDGET) -> dict[str, Strategy]:
    """Every strategy by its name.

    Args:
        num_branches: K of the strategies with branches.
        width, budget: W and nodes of the wide trees.
    """
    chains = {"num_branches": num_branches, "tree_width": 1, "tree_budget": NO_BUDGET}
    wide = {"tree_width": width, "tree_budget": budget, "context": 0}
    alone = {**chains, "num_branches": 0}
    listed = [
        Strategy(PLAIN, "plain generate, one token a pass", None, _stock()),
        Strategy("ar-compiled", "plain, static cache, torch.compile", None, _compiled, compiled=True),
        Strategy("prompt-lookup", "Transformers: n-grams of the prompt", None, _stock(prompt_lookup_num_tokens=10)),
        Strategy("context", "the text so far, as a tree", None, _context, {"tree_budget": budget}, ours=True),
        Strategy("assisted", "Transformers: a small autoregressive draft LM", "draft_lm", _assisted),
        Strategy("dflash-native", "Transformers: the first drafter, one chain", "first", _native),
        Strategy("dflash", "the first drafter alone, one chain", "first", _pair, alone, ours=True),
        Strategy(
            "resample",
            "branches drawn from the first draft",
            "first",
            _pair,
            {**chains, "branch_source": "samples"},
            ours=True,
        ),
        Strategy("reuse", "the first drafter re-drafts", "first", _reused, chains, ours=True),
        Strategy(
            "ddtree",
            "the first draft's likeliest paths (DDTree)",
            "first",
            _pair,
            {**wide, "num_branches": 0},
            ours=True,
        ),
        Strategy("d2sd", "D²SD as published: branches merged to a tree", "second", _pair, chains, ours=True),
        Strategy("d2sd-3", "D²SD with a third level", "second", _pair, {**chains, "levels": 3}, ours=True),
        Strategy(
            "d2sd-wide",
            "the likeliest paths by both drafters",
            "second",
            _pair,
            {**wide, "num_branches": num_branches},
            ours=True,
        ),
        Strategy(
            "d2sd-context",
            "the likeliest paths by both drafters and the text so far",
            "second",
            _pair,
            {**wide, "num_branches": num_branches, "context": budget},
            ours=True,
        ),
        Strategy("auto", "in each cycle what pays on this machine", "first", _pair, {"auto": True}, ours=True),
    ]
    return {strategy.name: strategy for strategy in listed}


def find_strategy(text: str, known: dict[str, Strategy]) -> Strategy:
    """A strategy by name, or a variant of one, as in "d2sd-wide:K=2,budget=32".

    Raises:
        ValueError: for an unknown name, a key that is no option, or a strategy that takes none.
    """
    name, _, settings = text.partition(":")
    if name not in known:
        raise ValueError(f"There is no strategy {name!r}; there are {', '.join(known)}.")
    strategy = known[name]
    if not settings:
        return strategy
    if not strategy.ours:
        raise ValueError(f"{text!r}: {name} is decoded by Transformers and takes no options.")
    options = dict(strategy.options)
    for setting in settings.split(","):
        key, _, value = setting.partition("=")
        if key not in KEYS or not value.isdigit():
            raise ValueError(f"{text!r}: {setting!r} must be KEY=NUMBER with a key of {', '.join(KEYS)}.")
        options[KEYS[key]] = int(value)
    return replace(strategy, name=text, options=options, compiled=bool(options.get("compile")))


def grid(sweep: list[str], base: str = "d2sd-wide") -> list[str]:
    """The variants of a sweep such as ["budget=8,16", "K=0,4"]: every combination, named as `find_strategy` reads.

    Raises:
        ValueError: for a part that is not KEY=NUMBER,NUMBER...
    """
    axes = []
    for part in sweep:
        key, _, values = part.partition("=")
        numbers = values.split(",")
        if key not in KEYS or not all(number.isdigit() for number in numbers):
            raise ValueError(f"A sweep is KEY=NUMBER,NUMBER... with a key of {', '.join(KEYS)}; got {part!r}.")
        axes.append([f"{key}={number}" for number in numbers])
    return [f"{base}:{','.join(settings)}" for settings in itertools.product(*axes)] if axes else []
