"""The decoding loop: prefill, then cycles of draft, select, redraft, tree, verify, accept and commit."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .acceptance import walk
from .choosing import Chooser
from .drafting import Drafter
from .prefixes import select_prefix_lengths
from .stats import D2SDStats
from .target import Target, TargetPass
from .tree import CandidateTree


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

    def __post_init__(self):
        for name, least in (("num_branches", 0), ("tree_budget", 1), ("block_size", 2)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"d2sd_{name} is {value!r}; it must be an integer of at least {least}.")


def decode(
    target: Target,
    drafters: list[Drafter],
    chooser: Chooser,
    options: DecodingOptions,
    stats: D2SDStats,
    prompt_passes: Iterable[TargetPass],
    emit: Callable[[list[int]], None],
) -> None:
    """Decode until a stopping criterion holds. Afterwards the cache holds all chosen tokens but the last.

    Args:
        drafters: first and second; the first alone for no branches.
        prompt_passes: what `target.prefill` yields.
        emit: given the tokens of each cycle as they are committed.
    """
    token = begin(target, drafters, chooser, prompt_passes)
    stats.add_first_token()
    emit([token])
    while not chooser.finished:
        anchor = torch.tensor(token, device=target.device)
        tree = grow_tree(anchor, drafters, options, chooser.room)  # 1 draft, 2 select, 3 redraft, 4 tree
        step = target.verify(tree)  # 5 verify
        choices = chooser.look(step.logits).to(target.device)
        columns = torch.stack([tree.tokens, tree.parents, tree.depths, tree.ranks, tree.sources, choices])
        tokens, parents, depths, ranks, sources, choices = columns.tolist()  # the cycle's one transfer
        chooser.know(choices)
        path, emitted = walk(tokens, parents, chooser.choose, chooser.is_finished)  # 6 accept
        nodes = torch.tensor(path, device=target.device)
        target.commit(nodes)  # 7 commit
        for drafter in drafters:
            drafter.extend(step, target.position, nodes)
        for node in path:
            chooser.record.add_hidden_states(step.hidden_states, node)
        stats.add_cycle(path, depths, ranks, sources)
        token = emitted[-1]
        emit(emitted)


def begin(target: Target, drafters: list[Drafter], chooser: Chooser, prompt_passes: Iterable[TargetPass]) -> int:
    """Run the prompt, show it to the drafters, and let the target choose the first token."""
    for step in prompt_passes:
        for drafter in drafters:
            drafter.extend(step, target.position)
    chooser.know(chooser.look(step.logits).tolist())
    chooser.record.add_hidden_states(step.hidden_states)
    return chooser.choose(0)


def grow_tree(anchor: Tensor, drafters: list[Drafter], options: DecodingOptions, room: int | None) -> CandidateTree:
    """Draft, select, redraft and merge: the candidates after the anchor (), at most `room` - 1 deep.

    `room` is how many tokens may still be emitted: the deepest node's own choice must be among them.
    """
    if room == 1 or options.tree_budget == 1:
        return CandidateTree.anchor_only(anchor)
    draft = drafters[0].draft(anchor, options.block_size)
    tokens, confidence = draft.tokens[0], draft.confidence[0]
    branches = None
    if options.num_branches:
        prefix_lengths = select_prefix_lengths(confidence, options.num_branches, options.second_block_size)
        branches = drafters[1].redraft(anchor, tokens, prefix_lengths, options.second_block_size)
    max_depth = None if room is None else room - 1
    return CandidateTree.merge(anchor, tokens, confidence, branches, budget=options.tree_budget, max_depth=max_depth)
