"""What drafters propose, and the candidates for a tree that it makes: merged, or the likeliest by all drafts.

A drafter gives each position of a block a distribution of its own, whatever tokens stand before it in the block. As
published, D²SD merges whole drafts, of which each has one token at a position. Under one such distribution the
likeliest paths are found best first (DDTree, arXiv 2604.12989). Where the second drafter goes on after some of them,
its distributions count below such a path: they know the path's tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .tree import Candidates, CandidateTree


@dataclass(frozen=True)
class Draft:
    """R drafts of each of B rows: at each of D positions after the anchor the W likeliest tokens, best first.

    The first `kept` positions of a draft are a prefix that it was given: column 0 holds that prefix's tokens, and the
    probabilities with which they were drafted.
    """

    tokens: Tensor  # (B, R, D, W)
    confidence: Tensor  # (B, R, D, W), the drafter's probability of each: Eq. 3 of arXiv 2606.04446
    log_probs: Tensor  # (B, R, D, W), its log, which does not underflow; -inf where a draft says nothing
    kept: Tensor  # (B, R)
    logits: Tensor | None = None  # (B, R, D, V'), over the confidence temperatures
    # (B, R, D, W, W): by a path head, the log probability of each token (last axis) after each of the position before
    # (last but one; the anchor in all places before position 0). `None`: whatever stands there.
    transitions: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tensor, confidence: Tensor, kept: Tensor | None = None) -> "Draft":
        """Drafts of one token a position: both (B, R, D); `kept` (B, R) is 0 by default."""
        kept = tokens.new_zeros(tokens.shape[:2]) if kept is None else kept
        return cls(tokens[..., None], confidence[..., None], confidence.log()[..., None], kept)

    @property
    def depth(self) -> int:
        return self.tokens.shape[2]

    @property
    def width(self) -> int:
        return self.tokens.shape[3]

    @property
    def best(self) -> Tensor:
        """(B, R, D), the likeliest token of each position, or the one that was kept."""
        return self.tokens[..., 0]

    @property
    def best_confidence(self) -> Tensor:
        """(B, R, D), its probability."""
        return self.confidence[..., 0]

    def cut(self, lengths: Tensor, owner: Tensor | None = None) -> "Draft":
        """Prefixes to draft on from: K of them, the first `lengths` (B, K) tokens of the drafts `owner` (B, K).

        Without `owner` all are of the first draft.
        """
        if owner is None:
            tokens, confidence = (x[:, :1].expand(-1, lengths.shape[1], -1) for x in (self.best, self.best_confidence))
        else:
            index = owner[..., None].expand(-1, -1, self.depth)
            tokens, confidence = (x.gather(1, index) for x in (self.best, self.best_confidence))
        return Draft.of(tokens, confidence, lengths)

    def after(self, prefixes: "Draft") -> "Draft":
        """The same drafts, as ones that went on from these prefixes."""
        size = min(self.depth, prefixes.depth)
        kept = torch.arange(size, device=self.tokens.device) < prefixes.kept[..., None]  # (B, R, size)
        filled = {}
        for name in ("tokens", "confidence", "log_probs"):
            filled[name] = mine = getattr(self, name).clone()
            mine[..., :size, 0] = torch.where(kept, getattr(prefixes, name)[..., :size, 0], mine[..., :size, 0])
        return replace(self, **filled, kept=prefixes.kept)

    def followed_by(self, other: "Draft") -> "Draft":
        """All drafts of both, as deep as the deeper one and as wide as the wider one."""
        depth, width = max(self.depth, other.depth), max(self.width, other.width)
        both = [draft.padded(depth, width) for draft in (self, other)]
        names = ("tokens", "confidence", "log_probs", "kept")
        joined = {name: torch.cat([getattr(draft, name) for draft in both], dim=1) for name in names}
        if any(draft.transitions is not None for draft in both):
            joined["transitions"] = torch.cat([draft.after_each() for draft in both], dim=1)
        return Draft(**joined)

    def padded(self, depth: int, width: int) -> "Draft":
        """Of that depth and width, with nothing said of what comes to it."""
        more = (0, width - self.width, 0, depth - self.depth)
        if not any(more):
            return self
        log_probs, transitions = pad(self.log_probs, more, value=-torch.inf), self.transitions
        if transitions is not None:
            transitions = pad(transitions, (0, more[1], *more), value=-torch.inf)
        return Draft(pad(self.tokens, more), pad(self.confidence, more), log_probs, self.kept, None, transitions)

    def after_each(self) -> Tensor:
        """(B, R, D, W, W), `transitions`; of a drafter without a path head the same after every token."""
        if self.transitions is not None:
            return self.transitions
        return self.log_probs[..., None, :].expand(*self.log_probs.shape, self.width)

    def chain(self) -> "Draft":
        """The token at each position that is likeliest after the one chosen before it; W is 1."""
        column = self.kept.new_zeros(*self.kept.shape, 1)  # (B, R, 1)
        columns, log_probs = [], []
        for after in self.after_each().unbind(2):  # (B, R, W, W)
            best = after.gather(2, column[..., None].expand(-1, -1, 1, self.width)).max(-1)
            column = best.indices
            columns.append(column)
            log_probs.append(best.values)
        chosen, scores = torch.stack(columns, dim=2), torch.stack(log_probs, dim=2)  # (B, R, D, 1)
        return Draft(self.tokens.gather(-1, chosen), scores.exp(), scores, self.kept, self.logits)


def merge(first: Draft, redrafts: Draft | None = None) -> Candidates:
    """The best token of each position of all drafts, shared prefixes once: D²SD's tree as published.

    A node's score is the log of the product of confidences along its path; where several drafts share the node, the
    highest counts.

    Args:
        first: the first blocks, R = 1.
        redrafts: whole drafts, kept tokens included.
    """
    drafts = first if redrafts is None else first.followed_by(redrafts)
    rows, count, depth, _ = drafts.tokens.shape
    at = torch.arange(depth, device=drafts.tokens.device)
    exists = (at < first.depth) | (torch.arange(count, device=at.device) > 0)[:, None]  # (R, D)
    owner, scores = _share(drafts.best, drafts.best_confidence.log(), exists)
    own = exists & (owner == torch.arange(count, device=at.device)[:, None])  # each node once
    # Depth by depth, and within a depth draft by draft: the parent of depth d stands among those of depth d - 1.
    above = pad(owner, (1, 0))[..., :-1] + count * (at - 1)
    parents = torch.where(at > 0, above, -1)
    by_depth = (x.transpose(1, 2).flatten(1) for x in (drafts.best, parents, scores, own))
    tokens, parents, scores, own = by_depth
    return Candidates(
        tokens=tokens,
        parents=parents,
        depths=(at + 1).repeat_interleave(count),
        scores=scores,
        ranks=torch.arange(count, device=at.device).repeat(depth).expand(rows, -1),
        exists=own,
        deepest=depth,
        chains=count,
    )


def _share(tokens: Tensor, log_confidence: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """The first draft that has each node too, and the node's score; all (B, R, D), `exists` (R, D)."""
    # Drafts r and s share their node at depth d if they agree at every depth up to d.
    shared = (tokens[:, :, None] == tokens[:, None]).cumprod(-1).bool()  # (B, R, R, D)
    shared &= exists[:, None] & exists
    # cummin: a scan must not round a child above its parent
    reached = log_confidence.cumsum(-1).cummin(-1).values
    return shared.int().argmax(2), torch.where(shared, reached[:, None], -torch.inf).amax(2)


