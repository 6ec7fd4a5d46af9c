"""The options of a call, each declared once: `GenerationConfig`, commands, sweeps and docs take them from here."""

from collections.abc import Collection
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from typing import Any, Optional

from transformers import GenerationConfig

from .acceptance import POLICIES
from .candidates import count_nodes
from .growing import BRANCH_SOURCES
from .modeling import D2SDAssistant

PREFIX = "d2sd_"  # of the names in `GenerationConfig`


def option(
    meaning: str,
    *,
    default: Any = MISSING,
    of_pair: str | None = None,
    least: int | None = None,
    choices: Collection[str] | None = None,
    in_words: tuple[str | None, str | None] = (None, None),
    key: str | None = None,
) -> Any:
    """A field of `DecodingOptions` that is an option of `generate`.

    Args:
        meaning: what `--help` and the docs say.
        default: where neither the call nor the pair says otherwise.
        of_pair: attribute of the pair's config that is the default.
        least: of an integer.
        choices: of a name.
        in_words: what the docs say of its values and of its default, where that does not follow from the rest.
        key: its name in the sweeps of a benchmark.
    """
    metadata = dict(meaning=meaning, of_pair=of_pair, least=least, choices=choices, key=key)
    return field(default=default, metadata={**metadata, "values": in_words[0], "shown_default": in_words[1]})


@dataclass(frozen=True)
class DecodingOptions:
    """What may differ from call to call.

    Raises:
        ValueError: for a value out of range, or ones that do not go together.
    """

    num_branches: int = option(
        "K, how many prefixes the second drafter re-drafts in each cycle. 0: the first drafter alone. Above 0 a pair "
        "without a second drafter is an error",
        of_pair="num_branches",
        least=0,
        key="K",
    )
    tree_budget: int | None = option(
        "the most nodes, the anchor included, that one pass of the target checks. 1 is plain decoding. The pair's may "
        "be unset: then a tree of width 1 keeps every node",
        of_pair="tree_budget",
        least=1,
        key="budget",
    )
    block_size: int = option(
        "γ, the first drafter's block; at most what it was made for. The second's block shrinks by as much",
        least=2,
        in_words=(None, "the first drafter's"),
        key="block",
    )
    second_block_size: int = 0  # γ₂, at least γ
    levels: int = option(
        "drafts one after the other: from 3 on the second drafter goes on after its own re-drafts (the paper's third "
        "level). Width 1 and K > 0 only",
        default=2,
        least=2,
        key="levels",
    )
    tree_width: int = option(
        "W, how many of a draft's likeliest tokens may stand at one place of the tree; 1 is D²SD as published. Above "
        "1 a budget must be set, and branches may not be samples",
        default=1,
        of_pair="tree_width",
        least=1,
        key="width",
    )
    branch_source: str = option(
        '"samples": branches are draws from the first draft, without a second drafter; an ablation',
        default="second",
        choices=BRANCH_SOURCES,
    )
    acceptance: str = option(
        'how tokens are accepted: "walk" follows the target\'s own choices, so that its text is never changed',
        default="walk",
        choices=POLICIES,
    )
    attention_backend: str | None = option(
        "which attention checks trees and drafts blocks; one that cannot run is an error",
        default=None,
        in_words=("a name of [the table](how-it-works.md#attention)", "the fastest that can run"),
    )
    compile: bool = option(
        "cycles of fixed shapes, [recorded once and replayed](how-it-works.md#compilation); needs `max_new_tokens` or "
        "`max_length`",
        default=False,
        in_words=(None, "whether `assistant.compile()` was called"),
        key="compile",
    )
    trace: bool = option("keep every cycle's tree in `last_stats.trace`", default=False, in_words=(None, "off"))

    def __post_init__(self):
        for declared in option_fields():
            _check(declared, getattr(self, declared.name))
        self._check_width()
        if self.levels > 2 and (self.tree_width > 1 or not self.redrafts):
            raise ValueError(
                f"d2sd_levels is {self.levels}: a level more is for re-drafts of the second drafter in trees of width "
                f"1; here d2sd_num_branches is {self.num_branches}, d2sd_branch_source is {self.branch_source!r} and "
                f"d2sd_tree_width is {self.tree_width}."
            )

    def _check_width(self) -> None:
        if self.tree_width > 1 and self.tree_budget is None:
            raise ValueError(
                f"d2sd_tree_width is {self.tree_width}: such a tree has no end of its own. Set d2sd_tree_budget, the "
                "number of nodes, 32 for example."
            )
        if self.tree_width > 1 and not BRANCH_SOURCES[self.branch_source].redrafts:
            raise ValueError(
                f"d2sd_branch_source is {self.branch_source!r} and d2sd_tree_width is {self.tree_width}: a tree of "
                "the likeliest tokens has no use for samples. Set d2sd_tree_width to 1."
            )

    @property
    def redrafts(self) -> bool:
        """Whether the second drafter has work."""
        return self.num_branches > 0 and BRANCH_SOURCES[self.branch_source].redrafts

    @property
    def depth(self) -> int:
        """The deepest a tree can be: tokens that a cycle can add to a row, the anchor aside."""
        return (self.second_block_size if self.redrafts else self.block_size) - 1

    @property
    def tree_size(self) -> int:
        """Nodes in a tree of fixed size, with fillers."""
        if self.tree_width > 1 and self.tree_budget is not None:
            return count_nodes(self.tree_budget, self.tree_width, self.depth)
        branches = min(self.num_branches, self.block_size, self.depth)
        every = 1 + self.depth * (1 + branches * (self.levels - 1))
        return every if self.tree_budget is None else min(self.tree_budget, every)


