"""The drafters at work: each denoises blocks over its own cache of the committed tokens' features."""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from . import paths
from .attention import Nodes, TreeAttention
from .cache import Place, TreeCache, per_row
from .candidates import Draft
from .compat import execution_device, for_few_tokens, without_embed_norm
from .followers import CycleFollowers, Followers
from .modeling import D2SDDrafterModel
from .products import linear
from .target import TargetPass
from .vocabulary import CallWords


class Drafter:
    """One drafter, with the target's embedding and head, and its context: keys and values of committed tokens.

    Args:
        model: the network.
        target: the target model whose embedding and LM head are called.
        context: of an earlier turn, to go on from.
        backend: the attention to use; by default the fastest that can run.
    """

    def __init__(
        self, model: D2SDDrafterModel, target, context: "DraftContext | None" = None, backend: str | None = None
    ):
        self.model = model
        self.context = context if context is not None else DraftContext(TreeCache(model.config))
        self.device, self.dtype = execution_device(model.fc), model.fc.weight.dtype
        self.run: Callable = for_few_tokens(model)  # or compiled, for passes of a fixed shape
        self._embed = draft_embedding(model, target.get_input_embeddings())
        self._head = draft_head(model, target.get_output_embeddings())
        rows = head_rows(model, target.get_output_embeddings())
        self.words = CallWords(model, target.get_output_embeddings(), lambda *rows: _scaled(model, PrunedHead(*rows)))
        if model.path_head is not None:  # vectors of tokens, see there
            self._before, self._at = model.path_head.tables(
                self._embed, lambda places: rows(places, self._target_tokens(places, places.device))
            )
        self.followers: Followers | CycleFollowers | None = None  # of the rows' texts so far, where it reads them
        self._generator = torch.Generator(execution_device(target.get_output_embeddings())).manual_seed(0)  # not yours
        self._attention = TreeAttention.for_model(model, backend, two_sided=True)
        self._by_slot: Tensor | None = None  # (γ-1, 1), the confidence temperatures once they were needed
        self._nodes: dict[tuple[int, int, int], Nodes] = {}  # (B, K, γ) → what such blocks see of each other

    @property
    def reads_text(self) -> bool:
        """Whether what followed which token in the text so far counts for its paths."""
        return self.model.config.path_text_weight is not None

    def extend(
        self, step: TargetPass, positions: list[int], nodes: Tensor | None = None, counts: list[int] | None = None
    ) -> None:
        """Take in the features of tokens that the target's cache has gained.

        Args:
            step: the pass that gave them.
            positions: by row, of the token after the last of them.
            nodes: (B, A), which of the pass's tokens they are; all by default.
            counts: by row, how many of these; by default as many as are the row's own.
        """
        features = step.features(self.model.config.target_layer_ids, nodes)
        counts = step.counts if counts is None else counts
        counts = [features.shape[1]] * len(features) if counts is None else counts
        self.context.extend(features.to(self.device, self.dtype), positions, counts)

    def select(self, staying: list[int]) -> None:
        """Let all rows but the given ones leave the batch."""
        self.context.select(staying)

    def draft(self, anchor: Tensor, block_size: int, width: int = 1) -> Draft:
        """The first draft: one block after each anchor (B,), all of it masked; R is 1, D is γ-1, W is `width`."""
        return self._denoise(self._masked_blocks(anchor, 1, block_size), width)

    def redraft(self, anchor: Tensor, prefixes: Draft, block_size: int, width: int = 1) -> Draft:
        """The second draft: K blocks a row in one pass, each keeping one of the row's prefixes and masked after it.

        Args:
            anchor: (B,); prefixes: R is K, of any depth, see `Draft.cut`.
        """
        blocks = self._masked_blocks(anchor, prefixes.kept.shape[1], block_size)
        size = min(prefixes.depth, block_size - 1)
        kept = torch.arange(size, device=anchor.device) < prefixes.kept[..., None]  # (B, K, size)
        blocks[..., 1 : 1 + size] = torch.where(kept, prefixes.best[..., :size], blocks[..., 1 : 1 + size])
        return self._denoise(blocks, width).after(prefixes)

    def sample(self, draft: Draft, prefixes: Draft) -> Draft:
        """Branches without another pass: after each prefix, draws from the first draft's own distributions."""
        assert draft.logits is not None
        probabilities = draft.logits[:, 0].softmax(-1)  # (B, γ-1, V')
        count = prefixes.kept.shape[1]
        drawn = probabilities.flatten(0, 1).multinomial(count, replacement=True, generator=self._generator)
        drawn = drawn.view(*probabilities.shape[:2], count)
        confidence = probabilities.gather(-1, drawn).transpose(1, 2)
        tokens = self._target_tokens(drawn, draft.tokens.device).transpose(1, 2)
        return Draft.of(tokens, confidence.to(tokens.device)).after(prefixes)

    def gathered(self) -> list[Tensor]:
        """The tensors beside the network's own and the target's that it reads."""
        known = (getattr(self.model, name, None) for name in ("_pruned_head", "_read_head"))
        read = [head.pruned for head in known if head is not None]
        return [tensor for head in read for tensor in (head.weight, head.bias) if tensor is not None]

    def _masked_blocks(self, anchor: Tensor, count: int, block_size: int) -> Tensor:
        blocks = anchor.new_full((len(anchor), count, block_size), self.model.config.mask_token_id)
        blocks[..., 0] = anchor[:, None]
        return blocks

    def _denoise(self, blocks: Tensor, width: int) -> Draft:
        """One forward for all blocks (B, K, γ): a row's are one long query over its one context."""
        slots = self.slots(blocks)
        place = self.context.open(len(slots), slots[0].numel())
        hidden, dtype = self._forward(slots, place)
        self.context.close(place)
        return self._read(hidden, dtype, blocks, width)

    def slots(self, blocks: Tensor) -> Tensor:
        """(B, K, S): what the network sees of blocks (B, K, γ): without the last where the slot before predicts it."""
        return blocks[..., :-1] if self.model.config.drafts_from_anchor else blocks

    def _forward(self, slots: Tensor, place: "ContextPlace") -> tuple[Tensor, torch.dtype]:
        """Hidden states (B, K·S, H) of the blocks' slots (B, K, S), and the target's dtype."""
        nodes, types, cache = self._block_nodes(*slots.shape), self._attention.windows, self.context.cache
        prepared = self._attention.prepare(nodes, cache, dict.fromkeys(types, place.blocks), self.dtype)
        embeds = self._embed(slots.flatten(1))
        with self._attention.active(prepared):
            output = self.run(
                noise_embeds=embeds.to(self.device, self.dtype),
                context_hidden_states=place.features,
                position_ids=self._positions(place.counts, place.features.shape[1], nodes.depths),
                attention_mask=self._attention.masks(prepared),
                cache=cache,
                block_slots=slots.shape[-1],
            )
        return output.last_hidden_state, embeds.dtype

    def _read(self, hidden: Tensor, dtype: torch.dtype, blocks: Tensor, width: int) -> Draft:
        """What the heads say of the blocks' positions after their first ones; all W are there with a path head."""
        rows, count, block_size = blocks.shape
        hidden = hidden.view(rows * count, -1, hidden.shape[-1])[:, 1 - block_size :]
        # One row of tokens, side by side: for a view with gaps a linear layer may copy its weight for every block.
        flat = hidden.reshape(1, -1, hidden.shape[-1]).to(dtype)
        logits = self.words.logits(flat, self._head(flat))
        logits = logits.view(rows, count, block_size - 1, -1)[..., : self.model.config.vocab_size]
        logits = logits.float()  # (B, K, γ-1, V')
        temperatures = self._temperatures(logits)
        logits = logits if temperatures is None else logits / temperatures
        linked = self.model.path_head is not None or self.followers is not None
        values, indices = _best(logits, max(width, self.model.config.path_candidates) if linked else width)
        total = logits.logsumexp(-1, keepdim=True)
        tokens = self._target_tokens(indices, blocks.device)
        log_probs, transitions = values - total, None
        if linked:
            given = blocks[..., 1:, None] != self.model.config.mask_token_id  # (B, K, γ-1, 1), a kept prefix
            tokens, values, total = _with_given(given, blocks[..., 1:, None], tokens, values, total)
            anchor, by = blocks[..., :1, None], 1.0 if temperatures is None else temperatures[..., None]
            before = torch.cat([anchor.expand(*tokens.shape[:2], 1, tokens.shape[-1]), tokens[:, :, :-1]], dim=2)
            scores = self._scores(hidden.view(rows, count, block_size - 1, -1), indices, before) / by
            of_text, others = self._of_text(before, tokens, by, logits.device), paths.rest(values, total[..., 0])
            transitions = paths.conditional(values, scores, others, of_text).to(blocks.device)
        confidence, log_probs = (x.to(blocks.device) for x in (log_probs.exp(), log_probs))
        draft = Draft(tokens, confidence, log_probs, blocks.new_zeros(rows, count), logits, transitions)
        if width > 1:
            return draft
        draft = draft.chain() if linked else draft
        said = self._said(hidden.view(rows, count, block_size - 1, -1), draft.best, blocks[..., :1])
        return draft if said is None else replace(draft, confidence=said.to(blocks.device)[..., None])

    def _said(self, hidden: Tensor, tokens: Tensor, anchor: Tensor) -> Tensor | None:
        """(B, K, γ-1): how likely each of a chain's tokens is accepted, of a drafter with a head that says it.

        Args:
            hidden: (B, K, γ-1, H); tokens: (B, K, γ-1); anchor: (B, K, 1).
        """
        head = self.model.confidence_head
        if head is None:
            return None
        before = None
        if self.model.path_head is not None:
            before = self._before(torch.cat([anchor, tokens[..., :-1]], dim=-1)).to(self.device, self.dtype)
        return head(hidden.to(self.device, self.dtype), before)

    def _temperatures(self, logits: Tensor) -> Tensor | None:
        """(γ-1, 1): by slot, what logits (B, K, γ-1, V') are divided by, if by anything."""
        if self._by_slot is None and self.model.config.confidence_temperatures is not None:
            self._by_slot = logits.new_tensor(self.model.config.confidence_temperatures)[:, None]
        return None if self._by_slot is None else self._by_slot[: logits.shape[2]]

    def _scores(self, hidden: Tensor, indices: Tensor, before: Tensor) -> Tensor:
        """(B, K, γ-1, W, W): the path head's, of each candidate after each one of the slot before; 0 without one.

        Args:
            hidden: (B, K, γ-1, H).
            indices: (B, K, γ-1, W), places in the draft vocabulary; before: (B, K, γ-1, W), the target's tokens.
        """
        if self.model.path_head is None:
            return torch.zeros((), device=hidden.device)
        previous = self._before(before.flatten(1)).view(*before.shape, -1)
        parts = (x.to(self.device, self.dtype) for x in (hidden, previous, self._at(indices)))
        return self.model.path_head(*parts).to(hidden.device)

    def _of_text(self, before: Tensor, tokens: Tensor, by: Tensor | float, device) -> paths.OfText | None:
        """What the text so far says of candidates (B, K, γ-1, W) after those before; its scores divided by `by`."""
        if self.followers is None:
            return None
        weight = self.model.config.path_text_weight
        said = self.followers.of_text(before.flatten(1, 2), tokens.flatten(1, 2), weight)
        scores = said.scores.view(*before.shape, -1).to(device) / by
        return paths.OfText(scores, said.left.view(before.shape).to(device))

    def _target_tokens(self, indices: Tensor, device: torch.device) -> Tensor:
        """From places in the draft vocabulary to the target's tokens."""
        if self.model.config.draft_vocab_size is not None:
            ids = self.model.draft_token_ids
            if len(self.words):
                ids = torch.cat([ids, self.words.ids.to(ids.device)])
            indices = ids[indices.to(ids.device)]
        return indices.to(device)

    def _block_nodes(self, rows: int, count: int, block_size: int) -> Nodes:
        shape = rows, count, block_size
        if shape not in self._nodes:
            self._nodes[shape] = Nodes.of_blocks(*shape, self.device)
        return self._nodes[shape]

    def _positions(self, counts: list[int] | Tensor, width: int, depths: Tensor) -> Tensor:
        """(B, C + K·γ): of the new context, whose filling may stand anywhere, and of the blocks."""
        starts = per_row(self.context.positions, self.device)[:, None]
        new = starts - per_row(counts, self.device)[:, None] + torch.arange(width, device=self.device)
        return torch.cat([new, starts + depths], dim=1)


