"""The decoding loop: prefill, then cycles of draft, select, redraft, tree, verify, accept and commit."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from . import acceptance
from .cache import per_row
from .choosing import Chooser, Choosers
from .context import ContextSource
from .costs import PASS
from .drafting import Drafter
from .followers import Followers
from .growing import State, grow
from .options import DecodingOptions
from .paying import Pace, Purse
from .target import Target, TargetPass
from .tree import CandidateTree, HostTree


def decode(
    batch: "Batch",
    prompt_passes: Iterable[TargetPass],
    observer: "Observer",
    cycles: "Callable[[Batch, list[int], Observer], None] | None" = None,
) -> None:
    """Decode until each row has ended. Afterwards its cache holds all tokens chosen for it but the last.

    Args:
        prompt_passes: what `target.prefill` yields.
        cycles: what decodes the batch from its rows' first tokens on: `run`, one cycle after the other, by default.
    """
    step, anchors = batch.begin(prompt_passes)  # prefill
    observer.begin(batch, step, anchors)
    anchors = batch.leave(anchors)
    if anchors:
        (cycles or run)(batch, anchors, observer)


def run(batch: "Batch", anchors: list[int], observer: "Observer") -> None:
    """Cycle after cycle, until each row has ended."""
    while anchors:
        anchors = cycle(batch, anchors, observer)


def cycle(batch: "Batch", anchors: list[int], observer: "Observer") -> list[int]:
    """One cycle; returns the anchors of the rows that go on."""
    tree = grow(batch.state(anchors))  # 1 draft, 2 select, 3 redraft, 4 tree: see `growing.paper`
    step = batch.target.verify(tree)  # 5 verify
    accepted = batch.accept(tree, step)  # 6 accept
    batch.commit(step, accepted)  # 7 commit
    observer.see(batch, tree, step, accepted)
    return batch.leave(accepted.anchors(anchors))


class Observer(Protocol):
    """What sees each cycle beside the method."""

    def begin(self, batch: "Batch", step: TargetPass, tokens: list[int]) -> None: ...

    def see(self, batch: "Batch", tree: CandidateTree, step: TargetPass, accepted: "Accepted") -> None: ...

    def count(self, accepted: "Accepted") -> None: ...  # of a cycle that `see` is not shown


@dataclass(frozen=True)
class Accepted:
    """What became of one cycle's trees, on the host, and the nodes that are kept, on the device."""

    trees: list[HostTree]  # by row
    paths: list[list[int]]  # by row (A,), accepted nodes, the anchor first; empty for a row that had ended before
    emitted: list[list[int]]  # by row (A,), the tokens that these led to, the bonus last
    nodes: Tensor | None = None  # (B, most A), the paths, filled up; not there after a pass over one token a row

    def anchors(self, before: list[int]) -> list[int]:
        """By row, the last committed token."""
        return [row[-1] if row else last for row, last in zip(self.emitted, before)]


