"""The target: prefill, one pass over a tree, and the cache that keeps the accepted path."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .attention import Nodes, TreeAttention
from .cache import Place, TreeCache, full_lengths, per_row
from .compat import (
    captured_layers,
    execution_device,
    for_few_tokens,
    forward,
    prompt_inputs,
    tree_inputs,
    with_logits_of,
)
from .recurrent import Chains, Pass, going_on, pass_over, watch
from .tree import CandidateTree

_CHUNK = 512  # tokens in one pass where a prompt goes on from rows of several lengths


@dataclass(frozen=True)
class TargetPass:
    """What one forward of the target gives for T tokens of B rows."""

    logits: Tensor  # (B, T, V); after a prefill (B, 1, V), each row's last token's
    hidden_states: tuple[Tensor | None, ...]  # entry i+1 is (B, T, H), the output of layer i; None where not asked for
    counts: list[int] | None = None  # by row, how many of the T tokens are its own; `None`: all
    nodes: Nodes | None = None  # of a tree: what sees what
    places: dict[str, Place] | None = None  # of a tree, by layer type: where its nodes stand until `commit`
    chains: Pass | None = None  # of a tree, where the target has recurrent states: what ran in the tree's place
    _features: list[tuple] = field(default_factory=list, repr=False, compare=False)  # what drafters asked for

    @property
    def is_one_token(self) -> bool:
        """Whether it was one of plain decoding's: a token in each row, which the cache keeps as any other."""
        return self.nodes is None and self.chains is None and self.places is not None

    def features(self, layer_ids: list[int], nodes: Tensor | None = None) -> Tensor:
        """(B, T or A, len(layer_ids) * H): what a drafter reads, for all tokens or for the given nodes (B, A)."""
        for ids, of, features in self._features:
            if ids == layer_ids and of is nodes:
                return features
        features = self._gathered(layer_ids, nodes)
        self._features.append((layer_ids, nodes, features))
        return features

    def _gathered(self, layer_ids: list[int], nodes: Tensor | None) -> Tensor:
        given = (self.hidden_states[i + 1] for i in layer_ids)
        layers = [layer for layer in given if layer is not None]
        if nodes is not None:
            layers = [take_nodes(layer, nodes.to(layer.device)) for layer in layers]
        return torch.cat([layer.to(layers[0].device) for layer in layers], dim=-1)


def take_nodes(states: Tensor, nodes: Tensor) -> Tensor:
    """Of states (B, N, H) those of each row's nodes (B, A)."""
    if len(nodes) == 1:
        return states.index_select(1, nodes[0])
    return states.gather(1, nodes[..., None].expand(-1, -1, states.shape[2]))