def _best(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Values and places of the `width` greatest, best first; fewer where there are fewer."""
    if width == 1:
        best = logits.max(-1, keepdim=True)  # finds it in a fraction of what `topk` takes
        return best.values, best.indices
    best = logits.topk(min(width, logits.shape[-1]), dim=-1)
    return best.values, best.indices


def _with_given(given: Tensor, block: Tensor, tokens: Tensor, values: Tensor, total: Tensor) -> tuple[Tensor, ...]:
    """Tokens and logits (B, K, γ-1, W) and their total (B, K, γ-1, 1), where a slot's token is not to be drafted.

    Args:
        given: (B, K, γ-1, 1), whether it is; block: (B, K, γ-1, 1), the token, which then stands in place 0.
    """
    at_first = torch.arange(tokens.shape[-1], device=tokens.device) == 0
    tokens = torch.where(given & at_first, block, tokens)
    given = given.to(values.device)
    values = torch.where(given, torch.where(at_first.to(values.device), 0.0, -torch.inf), values)
    return tokens, values, torch.where(given, 0.0, total)


def slots_of(before: list[int], width: int, start: int, size: int, device: torch.device) -> Tensor:
    """(B, C + K·γ): where the new context and the blocks go, in rows that hold `before` tokens."""
    context = torch.tensor(before)[:, None] + torch.arange(width)
    blocks = torch.arange(start, start + size).expand(len(before), -1)
    return torch.cat([context, blocks], dim=1).to(device)


@dataclass(frozen=True)
class ContextPlace:
    """Where one pass's tokens stand in a drafter's cache: the new context behind each row's, then the blocks."""

    features: Tensor  # (B, C, F), the new context
    counts: list[int] | Tensor  # by row, how many of these are its own
    blocks: Place  # of the blocks: they see what each row's cache holds with its new context


@dataclass
class DraftContext:
    """The committed tokens as one drafter knows them: some in its cache, the newest still as features."""

    cache: TreeCache
    positions: list[int] = field(default_factory=list)  # by row, of the token after the last known one: the anchor
    waiting: tuple[tuple[Tensor, list[int]], ...] = ()  # features (B, T, F) that no forward has seen, own ones by row

    def lengths(self, rows: int) -> list[int]:
        """By row, how many tokens are in the cache."""
        return self.cache.lengths if self.cache.get_seq_length() else [0] * rows

    def extend(self, features: Tensor, positions: list[int], counts: list[int]) -> None:
        """Add features of tokens that end before `positions`. After a gap only what follows it is kept."""
        starts = [position - count for position, count in zip(positions, counts)]
        if starts != self.positions:
            self.cache.reset()
            self.waiting = ()
        before = self.waiting[1:] if self.waiting and not self.waiting[0][0].shape[1] else self.waiting
        self.waiting = (*before, (features, counts))
        self.positions = positions

    def take(self) -> tuple[Tensor, list[int]]:
        """The features (B, C, F) that are waiting, which the caller puts in the cache; by row, how many are its own.

        C is 0 for a drafter that drafts twice in a cycle.
        """
        parts = self.waiting
        rows, _, size = parts[0][0].shape
        self.waiting = ((parts[0][0].new_empty(rows, 0, size), [0] * rows),)
        if all(min(counts) == features.shape[1] for features, counts in parts[:-1]):
            width = sum(features.shape[1] for features, _ in parts[:-1])
            features = parts[0][0] if len(parts) == 1 else torch.cat([features for features, _ in parts], dim=1)
            return features, [width + count for count in parts[-1][1]]
        return _join(parts)

    def open(self, rows: int, size: int) -> ContextPlace:
        """Make room in the cache for the features that are waiting, and for `size` tokens of blocks."""
        features, counts = self.take()
        before, width = self.lengths(rows), features.shape[1]
        start = max(before) + width
        if min(before) < max(before) or min(counts) < width:
            self.cache.place(slots_of(before, width, start, size, features.device), start + size)
        return ContextPlace(features, counts, Place(start, [a + b for a, b in zip(before, counts)]))

    def close(self, place: ContextPlace) -> None:
        """Keep the new context, and forget the blocks."""
        self.cache.place(None)
        self.cache.set_lengths(place.blocks.lengths)

    def select(self, staying: list[int]) -> None:
        """Forget all rows but the given ones."""
        self.cache = self.cache.rows(staying)
        self.positions = [self.positions[row] for row in staying]
        self.waiting = tuple(
            (features[staying], [counts[row] for row in staying]) for features, counts in self.waiting
        )

    def cut(self, position: int) -> None:
        """Forget tokens from `position` on, in a batch of one: the user cropped the target's cache between turns."""
        excess = self.positions[0] - position
        if excess > 0:
            waiting = sum(features.shape[1] for features, _ in self.waiting)
            cached = self.cache.get_seq_length()
            kept = self.take()[0][:, : max(waiting - excess, 0)] if self.waiting else None
            self.waiting = ((kept, [kept.shape[1]]),) if kept is not None and kept.shape[1] else ()
            self.cache.crop(-min(max(excess - waiting, 0), cached))
            self.positions = [position]


def _join(parts: tuple[tuple[Tensor, list[int]], ...]) -> tuple[Tensor, list[int]]:
    """Each row's own features of all parts, one behind the other."""
    totals = [sum(counts) for counts in zip(*(counts for _, counts in parts))]
    first = parts[0][0]
    joined = first.new_zeros(len(totals), max(totals) + 1, first.shape[2])  # the last entry takes the filling
    ends = torch.zeros(len(totals), 1, dtype=torch.long)
    for features, counts in parts:
        at, own = torch.arange(features.shape[1]), torch.tensor(counts)[:, None]
        place = torch.where(at < own, ends + at, max(totals)).to(first.device)
        joined[torch.arange(len(place), device=place.device)[:, None], place] = features
        ends += own
    return joined[:, :-1], totals


@dataclass(frozen=True)
class PrunedHead:
    """A head of V' tokens: the rows of a target's that belong to a pruned draft vocabulary, or a drafter's own."""

    weight: Tensor  # (V', H)
    bias: Tensor | None  # (V',)

    def __call__(self, hidden: Tensor) -> Tensor:
        return linear(hidden.to(self.weight), self.weight, self.bias)


def draft_embedding(model: D2SDDrafterModel, embed: nn.Module) -> Callable[[Tensor], Tensor]:
    """What embeds a drafter's tokens: the target's embedding, or the drafter's own."""
    if not model.config.own_embedding:
        return without_embed_norm(embed)

    def own(tokens: Tensor) -> Tensor:
        weight = model.embed_tokens.weight
        return nn.functional.embedding(tokens.to(weight.device), weight)

    return own


def draft_head(model: D2SDDrafterModel, head: nn.Module) -> Callable[[Tensor], Tensor]:
    """What gives a drafter's logits: the target's head or the drafter's own, scaled and capped as its config says."""
    read = PrunedHead(model.lm_head.weight, None) if model.config.own_head else _target_head(model, head)
    return _scaled(model, read)


def _scaled(model: D2SDDrafterModel, read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same logits, scaled and capped as the drafter's config says."""
    config = model.config
    multiplier, cap = config.output_multiplier, config.final_logit_softcapping
    if multiplier == 1.0 and cap is None:
        return read

    def scaled(hidden: Tensor) -> Tensor:
        logits = read(hidden) * multiplier
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return scaled


def _target_head(model: D2SDDrafterModel, head: nn.Module) -> Callable[[Tensor], Tensor]:
    """The target's head, or for a pruned draft vocabulary its rows; gathered once, and anew when they change.

    Of a plain linear head the rows are read; any other head, a quantized one say, is called on the unit vectors.
    """
    if model.config.draft_vocab_size is None:
        return functools.partial(_call_where_it_is, for_few_tokens(head))
    known: _KnownHead | None = getattr(model, "_pruned_head", None)
    plain = type(head) is nn.Linear and head.weight.device.type != "meta"
    if known is not None and known.head() is head:
        same = _are_rows(known.pruned, model.draft_token_ids, head) if plain else known.still_answers()
        if same:
            return known.pruned
    if plain:
        ids = model.draft_token_ids.to(head.weight.device)
        weight = head.weight.detach()[ids]
        bias = head.bias.detach()[ids] if head.bias is not None else None
    else:
        weight, bias = _rows_by_calling(head, model.draft_token_ids, model.config.hidden_size)
    device = execution_device(model.fc)
    pruned = PrunedHead(weight.to(device), bias.to(device) if bias is not None else None)
    width = model.config.hidden_size
    model._pruned_head = _KnownHead(weakref.ref(head), pruned, None if plain else _answer(head, width), width)
    return pruned


def head_rows(model: D2SDDrafterModel, head: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """What gives the rows (..., H) of a drafter's head: of places (...) in its vocabulary, with their tokens (...)."""

    def rows(indices: Tensor, tokens: Tensor) -> Tensor:
        if model.config.own_head:
            places, weight = indices, model.lm_head.weight
        elif type(head) is nn.Linear and head.weight.device.type != "meta":
            places, weight = tokens, head.weight.detach()
        else:
            places, weight = indices, _weight_by_calling(model, head)
        return nn.functional.embedding(places.to(weight.device), weight)

    return rows


def _weight_by_calling(model: D2SDDrafterModel, head: nn.Module) -> Tensor:
    """(V', H), of a head that can only be called, a quantized one say; read once for a target."""
    read = _target_head(model, head)
    if isinstance(read, PrunedHead):
        return read.weight
    width = model.config.hidden_size
    known: _KnownHead | None = getattr(model, "_read_head", None)
    if known is None or known.head() is not head or not known.still_answers():
        whole = PrunedHead(*_rows_by_calling(head, torch.arange(model.config.vocab_size), width))
        model._read_head = known = _KnownHead(weakref.ref(head), whole, _answer(head, width), width)
    return known.pruned.weight


@dataclass(frozen=True)
class _KnownHead:
    """Rows that were gathered of a head, and what a head that is only called answered then."""

    head: weakref.ref
    pruned: PrunedHead
    answer: Tensor | None  # (1, 1, V)
    width: int

    def still_answers(self) -> bool:
        """Whether the head answers as it did: an adapter of it may have been switched, merged or taken off."""
        head = self.head()
        if head is None or self.answer is None:
            return False
        now = _answer(head, self.width)
        return now.dtype == self.answer.dtype and torch.equal(now, self.answer.to(now.device))


def _answer(head: nn.Module, width: int) -> Tensor:
    """(1, 1, V): what a head says to a vector that none of its rows, and no low rank of a change, is orthogonal to."""
    question = torch.arange(1, width + 1, device=execution_device(head)).cos().to(_dtype_of(head))
    return head(question[None, None]).detach()


def _dtype_of(head: nn.Module) -> torch.dtype:
    return next((p.dtype for p in head.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _are_rows(pruned: PrunedHead, ids: Tensor, head: nn.Linear) -> bool:
    """Whether a head's rows are still those, as far as a few of them tell: adapters are merged in place."""
    if pruned.weight.dtype != head.weight.dtype:
        return False
    if type(head.weight.detach()) is not Tensor:  # quantized: nothing is merged into it in place
        return True
    few = torch.arange(0, len(ids), max(len(ids) // 32, 1))
    now = head.weight.detach()[ids[few.to(ids.device)].to(head.weight.device)]
    return torch.equal(now, pruned.weight[few.to(pruned.weight.device)].to(now.device))


def _call_where_it_is(head: nn.Module, hidden: Tensor) -> Tensor:
    return head(hidden.to(execution_device(head)))


def _rows_by_calling(head: nn.Module, ids: Tensor, width: int, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """weight (V', H) and bias (V',) of a head that can only be called."""
    units = torch.eye(width, device=execution_device(head), dtype=_dtype_of(head))
    bias = head(torch.zeros_like(units[None, :1]))[0, 0]  # a batch of one row: adapters may be chosen by row
    ids = ids.to(bias.device)
    columns = [(head(part[None])[0] - bias)[:, ids] for part in units.split(chunk)]
    return torch.cat(columns).T.contiguous(), bias[ids]
