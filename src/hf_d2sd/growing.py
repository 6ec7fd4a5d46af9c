"""How a cycle's tree is grown: one policy each, all of them functions of the state that a cycle starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import per_row
from .candidates import Draft, expand, join, likeliest_prefixes, merge
from .context import ContextSource
from .costs import FIRST, REST, SECOND
from .drafting import Drafter
from .paying import Pace
from .prefixes import select_deeper_prefixes, select_prefix_lengths
from .tree import Candidates, CandidateTree

if TYPE_CHECKING:
    from .options import DecodingOptions


@dataclass(frozen=True)
class State:
    """What a cycle starts from: the last committed tokens, and the drafters with what they know of the text."""

    anchors: Tensor  # (B,)
    drafters: list[Drafter]  # first and second; the first alone for no branches
    options: "DecodingOptions"
    # By row, how many tokens may still be emitted; `None`: no limit. (B,) where cycles do not ask the host.
    rooms: list[int] | Tensor | None = None
    fixed_shapes: bool = False  # whether all cycles must have tensors of the same shapes
    context: ContextSource | None = None  # the rows' texts so far, as a source of candidates
    pace: Pace | None = None  # what decides where the options leave it open

    @property
    def has_room(self) -> bool:
        """Whether some row may emit more than the target's own next token."""
        return self.fixed_shapes or self.rooms is None or max(self.rooms) > 1

    def draft(self, width: int = 1) -> Draft:
        """The first drafter's blocks after the anchors."""
        return self.drafters[0].draft(self.anchors, self.options.block_size, width)

    def select(self, draft: Draft, block_size: int) -> Draft:
        """The K prefixes of the first blocks that will most likely be all that is accepted of them."""
        return draft.cut(select_prefix_lengths(draft.best_confidence[:, 0], self.options.num_branches, block_size))

    def redraft(self, prefixes: Draft, width: int = 1) -> Draft:
        """The second drafter's blocks after these prefixes."""
        return self.drafters[1].redraft(self.anchors, prefixes, self.options.second_block_size, width)

    def propose(self) -> Candidates | None:
        """What the text so far would go on with; `None` where it says nothing."""
        nodes = self.options.context_nodes
        return self.context.propose(nodes, self.anchors.device) if self.context is not None and nodes else None

    def pool(self, drafted: Candidates | None = None) -> Candidates | None:
        """All that may stand in the tree: what is drafted, and what the text so far says; `None` for nothing."""
        proposed = self.propose()
        if drafted is None or proposed is None:
            return drafted if proposed is None else proposed
        return join(drafted, proposed)

    def grown(self, drafted: Candidates, fixed_size: bool = False) -> CandidateTree:
        """The best nodes by the drafts and the text so far."""
        pool = self.pool(drafted)
        assert pool is not None
        return self.tree(pool, fixed_size)

    @property
    def max_depth(self) -> Tensor | None:
        """(B,), how deep a tree may be; `None`: any depth."""
        return None if self.rooms is None else per_row(self.rooms, self.anchors.device) - 1

    def reach(self, candidates: Candidates | None) -> list[float]:
        """What `paying.trees` weighs: how likely the best, second best, ... node is reached, summed over the rows.

        Of rows that will take longest it counts for more, see `paying.weights`.
        """
        if candidates is None:
            return []
        exists = candidates.exists
        if self.max_depth is not None:
            exists = exists & (candidates.depths <= self.max_depth[:, None])
        reached = torch.where(exists, candidates.scores, -torch.inf).exp()
        best = reached.sort(dim=1, descending=True).values
        if self.pace is not None and len(best) > 1:
            best = best * best.new_tensor(self.pace.weights)[:, None]
        return best.sum(0).tolist()

    def tree(self, candidates: Candidates, fixed_size: bool = False, nodes: int | None = None) -> CandidateTree:
        """The best nodes: no more than `nodes`, or than the budget, none deeper than what may be emitted for it."""
        return CandidateTree.from_candidates(
            self.anchors,
            candidates,
            budget=self.options.tree_budget if nodes is None else nodes,
            max_depth=self.max_depth,
            fixed_size=fixed_size or self.fixed_shapes or self.anchors.device.type == "cuda",
        )


def paper(state: State) -> CandidateTree:
    """D²SD as published: re-draft where the first block will likely be rejected (Section 3.3 of arXiv 2606.04446)."""
    draft = state.draft()  # 1 draft
    prefixes = state.select(draft, state.options.second_block_size)  # 2 select
    branches = state.redraft(prefixes)  # 3 redraft
    return state.grown(merge(draft, branches))  # 4 tree