@dataclass
class Batch:
    """The rows that still decode: the target and the drafters with their caches, and what chooses their tokens."""

    target: Target
    drafters: list[Drafter]  # first and second; the first alone for no branches
    choosers: Choosers
    options: DecodingOptions
    context: ContextSource | None = field(default=None, kw_only=True)  # the rows' texts so far
    followers: Followers | None = field(default=None, kw_only=True)  # the same, for drafters that read it
    pace: Pace | None = field(default=None, kw_only=True)  # what decides where the options leave it open
    manner: str = field(default="", kw_only=True)  # how the target chooses, see `paying.manner_of`
    purse: Purse = field(default_factory=Purse, kw_only=True)  # what trying may cost, where there is a choice

    def __post_init__(self) -> None:
        for drafter in self.drafters:
            drafter.followers = self.followers if drafter.reads_text else None

    def begin(self, prompt_passes: Iterable[TargetPass]) -> tuple[TargetPass, list[int]]:
        """Run the prompts, show them to the drafters, and let the target choose each row's first token."""
        for step in prompt_passes:
            for drafter in self.drafters:
                drafter.extend(step, self.target.positions)
        greatest = self.choosers.look(step.logits).tolist()
        for chooser, row in zip(self.choosers.active, greatest):
            self._let_draft(chooser.sequence[0].tolist())
            chooser.know(row)
        anchors = [chooser.choose(0) for chooser in self.choosers.active]
        self._let_draft(anchors)
        for text in self._texts:
            text.extend([[anchor] for anchor in anchors])
        return step, anchors

    @property
    def _texts(self) -> list[ContextSource | Followers]:
        """What follows the rows' texts."""
        return [text for text in (self.context, self.followers) if text is not None]

    def _let_draft(self, tokens: list[int]) -> None:
        """What the text says can be drafted from now on."""
        for drafter in self.drafters:
            drafter.words.add(tokens)

    def state(self, anchors: list[int]) -> State:
        """What the next cycle starts from."""
        return self._state(anchors)

    def _state(self, anchors: list[int], fixed_shapes: bool = False) -> State:
        on_device = per_row(anchors, self.target.device)
        rooms = self.choosers.rooms
        state = State(on_device, self.drafters, self.options, rooms, fixed_shapes, self.context, self.pace)
        if self.pace is not None:
            emitted = [chooser.length - self.choosers.prompt_length for chooser in self.choosers.active]
            self.pace.begin(emitted, max(self.target.positions), rooms)
        return state

    def accept(self, tree: CandidateTree, step: TargetPass) -> Accepted:
        """Let the target choose at the nodes that its choices lead to, by the acceptance policy of the options."""
        if self.pace is not None:
            self.pace.mark(PASS, len(tree))
        choices = self.choosers.look(step.logits).to(self.target.device)
        known = self.paths_ahead(tree, step, choices)
        accepted = self.walk(HostTree.transfer(tree, choices))  # the cycle's one transfer
        if known is None and not step.is_one_token:
            known = self._padded(accepted.paths)
        return replace(accepted, nodes=known)

    def walk(self, trees: list[HostTree]) -> Accepted:
        """Let the rows choose along their trees, whose nodes are not needed on the device."""
        walks = [self._walk(chooser, row) for chooser, row in zip(self.choosers.active, trees)]
        paths, emitted = ([walk[i] for walk in walks] for i in (0, 1))
        return Accepted(trees, paths, emitted)

    def _walk(self, chooser: Chooser, tree: HostTree) -> tuple[list[int], list[int]]:
        if chooser.is_finished():
            return [], []
        chooser.know(tree.choices)
        return acceptance.POLICIES[self.options.acceptance](tree, chooser)

    def paths_ahead(self, tree: CandidateTree, step: TargetPass, choices: Tensor) -> Tensor | None:
        """(B, A): the paths, if they are to be known before the host has seen a choice."""
        return None

    def _padded(self, paths: list[list[int]]) -> Tensor:
        width = self.path_width(paths)
        return torch.tensor([path + [0] * (width - len(path)) for path in paths], device=self.target.device)

    def path_width(self, paths: list[list[int]]) -> int:
        """What paths are filled up to."""
        return max(map(len, paths))

    def commit(self, step: TargetPass, accepted: Accepted) -> None:
        """Keep the accepted nodes in the target's cache, show drafters their features, and let the text go on."""
        counts = [len(path) for path in accepted.paths]
        self.target.commit(step, accepted.nodes, counts)
        for drafter in self.drafters:
            drafter.extend(step, self.target.positions, accepted.nodes, counts)
        self._let_draft([token for row in accepted.emitted for token in row])
        for text in self._texts:
            text.extend(accepted.emitted)
        if self.pace is not None:
            self.pace.end(list(map(len, accepted.emitted)))

    def leave(self, anchors: list[int]) -> list[int]:
        """Let finished rows leave the batch; returns the anchors of those that stay."""
        staying = self.choosers.staying()
        self.choosers.select(staying)
        if staying and len(staying) < len(anchors):
            self.target.select(staying)
            for drafter in self.drafters:
                drafter.select(staying)
            for text in self._texts:
                text.select(staying)
        return [anchors[at] for at in staying]