def expand(drafts: Draft, budget: int, width: int | None = None) -> Candidates:
    """The likeliest nodes by all drafts, found level by level, at most `budget` - 1 in each.

    A path's probability is the product of its tokens' probabilities, each by the draft with the longest prefix on the
    path, and by a path head given the token before it. It never rises on the way down, so that the best nodes of all
    levels are among these.

    Args:
        drafts: the first blocks, then those that go on after prefixes of their paths.
        budget: nodes of the tree, the anchor included, at least 2.
        width: how many children a node has at most; by default as many as the drafts name.
    """
    rows, count, depth, named = drafts.tokens.shape
    width = named if width is None else min(width, named)
    device = drafts.tokens.device
    each = torch.arange(rows, device=device)[:, None]
    prefixes, ends = drafts.best[:, 1:], drafts.kept[:, 1:]  # (B, R - 1, D), (B, R - 1)
    score = drafts.log_probs.new_zeros(rows, 1)
    draft = each.new_zeros(rows, 1)  # whose tokens a node's children are
    place = each.new_zeros(rows, 1)  # a node's own among that draft's tokens of its depth
    on_path = torch.ones(rows, 1, count - 1, dtype=torch.bool, device=device)  # is it a node of that prefix?
    levels, first_parent = [], 0  # among the nodes of all levels, where the present parents begin
    for level in range(depth):
        log_probs, places = _children(drafts, draft, place, level, width)
        scores = score[..., None] + log_probs  # (B, n, width)
        best = scores.flatten(1).topk(min(budget - 1, scores[0].numel()), dim=1)  # (B, m)
        parent, score = best.indices // width, best.values
        place = places.flatten(1).gather(1, best.indices)
        draft = draft.gather(1, parent)
        token = drafts.tokens[each, draft, level, place]
        levels.append((token, parent + first_parent if level else parent - 1, score, draft))
        first_parent += scores.shape[1] if level else 0
        if count > 1:
            on_path = on_path[each, parent] & (prefixes[:, None, :, level] == token[..., None])
            ending = on_path & (ends[:, None] == level + 1)
            draft = torch.where(ending.any(-1), ending.int().argmax(-1) + 1, draft)
            place = torch.where(ending.any(-1), 0, place)  # where drafts have the tokens that they kept
    return _all_levels(levels)


