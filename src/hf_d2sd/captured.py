"""Cycles of fixed shapes: buffers of one size, trees with fillers, and passes that are compiled once for all."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .acceptance import greedy_paths
from .cache import Place, TreeCache, TreeLayer, empty_buffer, move, targets_of
from .candidates import Draft
from .choosing import Choosers
from .decoding import Batch, Observer, run
from .drafting import ContextPlace, DraftContext, Drafter, slots_of
from .growing import State
from .modeling import D2SDAssistant
from .target import TargetPass
from .tree import CandidateTree


class FixedLayer(TreeLayer):
    """A layer with slots for `capacity` tokens a row, and behind them those of a pass; all are handed out always."""

    capacity = 0
    is_known = False

    @classmethod
    def of(cls, layer: TreeLayer, capacity: int, nodes: int) -> "FixedLayer":
        """With what a layer holds, and room for passes of so many nodes."""
        fixed, lengths = cls(layer.window), layer.lengths
        fixed.__dict__.update(vars(layer))
        fixed.capacity, fixed._buffers = capacity, []
        for old in layer._buffers:
            new = empty_buffer(old, capacity + nodes).zero_()  # nothing that is no number
            new[:, :, : layer.length] = old[:, :, : layer.length]
            fixed._buffers.append(new)
        fixed.set_lengths(lengths)
        return fixed

    def released(self) -> TreeLayer:
        """The same buffers, to be appended to again."""
        layer = TreeLayer(self.window)
        layer.__dict__.update({name: value for name, value in vars(self).items() if name not in ("capacity", "slots")})
        return layer

    @property
    def first_handed_out(self) -> int:
        return 0

    def place(self) -> Place:
        return Place(self.capacity, self.lengths)

    def bound(self, lengths: list[int]) -> int:
        return self.capacity

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self._write(self.slots, key_states, value_states)
        return self._buffers[0], self._buffers[1]

    def get_seq_length(self) -> int:
        return self.capacity  # models that are compiled ask, and must always hear the same

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity + query_length, 0


class FixedCache(TreeCache):
    """Such layers; what is kept of a pass moves by one call for all buffers of a type, which may be compiled."""

    mover: Callable

    @classmethod
    def of(cls, cache: TreeCache, capacity: int, nodes: int, compiler: Callable) -> "FixedCache":
        fixed = cls(cache.config)
        fixed.layers = [FixedLayer.of(layer, capacity, nodes) for layer in cache.layers]
        fixed.mover = compiler(move)
        return fixed

    def released(self) -> TreeCache:
        cache = TreeCache(self.config)
        cache.layers = [layer.released() for layer in self.layers]
        return cache

    def keep(self, places: dict[str, Place], nodes: Tensor, counts: list[int]) -> None:
        for layer_type, place in places.items():
            layers = [layer for layer, name in zip(self.layers, self.layer_types) if name == layer_type]
            layers = [layer for layer in layers if layer.is_initialized]
            targets = targets_of(place, nodes)
            self.mover([buffer for layer in layers for buffer in layer._buffers], place.start + nodes, targets)
            for layer in layers:
                layer.set_lengths([length + count for length, count in zip(place.lengths, counts)])


class FixedContext(DraftContext):
    """A drafter's context whose passes take in the same number of new tokens each, filled up with zeros."""

    def __init__(self, context: DraftContext, cache: FixedCache, width: int):
        super().__init__(cache, context.positions, context.waiting)
        self.width = width

    def open(self, rows: int, size: int) -> ContextPlace:
        features, counts = self.take()
        features = nn.functional.pad(features, (0, 0, 0, self.width - features.shape[1]))
        before, start = self.lengths(rows), self.cache.layers[0].capacity
        self.cache.place(slots_of(before, self.width, start, size, features.device))
        return ContextPlace(features, counts, Place(start, [a + b for a, b in zip(before, counts)]))


class FixedDrafter(Drafter):
    """A drafter at work in such a context, by compiled passes, from its second draft on: the first reads the prompt.

    Args:
        drafter: whose place it takes.
        capacity: tokens a row that its cache has room for.
        width: new tokens that a cycle adds to the context at most, the anchor included.
        compiler: what makes a model a compiled one.
    """

    def __init__(self, drafter: Drafter, capacity: int, width: int, compiler: Callable):
        self.__dict__.update(vars(drafter))
        self._sizes, self._compiler = (capacity, width), compiler

    def _denoise(self, blocks: Tensor, width: int) -> Draft:
        draft = super()._denoise(blocks, width)
        if not isinstance(self.context, FixedContext):
            capacity, most = self._sizes
            cache = FixedCache.of(self.context.cache, capacity, self.slots(blocks)[0].numel(), self._compiler)
            self.context = FixedContext(self.context, cache, most)
            self.run = own_outputs(self._compiler(self.model))
        return draft

    def released(self) -> DraftContext:
        """What it knows of the text, in a context that any drafter can go on from."""
        context = self.context
        if not isinstance(context, FixedContext):
            return context
        return DraftContext(context.cache.released(), context.positions, context.waiting)


