"""The decoding loop: prefill, then cycles of draft, select, redraft, tree, verify, accept and commit."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .acceptance import greedy_paths, walk
from .choosing import Chooser, Choosers
from .drafting import Draft, Drafter
from .expansion import Paths, count_nodes, expand, likeliest_paths
from .prefixes import select_deeper_prefixes, select_prefix_lengths
from .stats import D2SDStats
from .target import Target, TargetPass
from .tree import Branches, CandidateTree

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
    levels: int = 2  # drafts one after the other: from 3 on the second drafter goes on after its own re-drafts
    tree_width: int = 1  # W, how many tokens of a draft may stand at one place of the tree; at least 1
    branch_source: str = "second"  # who writes the branches, one of BRANCH_SOURCES
    attention_backend: str | None = None  # a name of `hf_d2sd.attention`; `None`: the fastest that can run
    compiler: Callable | None = None  # what makes a function a compiled one; then all shapes are fixed

    def __post_init__(self):
        leasts = {"num_branches": 0, "tree_budget": 1, "block_size": 2, "levels": 2, "tree_width": 1}
        for name, least in leasts.items():
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
        if self.levels > 2 and (self.tree_width > 1 or not self.redrafts):
            raise ValueError(
                f"d2sd_levels is {self.levels}: a level more is for re-drafts of the second drafter in trees of width "
                f"1; here d2sd_num_branches is {self.num_branches}, d2sd_branch_source is {self.branch_source!r} and "
                f"d2sd_tree_width is {self.tree_width}."
            )

    @property
    def redrafts(self) -> bool:
        """Whether the second drafter has work."""
        return self.num_branches > 0 and self.branch_source == "second"

    @property
    def depth(self) -> int:
        """The deepest a tree can be: tokens that a cycle can add to a row, the anchor aside."""
        return (self.second_block_size if self.redrafts else self.block_size) - 1

    @property
    def tree_size(self) -> int:
        """Nodes in a tree of fixed size, with fillers."""
        if self.tree_width > 1:
            return count_nodes(self.tree_budget, self.tree_width, self.depth)
        branches = min(self.num_branches, self.block_size, self.depth)
        every = 1 + self.depth * (1 + branches * (self.levels - 1))
        return every if self.tree_budget is None else min(self.tree_budget, every)


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
    with fixed_shapes(target, drafters, choosers, options) if tokens else contextlib.nullcontext():
        while tokens:
            anchors = torch.tensor(tokens, device=target.device)
            trees = grow_tree(anchors, drafters, options, choosers.rooms)  # 1 draft, 2 select, 3 redraft, 4 tree
            step = target.verify(trees)  # 5 verify
            choices = choosers.look(step.logits).to(target.device)
            known_paths = paths_ahead(target, trees, choices, options) if choosers.vectorised else None
            columns = trees.tokens, trees.parents, trees.depths, trees.ranks, trees.sources, choices
            rows = torch.stack(columns, dim=1).tolist()  # the cycle's one transfer
            paths, emitted = zip(*(accept(*row) for row in zip(choosers.active, rows)))  # 6 accept
            nodes, counts = pad_paths(paths, options, target.device, known_paths), [len(path) for path in paths]
            target.commit(nodes, counts)  # 7 commit
            for drafter in drafters:
                drafter.extend(step, target.positions, nodes, counts)
            for at, (chooser, path) in enumerate(zip(choosers.active, paths)):
                for node in path:
                    chooser.record.add_hidden_states(step.hidden_states, at, node)
                stats.add_cycle(path, *rows[at][1:5])
                if stats.trace is not None and path:
                    stats.add_trace(target.rows[at], rows[at][:5], trees.scores[at].tolist(), path, emitted[at])
            emit(emitted[0])
            anchors = [row[-1] if row else before for row, before in zip(emitted, tokens)]
            tokens = leave(target, drafters, choosers, anchors)


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
    """One row's path (A,) and the tokens that are emitted for it (A,). `columns`: (6, N), as `decode` stacks them.

    Both are empty for a row that had ended before.
    """
    if chooser.finished:
        return [], []
    tokens, parents, *_, choices = columns
    chooser.know(choices)
    return walk(tokens, parents, chooser.choose, chooser.is_finished)


def paths_ahead(target: Target, trees: CandidateTree, choices: Tensor, options: DecodingOptions) -> Tensor | None:
    """(B, depth + 1): the paths, before the host has seen a choice; `None` where shapes are not fixed."""
    if options.compiler is None:
        return None
    fields = trees.tokens, trees.parents, trees.depths, target.nodes.visible
    return options.compiler(greedy_paths)(*fields, choices, options.depth + 1).clone()  # CUDA graphs use it again


def pad_paths(
    paths: Sequence[list[int]], options: DecodingOptions, device: torch.device, known: Tensor | None = None
) -> Tensor:
    """(B, A): the rows' paths, filled up; where they are known on the device, these."""
    if known is not None:
        return known
    width = max(map(len, paths)) if options.compiler is None else options.depth + 1
    return torch.tensor([path + [0] * (width - len(path)) for path in paths], device=device)


