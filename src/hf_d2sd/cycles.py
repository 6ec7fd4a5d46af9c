"""A cycle as one function of tensors of fixed shapes: nothing in it asks the host, so that it can be recorded whole.

The pieces are those of every cycle. Their twins here differ in one thing: lengths and positions, which elsewhere are
integers of the host, are tensors of the device, made at the start of a cycle from where the call's cycles began
(`Origin`) and how far each row has come since (`CycleState.gained`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .acceptance import greedy_paths
from .cache import Place, TreeCache, TreeLayer, empty_buffer, move
from .candidates import Draft
from .captured import FixedLayer
from .compat import LogitsProcessorList
from .drafting import ContextPlace, DraftContext, Drafter
from .followers import CycleFollowers
from .growing import State, chain, grow, levels, paper, plain, samples, wide
from .options import DecodingOptions
from .target import Target, TargetPass
from .tree import CandidateTree, HostTree
from .vocabulary import MOST_WORDS, CallWords

POLICIES = (paper, levels, samples, wide, chain, plain)  # that ask the host nothing


@dataclass(frozen=True)
class Origin:
    """Where the cycles of a call began, by row: tensors that cycles read alone."""

    positions: Tensor  # (B,), of the anchors
    rooms: Tensor  # (B,), how many tokens could be emitted
    stored: dict[str, Tensor]  # by layer type (B,), tokens in the target's cache
    read: tuple[Tensor, ...]  # by drafter (B,), tokens that it knew: in its cache and waiting
    ends: Tensor  # (E,), the tokens that end a row
    axes: Tensor | None  # (A, B), what rotary positions of several axes are ahead, see `Target`

    def tensors(self) -> list[Tensor]:
        fields = [self.positions, self.rooms, *self.stored.values(), *self.read, self.ends]
        return fields if self.axes is None else [*fields, self.axes]


@dataclass(frozen=True)
class CycleState:
    """What a cycle starts from and leaves behind, of B rows, beside keys and values, which stay in their buffers."""

    anchors: Tensor  # (B,), the last committed tokens
    gained: Tensor  # (B,), tokens committed since these cycles began
    alive: Tensor  # (B,) bool; a row that has ended gains nothing more
    waiting: tuple[Tensor, ...]  # by drafter (B, S, F), features of the newest committed tokens, which it has not read
    counts: tuple[Tensor, ...]  # by drafter (B,), how many of these are a row's own: the first ones
    report: Tensor  # (B, 6, N), the fields of `HostTree`: what the last cycle's tree was, and what the target chose

    def tensors(self) -> list[Tensor]:
        return [self.anchors, self.gained, self.alive, *self.waiting, *self.counts, self.report]


class CycleLayer(FixedLayer):
    """Slots for the tokens of several calls, one after the other."""

    lengths: Any = None  # (B,), once a cycle has begun

    @classmethod
    def like(cls, layer: TreeLayer, capacity: int, nodes: int) -> "CycleLayer":
        """An empty one for what such a layer holds, with room for passes of so many nodes."""
        blank = cls(layer.window)
        blank.capacity, blank.is_initialized = capacity, layer.is_initialized
        if layer.is_initialized:
            blank.dtype, blank.device = layer.dtype, layer.device
            blank._buffers = [empty_buffer(old, capacity + nodes).zero_() for old in layer._buffers]
        return blank

    def load(self, layer: TreeLayer) -> None:
        """Hold what another does, and zeros behind it: what is no number would not be hidden by a mask."""
        for buffer, old in zip(self._buffers, layer._buffers):
            buffer.zero_()
            buffer[:, :, : layer.length] = old[:, :, : layer.length]

    def hand_to(self, layer: TreeLayer, lengths: list[int]) -> None:
        """Let another hold each row's first `lengths[b]` tokens."""
        if self.is_initialized:
            layer._reserve(max(lengths))
            for buffer, new in zip(layer._buffers, self._buffers):
                buffer[:, :, : max(lengths)] = new[:, :, : max(lengths)]
            layer.set_lengths(lengths)

    def begin(self, lengths: Tensor) -> None:
        """Of a cycle: how many tokens each row holds (B,)."""
        self.lengths = lengths

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        assert self.slots is not None
        self._write(self.slots, key_states, value_states)
        keys, values = (buffer[:, :, : self.slots_end] for buffer in self._buffers)
        return keys, values


class CycleCache(TreeCache):
    """Such layers."""

    @classmethod
    def like(cls, cache: TreeCache, capacity: int, nodes: int) -> "CycleCache":
        blank = cls(cache.config)
        blank.layers = [CycleLayer.like(layer, capacity, nodes) for layer in cache.layers]
        return blank

    @property
    def capacity(self) -> int:
        return self.layers[0].capacity

    def by_type(self) -> dict[str, CycleLayer]:
        return super().by_type()

    def load(self, cache: TreeCache) -> None:
        for layer, other in zip(self.layers, cache.layers):
            layer.load(other)

    def hand_to(self, cache: TreeCache, lengths: list[int]) -> None:
        """Let another cache hold each row's first `lengths[b]` tokens."""
        for layer, other in zip(self.layers, cache.layers):
            layer.hand_to(other, lengths)

    def keep(self, places: dict[str, Place], nodes: Tensor, counts) -> None:
        """Move the nodes (B, A) behind each row's own tokens; those beyond its count will be written over."""
        every = torch.arange(nodes.shape[1], device=nodes.device)
        for layer_type, place in places.items():
            layers = [layer for layer, name in zip(self.layers, self.layer_types) if name == layer_type]
            buffers = [buffer for layer in layers for buffer in layer._buffers]
            move(buffers, place.start + nodes, place.ends(nodes.device)[:, None] + every)