class Target:
    """The user's model at work on a batch. Its weights are never touched, its forward is its own.

    Args:
        model: a causal LM of Transformers.
        cache: holds what is committed; it grows by `prefill` and `commit`.
        layer_ids: the layers whose outputs some drafter reads.
        rows: B.
        all_hidden_states: keep every layer's output, for `output_hidden_states=True`.
        backend: the attention that trees have to be verified with, or its name; by default the fastest that can run.
        keeps_left_rows: whether the cache of rows that leave the batch is still wanted.
    """

    def __init__(
        self,
        model,
        cache: TreeCache,
        layer_ids: set[int],
        rows: int = 1,
        all_hidden_states: bool = False,
        backend: str | TreeAttention | None = None,
        keeps_left_rows: bool = False,
    ):
        self.model, self.cache = model, cache
        given = backend if isinstance(backend, TreeAttention) else None
        self.attention = given or TreeAttention.for_model(model, backend if isinstance(backend, str) else None)
        self.device = execution_device(model.get_input_embeddings())
        self.run: Callable = model  # of trees; or compiled, for passes of a fixed shape
        self.rows = list(range(rows))  # which rows of the batch are still in it
        self._left: dict[int, tuple[TreeCache, int]] | None = (
            {} if keeps_left_rows else None
        )  # row → its cache and position
        self._capture = True if all_hidden_states else captured_layers(layer_ids)
        # By row, the position of the next token that is not in the cache.
        self.positions = full_lengths(cache.layers[0]) if cache.get_seq_length() else [0] * rows
        # Of rotary positions with several axes, text, time, height and width say: what each is ahead of that (A, B).
        self._axes_ahead: Tensor | None = None
        if cache.state_layers:
            watch(model)

    def prefill(
        self,
        input_ids: Tensor,
        new_tokens: int,
        chunk_size: int | None = None,
        counts: list[int] | None = None,
        **model_kwargs,
    ) -> Iterator[TargetPass]:
        """Run the prompts' last `new_tokens` tokens, as `generate` would; yields one pass for each chunk.

        Args:
            input_ids: (B, L), or (B, 0) where `model_kwargs` has `inputs_embeds` (B, L, H).
            chunk_size: tokens in one pass; all by default.
            counts: by row, how many of the `new_tokens` are its own: the first ones, what follows is filling.
        """
        cached = full_lengths(self.cache.layers[0]) if self.cache.get_seq_length() else [0] * len(self.rows)
        counts = [new_tokens] * len(cached) if counts is None else counts
        positions = model_kwargs.get("position_ids")
        self._axes_ahead = _axes_ahead(positions, new_tokens, cached, counts)
        padded = bool(self.cache.state_layers) and min(counts) < new_tokens
        if padded and not max(cached):  # each row's own tokens are its last ones
            self._axes_ahead = _axes_ahead(positions, 1, [count - 1 for count in counts], [1] * len(counts))
            yield from self._prefill_padded(input_ids, counts, chunk_size or new_tokens, model_kwargs)
            return
        if padded or min(cached) < max(cached):
            yield from self._prefill_ragged(input_ids[:, -new_tokens:], counts, chunk_size or _CHUNK)
            return
        logits = None
        chunk_size = chunk_size or new_tokens
        for start in range(0, new_tokens, chunk_size):
            end = min(start + chunk_size, new_tokens)
            kwargs = {name: _without_last(value, new_tokens - end, name) for name, value in model_kwargs.items()}
            lasts = sorted({count - 1 - start for count in counts if start < count <= end})  # columns of last tokens
            if lasts and lasts != [end - start - 1]:
                kwargs = with_logits_of(kwargs, torch.tensor(lasts, device=self.device))
            ids = _without_last(input_ids, new_tokens - end)
            inputs = prompt_inputs(self.model, ids, end - start, self.cache, kwargs)
            given, hidden_states = self._read(inputs, end - start)
            logits = _pick_last(logits, given, [count - 1 - start for count in counts], lasts, end - start)
            own = [min(max(count - start, 0), end - start) for count in counts]
            ends = [length + min(count, end) for length, count in zip(cached, counts)]
            self.positions = self._positions_after(kwargs.get("position_ids"), end - start, own, ends)
            yield TargetPass(logits, hidden_states, own)
        self.cache.set_lengths(ends)

    def _read(self, inputs: dict, size: int) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """`forward` over a prompt's next `size` tokens, which may follow others."""
        follows = bool(self.cache.state_layers) and self.cache.get_seq_length() > 0
        with going_on(in_prompt=True) if follows else contextlib.nullcontext():
            output = forward(self.model, inputs, self._capture)
        self.cache.count(len(self.rows), size, self.device)
        return output

    def _positions_after(self, position_ids: Tensor | None, size: int, own: list[int], ends: list[int]) -> list[int]:
        """By row, the position after the `own` first of this chunk's `size` tokens."""
        if position_ids is None or position_ids.ndim == 3:
            return ends
        last = position_ids[:, -size:].expand(len(own), -1).tolist()
        return [row[count - 1] + 1 if count else before for row, count, before in zip(last, own, self.positions)]

    def _prefill_padded(
        self, input_ids: Tensor, counts: list[int], chunk_size: int, model_kwargs: dict
    ) -> Iterator[TargetPass]:
        """As `prefill`, for new rows padded on the left as a recurrent state has it; the padding is then dropped."""
        width = model_kwargs["attention_mask"].shape[1]
        places = {name: Place(0, [0] * len(counts)) for name in self.cache.layer_types}
        for start in range(0, width, chunk_size):
            end = min(start + chunk_size, width)
            kwargs = {name: _without_last(value, width - end, name) for name, value in model_kwargs.items()}
            ids = _without_last(input_ids, width - end)
            inputs = prompt_inputs(self.model, ids, end - start, self.cache, kwargs)
            logits, hidden_states = self._read(inputs, end - start)
            own = [min(max(end - width + count, 0), end - start) for count in counts]
            shifted = (layer if layer is None else _to_front(layer, own) for layer in hidden_states)
            self.positions = [position + more for position, more in zip(self.positions, own)]
            yield TargetPass(logits[:, -1:], tuple(shifted), own)
        self.cache.keep(places, _last_columns(width, counts), counts)

    def _prefill_ragged(self, tokens: Tensor, counts: list[int], chunk_size: int) -> Iterator[TargetPass]:
        """As `prefill`, for rows that go on from caches of several lengths: chains of tokens, verified and kept."""
        logits = None
        for start in range(0, tokens.shape[1], chunk_size):
            chunk = tokens[:, start : start + chunk_size]
            size = chunk.shape[1]
            own = [min(max(count - start, 0), size) for count in counts]
            lasts = sorted({count - 1 - start for count in counts if start < count <= start + size})
            step = self.append(chunk, own)
            logits = _pick_last(logits, step.logits, [count - 1 - start for count in counts], lasts, size)
            yield TargetPass(logits, step.hidden_states, own)

    def append(self, tokens: Tensor, counts: list[int]) -> TargetPass:
        """Let each row go on by the first `counts[b]` of `tokens` (B, T)."""
        step = self.verify(CandidateTree.chain(tokens.to(self.device)))
        self.commit(step, torch.arange(tokens.shape[1], device=self.device).expand(tokens.shape), counts)
        return step

    def verify(self, tree: CandidateTree) -> TargetPass:
        """One pass over the N nodes, each seeing the cache and its own ancestors; the cache grows by all nodes."""
        if self.cache.state_layers:
            return self._verify_chains(Chains.of_tree(tree))
        if len(tree) == 1 and self.decodes_plainly:
            return self._verify_anchor(tree)
        nodes, places = Nodes.of_tree(tree), self.cache.places()
        prepared = self.attention.prepare(nodes, self.cache, places, self.model.dtype)
        positions = self._positions_at(tree.depths)
        inputs = tree_inputs(tree.tokens, positions, self.attention.as_argument(prepared), self.cache)
        with self.attention.active_at(prepared, positions, nodes, places):
            logits, hidden_states = self._forward(inputs)
        return TargetPass(logits, hidden_states, None, nodes, places)

    def _forward(self, inputs: dict) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """`forward` over a tree's nodes."""
        return forward(self.few if self.run is self.model else self.run, inputs, self._capture)

    @functools.cached_property
    def few(self):
        """The model for passes over a few tokens. Made once the prompt has run: by then Transformers' hooks stand."""
        return for_few_tokens(self.model)

    @property
    def decodes_plainly(self) -> bool:
        """Whether a pass over the anchors alone is one of plain decoding: no tree, and the model's own attention."""
        lengths, own = self.cache.lengths, self.attention
        return self.run is self.model and min(lengths) == max(lengths) and not (own.by_position or own.tells_positions)

    def _verify_anchor(self, tree: CandidateTree) -> TargetPass:
        """As `verify`, of one node in each row: it sees all that the cache hands out, so that no mask is needed."""
        none = self.attention.as_argument(dict.fromkeys(self.attention.windows))
        inputs = tree_inputs(tree.tokens, self._positions_at(tree.depths), none, self.cache)
        with self.attention.active_for_one():
            logits, hidden_states = self._forward(inputs)
        return TargetPass(logits, hidden_states, None, None, {})

    def _positions_at(self, depths: Tensor) -> Tensor:
        """Of nodes at these depths (B, N): (B, N), or (A, B, N) for a target whose positions have A axes.

        A tree is text, and along text each axis goes on by one a token, from where the prompt's last token left it.
        """
        positions = per_row(self.positions, self.device)[:, None] + depths
        return positions if self.axes_ahead is None else positions + self.axes_ahead[..., None]

    @property
    def axes_ahead(self) -> Tensor | None:
        """(A, B), of the rows that are still in the batch."""
        return None if self._axes_ahead is None else self._axes_ahead[:, self.rows]

    def _verify_chains(self, chains: Chains) -> TargetPass:
        """As `verify`, with the tree's chains in its place; the cache grows by all their tokens."""
        rows, count, length = chains.tokens.shape
        nodes, places = chains.nodes(), self.cache.places()
        prepared = self.attention.prepare(nodes, self.cache, places, self.model.dtype)
        depths = torch.arange(length, device=self.device).repeat(count).expand(rows, -1)
        positions = self._positions_at(depths)
        positions = positions.reshape(*positions.shape[:-2], rows * count, length)
        inputs = tree_inputs(chains.tokens.flatten(0, 1), positions, self.attention.as_argument(prepared), self.cache)
        with self.attention.active(prepared), pass_over(self.cache, chains) as here:
            logits, hidden_states = self._forward(inputs)
            self.cache.count(rows, chains.tokens[0].numel(), self.device)
        gathered = tuple(layer if layer is None else chains.gather(layer) for layer in hidden_states)
        return TargetPass(chains.gather(logits), gathered, None, nodes, places, here)

    def commit(self, step: TargetPass, paths: Tensor | None, counts: list[int]) -> None:
        """Of a tree's nodes keep each row's first `counts[b]` of `paths` (B, A), and forget the others.

        Args:
            paths: `None` for a pass over one token in each row.
        """
        assert step.places is not None and (paths is not None or step.is_one_token)
        if step.chains is not None:
            paths = step.chains.chains.slots.gather(1, paths)
            step.chains.keep(paths, counts)
        if step.nodes is not None:
            self.cache.keep(step.places, paths, counts)
        elif min(counts) == 0:  # else the pass has left the cache as it shall be
            for layer in self.cache.layers:
                layer.set_lengths([length - 1 + count for length, count in zip(layer.lengths, counts)])
        self.positions = [position + count for position, count in zip(self.positions, counts)]

    def select(self, staying: list[int]) -> None:
        """Let all rows but the given ones, counted among those still there, leave the batch."""
        if self._left is not None:
            for at in set(range(len(self.rows))) - set(staying):
                self._left[self.rows[at]] = self.cache.rows([at]), self.positions[at]
        self.cache = self.cache.rows(staying)
        self.rows, self.positions = ([values[at] for at in staying] for values in (self.rows, self.positions))

    def crop(self, lengths: list[int]) -> None:
        """Let each row end after `lengths[b]` tokens."""
        excess = [length - kept for length, kept in zip(full_lengths(self.cache.layers[0]), lengths)]
        self.cache.set_lengths(lengths)
        self.positions = [position - more for position, more in zip(self.positions, excess)]

    def rejoin(self) -> None:
        """Bring the rows that left back, in their order."""
        here = {row: (self.cache.rows([at]), self.positions[at]) for at, row in enumerate(self.rows)}
        rows = {**(self._left or {}), **here}
        self.rows = sorted(rows)
        self.cache = TreeCache.stack([rows[row][0] for row in self.rows])
        self.positions = [rows[row][1] for row in self.rows]