@contextlib.contextmanager
def fixed_shapes(target: Target, drafters: list[Drafter], choosers: Choosers, options: DecodingOptions):
    """If there is a compiler, every cycle within has tensors of the same shapes: what is compiled once serves all.

    Rows then stay in the batch until all have ended, and each call's buffers have one of a few sizes.

    Raises:
        ValueError: without a limit of the length.
    """
    if options.compiler is None:
        yield
        return
    if choosers.rooms is None:
        raise ValueError("Compiled decoding needs a limit: pass max_new_tokens or max_length.")
    choosers.keeps_finished = True
    capacity = buffer_size(max(target.cache.lengths) + max(choosers.rooms) + options.depth + 1)
    workers = (target, *drafters)
    try:
        target.fix(capacity, options.tree_size, options.compiler)
        for drafter in drafters:
            drafter.fix(capacity, options.depth + 1, options.compiler)
        yield
    finally:
        for worker in workers:
            worker.unfix()


def buffer_size(tokens: int) -> int:
    """The fixed size of a cache for so many: one of a few, so that few graphs are compiled."""
    return next(size for size in (*(256 * 2**i for i in range(5)), -(-tokens // 4096) * 4096) if size >= tokens)


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
    fixed = options.compiler is not None
    if options.tree_budget == 1 or (rooms is not None and max(rooms) == 1 and not fixed):
        return CandidateTree.anchor_only(anchors)
    draft = drafters[0].draft(anchors, options.block_size)
    max_depth = None if rooms is None else torch.tensor(rooms, device=anchors.device) - 1
    if options.tree_width > 1:
        return grow_wide_tree(anchors, draft, drafters, options, max_depth)
    tokens, confidence = draft.tokens[:, 0], draft.confidence[:, 0]
    branches = None
    if options.redrafts:
        branches = redraft(anchors, tokens, confidence, drafters[1], options)
    elif options.num_branches:
        prefix_lengths = select_prefix_lengths(confidence, options.num_branches, options.block_size)
        branches = drafters[0].sample_branches(draft, prefix_lengths)
    return CandidateTree.merge(
        anchors,
        tokens,
        confidence,
        branches,
        budget=options.tree_budget,
        max_depth=max_depth,
        fixed_size=fixed or anchors.device.type == "cuda",
    )


def redraft(
    anchors: Tensor, tokens: Tensor, confidence: Tensor, second: Drafter, options: DecodingOptions
) -> Branches:
    """The second drafter's branches after prefixes of the first block (B, γ-1), then level by level after its own."""
    size = options.second_block_size
    prefix_lengths = select_prefix_lengths(confidence, options.num_branches, size)
    branches = second.redraft(anchors, tokens, prefix_lengths, size)
    if options.levels == 2:
        return branches
    kept, latest = prefix_lengths, branches.whole(tokens[:, None], confidence[:, None])
    branches = latest
    for _ in range(options.levels - 2):
        owner, kept = select_deeper_prefixes(latest.tokens, latest.confidence, kept, kept.shape[1], size)
        parents = [x.gather(1, owner[..., None].expand_as(x)) for x in (latest.tokens, latest.confidence)]
        draft = second.redraft_paths(anchors, Paths(parents[0], kept), size)
        latest = Branches(kept, draft.tokens, draft.confidence).whole(*parents)
        branches = branches.followed_by(latest)
    return branches


def grow_wide_tree(
    anchors: Tensor, draft: Draft, drafters: list[Drafter], options: DecodingOptions, max_depth: Tensor | None
) -> CandidateTree:
    """The likeliest nodes by both drafters: the second re-drafts after the K likeliest paths of the first."""
    guesses, paths = draft.guesses(options.tree_width), None
    if options.redrafts:
        longest = options.second_block_size - 2  # a position is left to draft
        paths = likeliest_paths(anchors, guesses, options.num_branches, longest)
        redraft = drafters[1].redraft_paths(anchors, paths, options.second_block_size)
        guesses = guesses.followed_by(redraft.guesses(options.tree_width))
    return expand(anchors, guesses, paths, budget=options.tree_budget, max_depth=max_depth)
