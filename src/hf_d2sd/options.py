"""The options of a call, each declared once: `GenerationConfig`, commands, sweeps and docs take them from here."""

from collections.abc import Collection
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass, replace
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
        in_words=(None, "the pair's `tree_budget`; with `d2sd_auto` at least 64"),
        key="budget",
    )
    block_size: int = option(
        "γ, the first drafter's block; at most what it was made for. The second's block shrinks by as much",
        least=2,
        in_words=(None, "the first drafter's"),
        key="block",
    )
    second_block_size: int = 0  # γ₂, at least γ
    drafts: bool = True  # whether there is a drafter; without one the text so far is the only source
    levels: int = option(
        "drafts one after the other: from 3 on the second drafter goes on after its own re-drafts (the paper's third "
        "level), in wide trees after the K likeliest paths by all drafts before. K > 0 only",
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
        in_words=(None, "the pair's `tree_width`; with `d2sd_auto` 8 in place of 1"),
        key="width",
    )
    branch_source: str = option(
        '"samples": branches are draws from the first draft, without a second drafter; an ablation',
        default="second",
        choices=BRANCH_SOURCES,
    )
    context: int | None = option(
        "the most nodes that the text so far may propose: continuations of earlier occurrences of its last tokens, "
        "beside those of the drafters and under the same budget. 0: none. Not with d2sd_compile",
        default=None,
        least=0,
        in_words=("int ≥ 0", "as many as a tree has room for, in wide trees and without drafters; else 0"),
        key="context",
    )
    acceptance: str = option(
        'how tokens are accepted: "walk" follows the target\'s own choices, so that its text is never changed',
        default="walk",
        choices=POLICIES,
    )
    auto: bool = option(
        "each cycle drafts, and checks as many nodes, as pays by what that costs on this machine; "
        "`d2sd_num_branches` and `d2sd_tree_budget` are then the most. Recorded cycles choose among three shapes: "
        "plain, the first drafter alone, and all as the options or else the pair say. False: the latter in each cycle",
        default=False,
        in_words=(
            None,
            "on, unless one of `d2sd_num_branches`, `d2sd_tree_budget`, `d2sd_tree_width`, `d2sd_levels` "
            "and `d2sd_branch_source` is given",
        ),
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
        self._check_auto()
        self._check_width()
        self._check_context()
        if self.levels > 2 and not self.redrafts:
            raise ValueError(
                f"d2sd_levels is {self.levels}: a level more is for re-drafts of the second drafter; here "
                f"d2sd_num_branches is {self.num_branches} and d2sd_branch_source is {self.branch_source!r}."
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

    def _check_auto(self) -> None:
        if self.auto and (self.levels > 2 or not BRANCH_SOURCES[self.branch_source].redrafts):
            raise ValueError(
                f"d2sd_auto chooses each cycle's tree anew, and d2sd_levels is {self.levels}, d2sd_branch_source is "
                f"{self.branch_source!r}: leave these out, or set d2sd_auto to False."
            )

    def _check_context(self) -> None:
        if self.compile and (self.context or not self.drafts):
            raise ValueError(
                "d2sd_compile asks for cycles of fixed shapes, and what the text so far proposes is made on the host, "
                f"of any shape; here d2sd_context is {self.context}"
                f"{'' if self.drafts else ' and there is no drafter'}. Leave one of them out."
            )
        if not self.drafts and (self.num_branches or self.tree_budget is None):
            raise ValueError(
                f"An assistant without drafters has no branches and needs a budget; d2sd_num_branches is "
                f"{self.num_branches} and d2sd_tree_budget is {self.tree_budget}. Leave them out."
            )

    @property
    def context_nodes(self) -> int:
        """The most nodes that the text so far may propose."""
        if self.compile or self.context is None and self.drafts and self.tree_width == 1:
            return 0
        most = [limit for limit in (self.context, self.tree_budget and self.tree_budget - 1) if limit is not None]
        return min(most)

    @property
    def shapes(self) -> list["DecodingOptions"]:
        """What cycles of fixed shapes are chosen from, the smallest first: each lets one drafter more draft."""
        whole = replace(self, auto=False)
        if not self.auto or self.tree_budget == 1:
            return [whole]
        budget = self.tree_budget and max(self.tree_budget // 2, 2)
        alone = [replace(whole, num_branches=0, tree_budget=budget)] if self.redrafts else []
        return [replace(whole, num_branches=0, tree_budget=1), *alone, whole]

    @property
    def redrafts(self) -> bool:
        """Whether the second drafter has work."""
        return self.num_branches > 0 and BRANCH_SOURCES[self.branch_source].redrafts

    @property
    def depth(self) -> int:
        """The deepest that drafts make a tree; what the text so far proposes may be deeper."""
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


SHAPING = {"num_branches", "tree_budget", "tree_width", "levels", "branch_source"}  # options that say how trees are
MOST_NODES, WIDTH = 64, 8  # of trees that nobody said the size of


def _leave_open(chosen: dict, given: set[str]) -> None:
    """Of the pair's defaults for trees that are the same in each cycle, what still holds where each is chosen anew."""
    if "tree_budget" not in given:
        chosen["tree_budget"] = max(MOST_NODES, chosen["tree_budget"] or 0)
    if "tree_width" not in given and chosen["tree_width"] == 1:
        chosen["tree_width"] = WIDTH


def settle(assistant: D2SDAssistant, generation_config: GenerationConfig) -> DecodingOptions:
    """The call's options where given, else the assistant's.

    Raises:
        ValueError: for values out of range, or branches without a second drafter.
    """
    config, chosen, given = assistant.config, {}, set()
    drafts = assistant.first is not None
    for declared in option_fields():
        value = getattr(generation_config, PREFIX + declared.name, None)
        given |= {declared.name} if value is not None else set()
        if value is None and declared.metadata["of_pair"] is not None:
            value = getattr(config, declared.metadata["of_pair"])
        if value is not None or declared.default is MISSING:
            chosen[declared.name] = value
    chosen.setdefault("compile", assistant.compile_options is not None)
    chosen.setdefault("auto", not given & SHAPING)
    if chosen["auto"] is True and chosen["compile"] is False and drafts:
        _leave_open(chosen, given)
    first, second = config.first.block_size, config.second.block_size if config.second is not None else None
    block_size = first if chosen["block_size"] is None else chosen["block_size"]
    second_size = (second or first) - (first - block_size) if isinstance(block_size, int) else 0
    sizes = {"block_size": block_size, "second_block_size": second_size, "drafts": drafts}
    options = DecodingOptions(**{**chosen, **sizes})
    if options.block_size > first:
        raise ValueError(f"d2sd_block_size is {options.block_size}; the first drafter was made for at most {first}.")
    if options.redrafts and assistant.second is None:
        raise ValueError(
            f"d2sd_num_branches is {options.num_branches}, but the assistant has no second drafter. Set it to 0, or "
            "load a pair: D2SDAssistant.from_drafters(first, second)."
        )
    return options
