"""The decoding loop: prefill, then cycles of draft, select, redraft, tree, verify, accept and commit."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .acceptance import walk
from .choosing import Chooser, Choosers
from .drafting import Draft, Drafter
from .expansion import expand, likeliest_paths
from .prefixes import select_prefix_lengths
from .stats import D2SDStats
from .target import Target, TargetPass
from .tree import CandidateTree

BRANCH_SOURCES = ("second", "samples")


@dataclass(frozen=True)
class DecodingOptions:
    """What may differ from call to call.

    Raises:
        ValueError: for a value out of range.
    """

    num_branches: int  # K, at least 0
    tree_budget: int | None  # nodes in a tree, anchor included, at least 1; None: no limit
    block_size: int  # γ, at least 2
    second_block_size: int  # γ₂, at least γ
    tree_width: int = 1  # W, how many tokens of a draft may stand at one place of the tree; at least 1
    branch_source: str = "second"  # who writes the branches, one of BRANCH_SOURCES
    attention_backend: str | None = None  # a name of `hf_d2sd.attention`; `None`: the fastest that can run

    def __post_init__(self):
        for name, least in (("num_branches", 0), ("tree_budget", 1), ("block_size", 2), ("tree_width", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"d2sd_{name} is {value!r}; it must be an integer of at least {least}.")
        if self.branch_source not in BRANCH_SOURCES:
            raise ValueError(f"d2sd_branch_source is {self.branch_source!r}; it must be one of {BRANCH_SOURCES}.")
        if self.tree_width > 1 and self.tree_budget is None:
            raise ValueError(
                f"d2sd_tree_width is {self.tree_width}: such a tree has no end of its own. Set d2sd_tree_budget, the "
                "number of nodes, 32 for example."
            )
        if self.tree_width > 1 and self.branch_source != "second":
            raise ValueError(
                f"d2sd_branch_source is {self.branch_source!r} and d2sd_tree_width is {self.tree_width}: a tree of "
                "the likeliest tokens has no use for samples. Set d2sd_tree_width to 1."
            )


def decode(
    target: Target,
    drafters: list[Drafter],
    choosers: Choosers,
    options: DecodingOptions,
    stats: D2SDStats,
    prompt_passes: Iterable[TargetPass],
    emit: Callable[[list[int]], None],
) -> None:
    """Decode until each row has ended. Afterwards its cache holds all tokens chosen for it but the last.

    Args:
        drafters: first and second; the first alone for no branches.
        prompt_passes: what `target.prefill` yields.
        emit: given the first row's tokens of each cycle as they are committed.
    """
    tokens = begin(target, drafters, choosers, prompt_passes)
    stats.add_first_tokens(len(tokens))
    emit(tokens[:1])
    tokens = leave(target, drafters, choosers, tokens)
    while tokens:
        anchors = torch.tensor(tokens, device=target.device)
        trees = grow_tree(anchors, drafters, options, choosers.rooms)  # 1 draft, 2 select, 3 redraft, 4 tree
        step = target.verify(trees)  # 5 verify
        choices = choosers.look(step.logits).to(target.device)
        columns = torch.stack([trees.tokens, trees.parents, trees.depths, trees.ranks, trees.sources, choices], dim=1)
        rows = columns.tolist()  # the cycle's one transfer
        paths, emitted = zip(*(accept(*row) for row in zip(choosers.active, rows)))  # 6 accept
        nodes, counts = pad_paths(paths, target.device), [len(path) for path in paths]
        target.commit(nodes, counts)  # 7 commit
        for drafter in drafters:
            drafter.extend(step, target.positions, nodes, counts)
        for at, (chooser, path) in enumerate(zip(choosers.active, paths)):
            for node in path:
                chooser.record.add_hidden_states(step.hidden_states, at, node)
            stats.add_cycle(path, *rows[at][1:5])
        emit(emitted[0])
        tokens = leave(target, drafters, choosers, [row[-1] for row in emitted])


def begin(
    target: Target, drafters: list[Drafter], choosers: Choosers, prompt_passes: Iterable[TargetPass]
) -> list[int]:
    """Run the prompts, show them to the drafters, and let the target choose each row's first token."""
    for step in prompt_passes:
        for drafter in drafters:
            drafter.extend(step, target.positions)
    greatest = choosers.look(step.logits).tolist()
    for at, (chooser, row) in enumerate(zip(choosers.active, greatest)):
        chooser.know(row)
        chooser.record.add_hidden_states(step.hidden_states, at)
    return [chooser.choose(0) for chooser in choosers.active]