def _last_columns(width: int, counts: list[int]) -> Tensor:
    """(B, width): each row's last `counts[b]` columns of so many, then any."""
    first = width - torch.tensor(counts)[:, None]
    return (first + torch.arange(width)).clamp(max=width - 1)


def _to_front(states: Tensor, counts: list[int]) -> Tensor:
    """Of states (B, T, H) each row's last `counts[b]` first."""
    return take_nodes(states, _last_columns(states.shape[1], counts).to(states.device))


def _pick_last(before: Tensor | None, logits: Tensor, at: list[int], lasts: list[int], size: int) -> Tensor:
    """(B, 1, V): for rows whose last token is in this chunk of `size` its logits, for others those from before.

    Args:
        logits: (B, T, V), of the columns `lasts` alone, of the last column, or of all.
        at: by row, the column of its last token, perhaps outside of this chunk.
    """
    if logits.shape[1] == size:
        columns = dict(zip(range(size), range(size)))
    else:
        columns = {last: place for place, last in enumerate(lasts)} or {size - 1: 0}
    picked = [
        logits[row : row + 1, columns[column], None] if column in columns else None for row, column in enumerate(at)
    ]
    if before is not None:
        picked = [before[row : row + 1] if new is None else new for row, new in enumerate(picked)]
    return torch.cat([logits[:1, :1] if new is None else new for new in picked])


def _axes_ahead(position_ids: Tensor | None, width: int, cached: list[int], counts: list[int]) -> Tensor | None:
    """(A, B): what each axis of rotary positions is ahead of the number of tokens, behind each row's last token.

    Args:
        position_ids: (A, B or 1, at least `width`); those of one axis, (B, L), are none of this.
        cached: by row, tokens before the last `width` ones, of which its own are the first `counts[b]`.
    """
    if position_ids is None or position_ids.ndim != 3:
        return None
    new = position_ids[..., -width:].expand(-1, len(counts), -1)
    last = torch.tensor(counts, device=new.device) - 1
    return new[:, torch.arange(len(counts), device=new.device), last] - last - torch.tensor(cached, device=new.device)


def _without_last(value, count: int, name: str = ""):
    """A tensor along the sequence without its last `count` entries; anything else unchanged."""
    if count and name == "position_ids" and torch.is_tensor(value):
        return value[..., :-count]
    if count == 0 or not torch.is_tensor(value) or value.ndim < 2 or value.shape[1] == 0:
        return value
    return value[:, :-count]