def levels(state: State) -> CandidateTree:
    """The same, and the second drafter goes on, level by level, where its own re-drafts will likely be rejected."""
    size = state.options.second_block_size
    draft = state.draft()
    branches = latest = state.redraft(state.select(draft, size))
    for _ in range(state.options.levels - 2):
        count = latest.kept.shape[1]
        owner, lengths = select_deeper_prefixes(latest.best, latest.best_confidence, latest.kept, count, size)
        latest = state.redraft(latest.cut(lengths, owner))
        branches = branches.followed_by(latest)
    return state.grown(merge(draft, branches))


def samples(state: State) -> CandidateTree:
    """The paper's ablation: branches are draws from the first draft's own distributions, without a second drafter."""
    draft = state.draft()
    prefixes = state.select(draft, state.options.block_size)
    return state.grown(merge(draft, state.drafters[0].sample(draft, prefixes)))


def chain(state: State) -> CandidateTree:
    """The first draft alone, as DFlash (arXiv 2602.06036) decodes."""
    return state.grown(merge(state.draft()))


def wide(state: State) -> CandidateTree:
    """The likeliest nodes by both drafters."""
    drafts, options = wide_drafts(state), state.options
    assert options.tree_budget is not None
    return state.grown(expand(drafts, options.tree_budget, options.tree_width), fixed_size=True)


def context(state: State) -> CandidateTree:
    """What the text so far says alone: no drafter runs."""
    proposed = state.propose()
    return plain(state) if proposed is None else state.tree(proposed)


def wide_drafts(state: State) -> Draft:
    """What a wide tree is chosen from: the second drafter goes on after the K likeliest paths; by levels, anew."""
    options, drafts = state.options, state.draft(state.options.tree_width)
    longest = options.second_block_size - 2  # a position is left to draft
    for _ in range(options.levels - 1 if options.redrafts else 0):
        prefixes = likeliest_prefixes(state.anchors, drafts, options.num_branches, longest, options.tree_width)
        drafts = drafts.followed_by(state.redraft(prefixes, options.tree_width))
    return drafts


def auto(state: State) -> CandidateTree:
    """What pays now, by what it costs here: nothing drafted, the first drafter alone, or both; see `paying.best`."""
    options, pace = state.options, state.pace
    assert pace is not None and options.tree_budget is not None
    width, budget = options.tree_width, options.tree_budget
    pool = state.pool()
    if pace.drafts(state.reach(pool), bool(state.drafters)):
        drafts = state.draft(width)
        pace.mark(FIRST)
        pool = state.pool(expand(drafts, budget, width))
        count = pace.branches(state.reach(pool))
        if count:
            prefixes = likeliest_prefixes(state.anchors, drafts, count, options.second_block_size - 2, width)
            pace.mark(REST)
            drafts = drafts.followed_by(state.redraft(prefixes, width))
            pace.mark(SECOND, count)
            pool = state.pool(expand(drafts, budget, width))
    nodes = pace.nodes(state.reach(pool))
    tree = plain(state) if pool is None or nodes == 1 else state.tree(pool, fixed_size=True, nodes=nodes)
    pace.mark(REST)
    return tree


def plain(state: State) -> CandidateTree:
    """Nothing drafted: plain decoding."""
    return CandidateTree.anchor_only(state.anchors)


@dataclass(frozen=True)
class BranchSource:
    """Who writes the branches of a tree of width 1."""

    policy: Callable[[State], CandidateTree]
    redrafts: bool  # whether the second drafter does


# By name, what `d2sd_branch_source` chooses among.
BRANCH_SOURCES = {"second": BranchSource(paper, redrafts=True), "samples": BranchSource(samples, redrafts=False)}


def policy_of(options: "DecodingOptions") -> Callable[[State], CandidateTree]:
    """The policy that a call's options name."""
    if options.tree_budget == 1:
        return plain
    if options.auto:
        return auto
    if not options.drafts:
        return context
    if options.tree_width > 1:
        return wide
    if options.num_branches == 0:
        return chain
    return levels if options.levels > 2 else BRANCH_SOURCES[options.branch_source].policy


def grow(state: State) -> CandidateTree:
    """The candidates after the anchors, by the policy of the call's options; at most as deep as there is room for."""
    return policy_of(state.options)(state) if state.has_room else plain(state)