class CycleContext(DraftContext):
    """A drafter's context: before a cycle's first draft it takes in the features that wait, before others nothing.

    Where a cycle does not draft, they wait on, with those of the tokens that it commits behind them.
    """

    cache: CycleCache
    positions: Any  # (B,), once a cycle has begun

    def begin(self, positions: Tensor, known: Tensor, features: Tensor, counts: Tensor) -> None:
        """Of a cycle.

        Args:
            positions: (B,), of the anchors; known: (B,), tokens that it knows, those that wait included.
            features: (B, S, F), what waits; counts: (B,), how many of these are a row's own.
        """
        self.positions, self.known, self.incoming = positions, known, (features, counts)
        self.size = features.shape[1]

    def extend(self, features: Tensor, positions, counts) -> None:
        before, own = self.incoming
        if not before.shape[1]:  # they were read
            self.gained = nn.functional.pad(features, (0, 0, 0, self.size - features.shape[1])), counts
            return
        at = own[:, None] + torch.arange(features.shape[1], device=own.device)
        self.gained = before.scatter(1, at[..., None].expand_as(features), features), own + counts

    def open(self, rows: int, size: int) -> ContextPlace:
        features, counts = self.incoming
        self.incoming = features[:, :0], torch.zeros_like(counts)
        start, width = self.cache.capacity, features.shape[1]
        before = self.known - counts
        slots = before[:, None] + torch.arange(width, device=before.device)
        blocks = torch.arange(start, start + size, device=before.device).expand(rows, -1)
        self.cache.place(torch.cat([slots, blocks], dim=1), start + size)
        return ContextPlace(features, counts, Place(start, self.known))

    def close(self, place: ContextPlace) -> None:
        pass


class CycleWords(CallWords):
    """A call's own tokens in rows of a fixed number, of which those without a token yet are never drafted."""

    def __init__(self, words: CallWords):
        words._gather()
        self.__dict__.update(vars(words))
        if self._absent is not None:
            weight, bias = self._head.weight, self._head.bias
            self._ids = torch.zeros(MOST_WORDS, dtype=torch.long, device=weight.device)
            self.rows = weight.new_zeros(MOST_WORDS, weight.shape[1])
            self._bias = None if bias is None else bias.new_zeros(MOST_WORDS)
            self._unused = torch.ones(MOST_WORDS, dtype=torch.bool, device=weight.device)
            self._read = self._reader(self.rows, self._bias)

    def load(self, words: CallWords) -> None:
        """Those of a call, which adds to them from now on."""
        if words._absent is None:
            return
        self._absent, self.count = bytearray(words._absent), 0
        self._unused.fill_(True)
        self._put(words.ids.tolist())
        self.count = words.count

    def _put(self, new: list[int]) -> None:
        assert self.rows is not None
        here = slice(self.count, self.count + len(new))
        self._ids[here] = torch.tensor(new, dtype=torch.long, device=self._ids.device)
        self.rows[here] = self._head.weight.detach()[self._ids[here]]
        if self._bias is not None:
            self._bias[here] = self._head.bias.detach()[self._ids[here]]
        self._unused[here] = False

    def logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        if self._read is None:
            return logits
        own = self._read(hidden).to(logits).masked_fill(self._unused.to(logits.device), -torch.inf)
        return torch.cat([logits, own], dim=-1)


class CycleDrafter(Drafter):
    """A drafter with such a context; its own draws are of torch's generator, which a graph knows how to use."""

    context: CycleContext
    words: CycleWords

    @classmethod
    def like(cls, drafter: Drafter, target, cache: CycleCache, backend: str | None) -> "CycleDrafter":
        twin = cls(drafter.model, target, CycleContext(cache), backend)
        twin.words, twin.run = CycleWords(twin.words), drafter.model  # the same for all calls, see `CycleTarget`
        return twin

    def sample(self, draft: Draft, prefixes: Draft) -> Draft:
        assert draft.logits is not None
        probabilities = draft.logits[:, 0].softmax(-1)  # (B, γ-1, V')
        each = probabilities[:, None].expand(-1, prefixes.kept.shape[1], -1, -1)  # (B, K, γ-1, V')
        drawn = draw(each)
        confidence = each.gather(-1, drawn[..., None])[..., 0]
        tokens = self._target_tokens(drawn, draft.tokens.device)
        return Draft.of(tokens, confidence.to(tokens.device)).after(prefixes)