def accept(chooser: Chooser, columns: list[list[int]]) -> tuple[list[int], list[int]]:
    """One row's path (A,) and the tokens that are emitted for it (A,). `columns`: (6, N), as `decode` stacks them."""
    tokens, parents, *_, choices = columns
    chooser.know(choices)
    return walk(tokens, parents, chooser.choose, chooser.is_finished)


def pad_paths(paths: Sequence[list[int]], device: torch.device) -> Tensor:
    """(B, A): the rows' paths, filled up to the longest."""
    longest = max(map(len, paths))
    return torch.tensor([path + [0] * (longest - len(path)) for path in paths], device=device)


def leave(target: Target, drafters: list[Drafter], choosers: Choosers, tokens: list[int]) -> list[int]:
    """Let finished rows leave the batch; returns the anchors of those that stay."""
    staying = choosers.drop_finished()
    if staying and len(staying) < len(tokens):
        target.select(staying)
        for drafter in drafters:
            drafter.select(staying)
    return [tokens[at] for at in staying]


def grow_tree(
    anchors: Tensor, drafters: list[Drafter], options: DecodingOptions, rooms: list[int] | None
) -> CandidateTree:
    """Draft, select, redraft and merge: the candidates after the anchors (B,), in row b at most `rooms[b]` - 1 deep.

    `rooms` is how many tokens may still be emitted: the deepest node's own choice must be among them.
    """
    if options.tree_budget == 1 or (rooms is not None and max(rooms) == 1):
        return CandidateTree.anchor_only(anchors)
    draft = drafters[0].draft(anchors, options.block_size)
    max_depth = None if rooms is None else torch.tensor(rooms, device=anchors.device) - 1
    if options.tree_width > 1:
        return grow_wide_tree(anchors, draft, drafters, options, max_depth)
    tokens, confidence = draft.tokens[:, 0], draft.confidence[:, 0]
    branches = None
    if options.num_branches and options.branch_source == "samples":
        prefix_lengths = select_prefix_lengths(confidence, options.num_branches, options.block_size)
        branches = drafters[0].sample_branches(draft, prefix_lengths)
    elif options.num_branches:
        prefix_lengths = select_prefix_lengths(confidence, options.num_branches, options.second_block_size)
        branches = drafters[1].redraft(anchors, tokens, prefix_lengths, options.second_block_size)
    return CandidateTree.merge(anchors, tokens, confidence, branches, budget=options.tree_budget, max_depth=max_depth)


def grow_wide_tree(
    anchors: Tensor, draft: Draft, drafters: list[Drafter], options: DecodingOptions, max_depth: Tensor | None
) -> CandidateTree:
    """The likeliest nodes by both drafters: the second re-drafts after the K likeliest paths of the first."""
    guesses, paths = draft.guesses(options.tree_width), None
    if options.num_branches:
        longest = options.second_block_size - 2  # a position is left to draft
        paths = likeliest_paths(anchors, guesses, options.num_branches, longest)
        redraft = drafters[1].redraft_paths(anchors, paths, options.second_block_size)
        guesses = guesses.followed_by(redraft.guesses(options.tree_width))
    return expand(anchors, guesses, paths, budget=options.tree_budget, max_depth=max_depth)