@dataclass
class FixedBatch(Batch):
    """A batch whose rows stay until all have ended, and whose greedy paths are known before the host sees a choice."""

    compiler: Callable

    def state(self, anchors: list[int]) -> State:
        return self._state(anchors, fixed_shapes=True)

    def leave(self, anchors: list[int]) -> list[int]:
        return anchors if self.choosers.staying() else super().leave(anchors)

    def paths_ahead(self, tree: CandidateTree, step: TargetPass, choices: Tensor) -> Tensor | None:
        if not self.choosers.vectorised or self.options.acceptance != "walk":
            return None
        assert step.nodes is not None
        fields = tree.tokens, tree.parents, tree.depths, step.nodes.visible
        return self.compiler(greedy_paths)(*fields, choices, self.options.depth + 1).clone()  # graphs use it again

    def path_width(self, paths: list[list[int]]) -> int:
        return self.options.depth + 1


class FixedShapes:
    """What lets a batch decode in fixed shapes: a context to decode in, see `decoding.decode`.

    Args:
        compiler: makes a function or a model a compiled one.
    """

    def __init__(self, compiler: Callable):
        self.compiler = compiler

    @contextlib.contextmanager
    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """The batch, for as long as it is decoded in buffers of one of a few sizes.

        Raises:
            ValueError: without a limit of the length.
        """
        target, drafters, options = batch.target, batch.drafters, batch.options
        check_limit(batch.choosers)
        width = options.depth + 1
        assert batch.choosers.rooms is not None
        capacity = buffer_size(max(target.cache.lengths) + max(batch.choosers.rooms) + width)
        workers = [FixedDrafter(drafter, capacity, width, self.compiler) for drafter in drafters]
        fixed = FixedBatch(target, list(workers), batch.choosers, options, self.compiler, followers=batch.followers)
        cache = FixedCache.of(target.cache, capacity, options.tree_size, self.compiler)
        cache.place(torch.arange(capacity, capacity + options.tree_size, device=target.device))
        target.cache, target.run = cache, own_outputs(self.compiler(target.model))
        try:
            yield fixed
        finally:
            target.cache, target.run = target.cache.released(), target.model
            for drafter, its in zip(drafters, workers):
                drafter.context = its.released()

    def run(self, batch: Batch, anchors: list[int], observer: Observer) -> None:
        """As `decoding.run`."""
        with self(batch) as fixed:
            run(fixed, anchors, observer)


def check_limit(choosers: Choosers) -> None:
    """Refuse a call without a limit of the length."""
    if choosers.rooms is None:
        raise ValueError("Compiled decoding needs a limit: pass max_new_tokens or max_length.")


def own_outputs(run: Callable) -> Callable:
    """A compiled model with outputs of its own: CUDA graphs write their next results to the same place."""

    def cloned(value):
        if isinstance(value, tuple):
            return tuple(cloned(part) for part in value)
        return value.clone() if torch.is_tensor(value) else value

    def owned(**inputs):
        output = run(**inputs)
        for name in ("logits", "hidden_states", "last_hidden_state"):
            if output.get(name) is not None:
                output[name] = cloned(output[name])
        return output

    return owned


def buffer_size(tokens: int) -> int:
    """The fixed size of a cache for so many: one of a few, so that few graphs are compiled."""
    return next(size for size in (*(256 * 2**i for i in range(5)), -(-tokens // 4096) * 4096) if size >= tokens)


_MOST_COMPILED = 16  # what an assistant keeps: the passes of its drafters and of the latest targets


class Compiled(dict):
    """What was compiled for an assistant, by function or module and options. Never copied or saved with it."""

    def __deepcopy__(self, memo):
        return Compiled()

    def __reduce__(self):
        return Compiled, ()


def compile_once(assistant: D2SDAssistant, options: dict, function: Callable) -> Callable:
    """A function, or a module's forward, compiled: always the same one for the same assistant and options.

    It is kept with the assistant, since a target is not to be changed.
    """
    known = vars(assistant).setdefault("_compiled", Compiled())
    key = id(function), repr(sorted(options.items()))  # what is kept holds the function: its id stays its own
    if key not in known:
        if len(known) >= _MOST_COMPILED:
            known.pop(next(iter(known)))
        known[key] = torch.compile(getattr(function, "forward", function), **options)
    return known[key]