class CycleTarget(Target):
    """The target with such a cache."""

    cache: CycleCache
    positions: Any  # (B,), once a cycle has begun
    axes_ahead: Tensor | None = None  # (A, B), once a cycle has begun
    decodes_plainly = False  # a tree of one node is one of a fixed shape too

    def __init__(self, target: Target, cache: CycleCache, nodes: int):
        self.__dict__.update(vars(target))
        self.cache, self.run, self._left = cache, target.model, None
        self.few = target.model  # what is compiled, or recorded, is the same for all calls
        self._slots = torch.arange(cache.capacity, cache.capacity + nodes, device=self.device)

    def begin(self, positions: Tensor, axes: Tensor | None, lengths: dict[str, Tensor]) -> None:
        """Of a cycle: positions (B,), the axes ahead of them (A, B), and tokens in the cache (B,) by layer type."""
        self.positions, self.axes_ahead = positions, axes
        self.cache.place(self._slots, self.cache.capacity + len(self._slots))
        for name, layer in self.cache.by_type().items():
            layer.begin(lengths[name])

    def commit(self, step: TargetPass, paths: Tensor, counts) -> None:
        assert step.places is not None
        self.cache.keep(step.places, paths, counts)


def draw(probabilities: Tensor) -> Tensor:
    """(...,): of each distribution (..., V) one draw, as `torch.multinomial` makes it, by a race of exponentials."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


@dataclass(frozen=True)
class Choice:
    """The target's token at every node, whether a path will lead there or not.

    Draws of different nodes are independent, and of a path's nodes alone are they read: a text is as likely as if each
    token had been drawn when its turn came.
    """

    processors: LogitsProcessorList  # that look at nothing but logits
    do_sample: bool

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, N), of logits (B, N, V)."""
        if not self.processors and not self.do_sample:
            return logits.max(-1).indices
        scores = logits.flatten(0, 1).float()
        unread = torch.zeros(len(scores), 1, dtype=torch.long, device=scores.device)  # texts
        for processor in self.processors:
            scores = processor(unread, scores)
        chosen = draw(scores.softmax(-1)) if self.do_sample else scores.argmax(-1)
        return chosen.view(logits.shape[:2])


@dataclass
class Cycle:
    """Draft, select, redraft, tree, verify, accept, commit: a function from a cycle's state to the next one's."""

    target: CycleTarget
    drafters: list[CycleDrafter]
    options: DecodingOptions
    choice: Choice
    origin: Origin
    width: int  # W, of paths: at least as long as the longest there can be
    followers: CycleFollowers | None = None  # of the rows' texts, for drafters that read them

    def __call__(self, state: CycleState) -> CycleState:
        self._begin(state)
        rooms = (self.origin.rooms - state.gained).clamp(min=1)
        tree = grow(State(state.anchors, list(self.drafters), self.options, rooms, fixed_shapes=True))  # 1, 2, 3, 4
        step = self.target.verify(tree)  # 5 verify
        choices = self.choice(step.logits).to(tree.tokens.device)
        paths, counts = self._accept(tree, step, choices, state.alive)  # 6 accept
        return self._commit(state, step, paths, counts, choices, HostTree.columns(tree, choices))  # 7 commit

    def _begin(self, state: CycleState) -> None:
        origin, positions = self.origin, self.origin.positions + state.gained
        lengths = {name: length + state.gained for name, length in origin.stored.items()}
        self.target.begin(positions, origin.axes, lengths)
        for drafter, read, features, counts in zip(self.drafters, origin.read, state.waiting, state.counts):
            drafter.context.begin(positions, read + state.gained, features, counts)

    def _accept(self, tree: CandidateTree, step: TargetPass, choices: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """The paths (B, W), and how many of their nodes (B,) are kept: up to the first token that ends a row."""
        assert step.nodes is not None
        fields = tree.tokens, tree.parents, tree.depths, step.nodes.visible
        paths = greedy_paths(*fields, choices, self.width)
        emitted = choices.gather(1, paths)
        ends = (emitted[..., None] == self.origin.ends).any(-1)
        goes_on = (paths[:, 1:] > 0) & ~ends[:, :-1]
        counts = 1 + goes_on.int().cumprod(1).sum(1)
        return paths, torch.where(alive, counts, 0)

    def _commit(
        self, state: CycleState, step: TargetPass, paths: Tensor, counts: Tensor, choices: Tensor, report: Tensor
    ) -> CycleState:
        """Keep the paths, show them to the drafters, and say what the next cycle starts from."""
        self.target.commit(step, paths, counts)
        for drafter in self.drafters:
            drafter.extend(step, self.target.positions, paths, counts)
        emitted = choices.gather(1, paths)
        if self.followers is not None:
            self.followers.extend(state.anchors, emitted, counts, state.gained)
        last = emitted.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        gained = state.gained + counts
        ended = (last[:, None] == self.origin.ends).any(-1) | (gained >= self.origin.rooms)
        return CycleState(
            anchors=torch.where(state.alive, last, state.anchors),
            gained=gained,
            alive=state.alive & ~ended,
            waiting=tuple(drafter.context.gained[0] for drafter in self.drafters),
            counts=tuple(drafter.context.gained[1] for drafter in self.drafters),
            report=report,
        )