def _children(drafts: Draft, draft: Tensor, place: Tensor, level: int, width: int) -> tuple[Tensor, Tensor]:
    """Log probabilities of the children of n nodes, and their places among a draft's tokens, both (B, n, width).

    Args:
        draft, place: (B, n), each node's draft, and its own place among that draft's tokens.
    """
    each = torch.arange(len(draft), device=draft.device)[:, None]
    if drafts.transitions is None:
        places = torch.arange(width, device=draft.device).expand(*draft.shape, width)
        return drafts.log_probs[each, draft, level, :width], places
    best = drafts.transitions[each, draft, level, place].topk(width, dim=-1)
    return best.values, best.indices


def _all_levels(levels: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Candidates:
    tokens, parents, scores, ranks = (torch.cat(part, dim=1) for part in zip(*levels))  # (B, all)
    depths = torch.cat([level[0].new_full(level[0].shape[1:], at + 1) for at, level in enumerate(levels)])
    return Candidates(tokens, parents, depths, scores, ranks, scores > -torch.inf, len(levels))


def count_nodes(budget: int, width: int, depth: int) -> int:
    """How many nodes, fillers included, a tree of `budget` nodes has from drafts of that width and depth."""
    level = nodes = 1
    for _ in range(depth):
        level = min(budget - 1, level * width)
        nodes += level
    return min(budget, nodes)


def likeliest_prefixes(anchor: Tensor, drafts: Draft, count: int, longest: int, width: int | None = None) -> Draft:
    """The K = `count` likeliest paths by all drafts, `longest` deep at most, to draft on from.

    Those that a draft has gone on from already are left out. Where fewer exist, the rest are of length 0. Their
    probabilities play no part in what follows and are 1.
    """
    known = drafts.kept.shape[1] - 1
    nodes = count + known  # so that enough are left, whichever are known
    depth = torch.full_like(anchor, longest)
    candidates = expand(drafts, nodes + 1, width)
    tree = CandidateTree.from_candidates(anchor, candidates, budget=nodes + 1, max_depth=depth, fixed_size=True)
    node = torch.arange(1, len(tree), device=anchor.device).expand(len(anchor), -1)  # (B, nodes)
    tokens = anchor.new_zeros(*node.shape, drafts.depth)
    for _ in range(min(longest, drafts.depth)):
        at = (tree.depths.gather(1, node) - 1)[..., None]  # -1 at the anchor
        token = torch.where(at >= 0, tree.tokens.gather(1, node)[..., None], tokens[..., :1])
        tokens = tokens.scatter(2, at.clamp(min=0), token)
        node = tree.parents.gather(1, node).clamp(min=0)
    lengths, scores = tree.depths[:, 1:], tree.scores[:, 1:]
    if known:
        gone_on = _same_prefixes(tokens, lengths, drafts.best[:, 1:], drafts.kept[:, 1:])
        best = torch.where(gone_on, -torch.inf, scores).topk(count, dim=1)
        tokens = tokens.gather(1, best.indices[..., None].expand(-1, -1, drafts.depth))
        lengths = torch.where(best.values > -torch.inf, lengths.gather(1, best.indices), 0)
    return Draft.of(tokens, torch.ones_like(tokens, dtype=drafts.confidence.dtype), lengths)


def _same_prefixes(tokens: Tensor, lengths: Tensor, others: Tensor, of_others: Tensor) -> Tensor:
    """(B, M): whether the first `lengths` (B, M) of `tokens` (B, M, D) are those of any of `others` (B, R, D)."""
    behind = torch.arange(tokens.shape[2], device=tokens.device) >= lengths[..., None, None]  # (B, M, 1, D)
    same = (tokens[:, :, None] == others[:, None]) | behind
    return (same.all(-1) & (lengths[..., None] == of_others[:, None])).any(-1)


def join(drafted: Candidates, proposed: Candidates) -> Candidates:
    """The candidates of drafts and of another source, each node once.

    Where both have a node, it is the draft's, and right unless both are wrong: what each thinks of it given its parent
    joins as independent evidence. All that stands below such a node gains as much as it does.

    Args:
        drafted, proposed: each with no node twice.
    """
    owner = _same_nodes(proposed, drafted)  # (B, M2), M1 for none
    count, size = drafted.tokens.shape[1], proposed.tokens.shape[1]
    shared = owner < count
    behind = torch.arange(count, count + size, device=owner.device).expand_as(owner)
    above = pad(torch.where(shared, owner, behind), (1, 0), value=-1).gather(1, proposed.parents + 1)
    parents = torch.cat([drafted.parents, above], dim=1)
    depths = torch.cat([each.depths.expand_as(each.scores) for each in (drafted, proposed)], dim=1)
    mine, other = (_given_parent(each) for each in (drafted, proposed))
    other_of_mine = pad(torch.zeros_like(mine), (0, 1)).scatter(1, owner, other)[:, :-1]  # (B, M1)
    given = torch.cat([_either(mine, other_of_mine), other], dim=1).log()
    exists = torch.cat([drafted.exists, proposed.exists & ~shared], dim=1)
    deepest = max(drafted.deepest, proposed.deepest)
    scores = torch.zeros_like(given)
    up = pad(parents + 1, (1, 0))
    for _ in range(deepest):  # the same additions for a node and below it: no child is rounded above its parent
        scores = pad(scores, (1, 0)).gather(1, up[:, 1:]) + given
    chains = None if drafted.chains is None or proposed.chains is None else drafted.chains + proposed.chains
    return Candidates(
        tokens=torch.cat([drafted.tokens, proposed.tokens], dim=1),
        parents=parents,
        depths=depths,
        scores=torch.where(exists, scores, -torch.inf),
        ranks=torch.cat([drafted.ranks, proposed.ranks], dim=1),
        exists=exists,
        deepest=deepest,
        chains=chains,
    )


def _either(one: Tensor, other: Tensor) -> Tensor:
    """What two sources say of a node, each (B, M) given its parent, 0 where one says nothing.

    Sources that agree are right more often than the surer of them is alone.
    """
    return 1 - (1 - one) * (1 - other)


def _same_nodes(these: Candidates, those: Candidates) -> Tensor:
    """(B, M1): for each of these M1 nodes the one of those M2 that stands for the same path, else M2."""
    depths = [each.depths.expand_as(each.tokens) for each in (these, those)]
    same = these.tokens[:, :, None] == those.tokens[:, None]
    same &= (depths[0][:, :, None] == depths[1][:, None]) & these.exists[:, :, None] & those.exists[:, None]
    same = pad(same, (1, 0, 1, 0))  # with the anchors, which are one
    same[:, 0, 0] = True
    up, other_up = (pad(each.parents + 1, (1, 0)) for each in (these, those))
    rows = torch.arange(len(same), device=same.device)[:, None, None]
    for _ in range(max(these.deepest, those.deepest).bit_length()):  # 1, 2, 4, ... ancestors agree too
        same = same & same[rows, up[:, :, None], other_up[:, None]]
        up, other_up = up.gather(1, up), other_up.gather(1, other_up)
    same = same[:, 1:, 1:]
    return torch.where(same.any(-1), same.int().argmax(-1), those.tokens.shape[1])


def _given_parent(candidates: Candidates) -> Tensor:
    """(B, M): each node's estimated probability, given its parent; 0 for what does not exist."""
    above = pad(candidates.scores, (1, 0)).gather(1, candidates.parents + 1)
    given = torch.where(candidates.exists, (candidates.scores - above).exp(), 0)
    return given.nan_to_num(0).clamp(max=1)