def _check(declared: Field, value: Any) -> None:
    name, least, choices = PREFIX + declared.name, declared.metadata["least"], declared.metadata["choices"]
    if choices is not None and value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {tuple(choices)}.")
    if declared.type is bool and value not in (True, False):
        raise ValueError(f"{name} is {value!r}; it must be True or False.")
    if least is None or (value is None and declared.type is not int):
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}.")


def option_fields() -> tuple[Field, ...]:
    """The fields of `DecodingOptions` that are options of `generate`."""
    return tuple(declared for declared in fields(DecodingOptions) if declared.metadata)


def pair_options() -> list[str]:
    """Names of those that a pair's config has a default for."""
    return [declared.name for declared in option_fields() if declared.metadata["of_pair"] is not None]


def register() -> None:
    """Let `generate(...)` and every `GenerationConfig` take the options, by their names with `d2sd_`."""
    for declared in option_fields():  # as class attributes they stay out of saved configs
        if not hasattr(GenerationConfig, PREFIX + declared.name):
            setattr(GenerationConfig, PREFIX + declared.name, None)


def sweep_keys() -> dict[str, str]:
    """By its key in a benchmark's sweep, each option that has one."""
    return {declared.metadata["key"]: declared.name for declared in option_fields() if declared.metadata["key"]}


def command_fields(*names: str) -> type:
    """A dataclass with these options as fields of a command, `None` where they are left out."""
    declared = {each.name: each for each in option_fields()}
    return make_dataclass("CommandFields", [(name, *_command_field(declared[name])) for name in names])


def _command_field(declared: Field) -> tuple[Any, Any]:
    words = f"{declared.metadata['meaning']}; default: {default_in_words(declared)}".replace("%", "%%")
    metadata: dict[str, Any] = {"help": words}
    if declared.metadata["choices"] is not None:
        metadata["choices"] = list(declared.metadata["choices"])
    return Optional[declared.type], field(default=None, metadata=metadata)  # noqa: UP045


def default_in_words(declared: Field) -> str:
    metadata = declared.metadata
    if metadata["shown_default"] is not None:
        return metadata["shown_default"]
    if metadata["of_pair"] is not None:
        return f"the pair's `{metadata['of_pair']}`"
    return f'`"{declared.default}"`' if isinstance(declared.default, str) else str(declared.default)


def values_in_words(declared: Field) -> str:
    metadata = declared.metadata
    if metadata["values"] is not None:
        return metadata["values"]
    if metadata["choices"] is not None:
        return ", ".join(f'`"{choice}"`' for choice in metadata["choices"])
    return "bool" if declared.type is bool else f"int ≥ {metadata['least']}"


def markdown_table() -> str:
    """The table of docs/api.md."""
    lines = ["| option | values | default | meaning |", "|---|---|---|---|"]
    for declared in option_fields():
        cells = f"`{PREFIX}{declared.name}`", values_in_words(declared), default_in_words(declared)
        lines.append(f"| {' | '.join(cells)} | {declared.metadata['meaning']} |")
    return "\n".join(lines)


def settle(assistant: D2SDAssistant, generation_config: GenerationConfig) -> DecodingOptions:
    """The call's options where given, else the assistant's.

    Raises:
        ValueError: for values out of range, or branches without a second drafter.
    """
    config, chosen = assistant.config, {}
    for declared in option_fields():
        value = getattr(generation_config, PREFIX + declared.name, None)
        if value is None and declared.metadata["of_pair"] is not None:
            value = getattr(config, declared.metadata["of_pair"])
        if value is not None or declared.default is MISSING:
            chosen[declared.name] = value
    chosen.setdefault("compile", assistant.compile_options is not None)
    first, second = config.first.block_size, config.second.block_size if config.second is not None else None
    block_size = first if chosen["block_size"] is None else chosen["block_size"]
    second_size = (second or first) - (first - block_size) if isinstance(block_size, int) else 0
    options = DecodingOptions(**{**chosen, "block_size": block_size, "second_block_size": second_size})
    if options.block_size > first:
        raise ValueError(f"d2sd_block_size is {options.block_size}; the first drafter was made for at most {first}.")
    if options.redrafts and assistant.second is None:
        raise ValueError(
            f"d2sd_num_branches is {options.num_branches}, but the assistant has no second drafter. Set it to 0, or "
            "load a pair: D2SDAssistant.from_drafters(first, second)."
        )
    return options
