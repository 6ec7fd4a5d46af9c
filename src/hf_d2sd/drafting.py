"""The drafters at work: each denoises blocks over its own cache of the committed tokens' features."""

import contextlib
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import Nodes, TreeAttention, TreePlan
from .cache import TreeCache
from .expansion import Guesses, Paths
from .modeling import D2SDDrafterModel
from .target import TargetPass, execution_device
from .tree import Branches


@dataclass(frozen=True)
class Draft:
    """What the drafter says of the positions 1..γ-1 of each block: its own choice, and what that is chosen from."""

    tokens: Tensor  # (B, K, γ-1)
    confidence: Tensor  # (B, K, γ-1), its probability of that token
    logits: Tensor | None = None  # (B, K, γ-1, V'), over the confidence temperatures
    token_ids: Tensor | None = None  # (V',), the tokens of a pruned draft vocabulary

    def guesses(self, width: int) -> Guesses:
        """The W = `width` likeliest tokens of each position; fewer where the draft vocabulary has fewer."""
        best = self.logits.topk(min(width, self.logits.shape[-1]), dim=-1)
        log_probs = best.values - self.logits.logsumexp(-1, keepdim=True)
        return Guesses(self._tokens(best.indices), log_probs.to(self.tokens.device))

    def samples(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For each row, `count` draws from the first block's distributions: tokens and probabilities (B, K, γ-1)."""
        probabilities = self.logits[:, 0].softmax(-1)  # (B, γ-1, V')
        drawn = probabilities.flatten(0, 1).multinomial(count, replacement=True, generator=generator)
        drawn = drawn.view(*probabilities.shape[:2], count)
        confidence = probabilities.gather(-1, drawn).transpose(1, 2)
        return self._tokens(drawn).transpose(1, 2), confidence.to(self.tokens.device)

    def _tokens(self, indices: Tensor) -> Tensor:
        tokens = indices if self.token_ids is None else self.token_ids[indices.to(self.token_ids.device)]
        return tokens.to(self.tokens.device)


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
        self._embed, self._head = target.get_input_embeddings(), draft_head(model, target.get_output_embeddings())
        self._generator = torch.Generator(execution_device(target.get_output_embeddings())).manual_seed(0)  # not yours
        self._attention = TreeAttention.for_model(model, backend, two_sided=True)
        self._fixed: tuple[int, int, Callable] | None = None  # capacity, width of the new context, compiler
        self._run = model
        self._nodes = {}  # (B, K, γ) → what the queries of such blocks see of each other

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
        self._head_dtype = features.dtype

    def select(self, staying: list[int]) -> None:
        """Let all rows but the given ones leave the batch."""
        self.context.select(staying)

    def fix(self, capacity: int, width: int, compiler: Callable) -> None:
        """Once the prompt is known, draft with buffers of so many tokens and `width` new ones, by compiled passes."""
        self._fixed = capacity, width, compiler

    def unfix(self) -> None:
        self.context.cache.unfix()
        self._fixed, self._run = None, self.model

    def draft(self, anchor: Tensor, block_size: int) -> Draft:
        """The first draft: one block after each anchor (B,), all of it masked. K is 1."""
        return self._denoise(self._masked_blocks(anchor, 1, block_size))

    def redraft(self, anchor: Tensor, tokens: Tensor, prefix_lengths: Tensor, block_size: int) -> Branches:
        """The second draft: K blocks a row in one pass, each keeping a prefix of the first block's tokens (B, γ-1)."""
        draft = self.redraft_paths(anchor, Paths(tokens[:, None], prefix_lengths), block_size)
        return Branches(prefix_lengths, draft.tokens, draft.confidence)

    def redraft_paths(self, anchor: Tensor, paths: Paths, block_size: int) -> Draft:
        """K blocks a row in one pass, each keeping the tokens of one of the row's paths and masked after it."""
        blocks = self._masked_blocks(anchor, paths.lengths.shape[1], block_size)
        size = min(paths.tokens.shape[2], block_size - 1)
        kept = torch.arange(size, device=anchor.device) < paths.lengths[..., None]  # (B, K, size)
        blocks[..., 1 : 1 + size] = torch.where(kept, paths.tokens[..., :size], blocks[..., 1 : 1 + size])
        return self._denoise(blocks)

    def sample_branches(self, draft: Draft, prefix_lengths: Tensor) -> Branches:
        """Branches without another pass: after each kept prefix, draws from the first draft's own distributions."""
        return Branches(prefix_lengths, *draft.samples(prefix_lengths.shape[1], self._generator))

    def _masked_blocks(self, anchor: Tensor, count: int, block_size: int) -> Tensor:
        blocks = anchor.new_full((len(anchor), count, block_size), self.model.config.mask_token_id)
        blocks[..., 0] = anchor[:, None]
        return blocks

    def _denoise(self, blocks: Tensor) -> Draft:
        """One forward for all blocks (B, K, γ): a row's are one long query over its one context."""
        rows, count, block_size = blocks.shape
        context, counts = self.context.take()  # (B, C, F)
        if self.context.cache.layers[0].fixed is not None:
            context = nn.functional.pad(context, (0, 0, 0, self._fixed[1] - context.shape[1]))
        before = self.context.lengths(rows)
        lengths = [length + new for length, new in zip(before, counts)]
        width, size = context.shape[1], count * block_size
        # The new context goes behind each row's, the blocks behind the longest.
        start = max(before) + width
        capacity = self.context.cache.layers[0].fixed
        if capacity is not None:
            start = capacity
        if capacity is not None or min(before) < max(before) or min(counts) < width:
            slots = _slots(before, width, start, size, self.device)
            self.context.cache.place(slots, start + size)
        nodes = self._block_nodes(rows, count, block_size)
        types = self._attention.windows
        prepared = self._attention.prepare(
            nodes, self.context.cache, dict.fromkeys(types, start), dict.fromkeys(types, lengths), self.dtype
        )
        with without_embed_norm(self._embed):
            embeds = self._embed(blocks.view(rows, -1))
        with self._attention.active(prepared):
            hidden = self._run(
                noise_embeds=embeds.to(self.device, self.dtype),
                context_hidden_states=context,
                position_ids=self._positions(counts, width, nodes.depths),
                attention_mask=dict.fromkeys(types, prepared) if isinstance(prepared, TreePlan) else prepared,
                cache=self.context.cache,
            ).last_hidden_state
        self.context.cache.place(None)
        self.context.cache.set_lengths(lengths)
        if self._fixed is not None and capacity is None:
            capacity, _, compiler = self._fixed
            self.context.cache.fix(capacity, size)
            self._run = compiler(self.model)
        if self._run is not self.model:  # CUDA graphs write their next results to the same place
            hidden = hidden.clone()
        hidden = hidden.view(rows * count, block_size, -1)[:, 1:]
        # One row of tokens, side by side: for a view with gaps a linear layer may copy its weight for every block.
        logits = self._head(hidden.reshape(1, -1, hidden.shape[-1]).to(self._head_dtype))
        return self._read(logits.view(rows, count, block_size - 1, -1), blocks.device)

    def _block_nodes(self, rows: int, count: int, block_size: int) -> Nodes:
        shape = rows, count, block_size
        if shape not in self._nodes:
            self._nodes[shape] = Nodes.of_blocks(*shape, self.device)
        return self._nodes[shape]

    def _positions(self, counts: list[int], width: int, depths: Tensor) -> Tensor:
        """(B, C + K·γ): of the new context, whose filling may stand anywhere, and of the blocks."""
        starts = torch.tensor(self.context.positions, device=self.device)[:, None]
        new = starts - torch.tensor(counts, device=self.device)[:, None] + torch.arange(width, device=self.device)
        return torch.cat([new, starts + depths], dim=1)

    def _read(self, logits: Tensor, device: torch.device) -> Draft:
        logits = logits.float()  # (B, K, γ-1, V)
        temperatures = self.model.config.confidence_temperatures
        if temperatures is not None:
            logits = logits / logits.new_tensor(temperatures[: logits.shape[2]])[:, None]
        best = logits.max(-1)
        confidence = (best.values - logits.logsumexp(-1)).exp()
        tokens = best.indices
        token_ids = self.model.draft_token_ids if self.model.config.draft_vocab_size is not None else None
        if token_ids is not None:
            tokens = token_ids[tokens.to(self.device)]
        return Draft(tokens.to(device), confidence.to(device), logits, token_ids)


def _slots(before: list[int], width: int, start: int, size: int, device: torch.device) -> Tensor:
    """(B, C + K·γ): where the new context and the blocks go, in rows that hold `before` tokens."""
    context = torch.tensor(before)[:, None] + torch.arange(width)
    blocks = torch.arange(start, start + size).expand(len(before), -1)
    return torch.cat([context, blocks], dim=1).to(device)


@dataclass
class DraftContext:
    """The committed tokens as one drafter knows them: some in its cache, the newest still as features."""

    cache: TreeCache
    positions: list[int] | None = None  # by row, of the token after the last known one: the anchor
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
        self.waiting = (*(part for part in self.waiting if part[0].shape[1]), (features, counts))
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
        joined.scatter_(1, place[..., None].expand_as(features), features)
        ends += own
    return joined[:, :-1], totals


@dataclass(frozen=True)
class PrunedHead:
    """A head of V' tokens: the rows of a target's that belong to a pruned draft vocabulary, or a drafter's own."""

    weight: Tensor  # (V', H)
    bias: Tensor | None  # (V',)

    def __call__(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.to(self.weight), self.weight, self.bias)


def draft_head(model: D2SDDrafterModel, head: nn.Module) -> Callable[[Tensor], Tensor]:
    """What gives a drafter's logits: the target's head or the drafter's own, scaled and capped as its config says."""
    config = model.config
    read = PrunedHead(model.lm_head.weight, None) if config.own_head else _target_head(model, head)
    multiplier, cap = config.output_multiplier, config.final_logit_softcapping
    if multiplier == 1.0 and cap is None:
        return read

    def scaled(hidden: Tensor) -> Tensor:
        logits = read(hidden) * multiplier
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return scaled


def _target_head(model: D2SDDrafterModel, head: nn.Module) -> Callable[[Tensor], Tensor]:
    """The target's head, or for a pruned draft vocabulary its rows; these are gathered once for a target.

    Of a plain linear head the rows are read; any other head, a quantized one say, is called on the unit vectors.
    """
    if model.config.draft_vocab_size is None:
        return functools.partial(_call_where_it_is, head)
    known = getattr(model, "_pruned_head", None)
    plain = type(head) is nn.Linear and head.weight.device.type != "meta"
    if known is not None and known[0]() is head and (not plain or known[1].weight.dtype == head.weight.dtype):
        return known[1]
    if plain:
        ids = model.draft_token_ids.to(head.weight.device)
        weight = head.weight.detach()[ids]
        bias = head.bias.detach()[ids] if head.bias is not None else None
    else:
        weight, bias = _rows_by_calling(head, model.draft_token_ids, model.config.hidden_size)
    device = execution_device(model.fc)
    pruned = PrunedHead(weight.to(device), bias.to(device) if bias is not None else None)
    model._pruned_head = (weakref.ref(head), pruned)
    return pruned


def _call_where_it_is(head: nn.Module, hidden: Tensor) -> Tensor:
    return head(hidden.to(execution_device(head)))


def _rows_by_calling(head: nn.Module, ids: Tensor, width: int, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """weight (V', H) and bias (V',) of a head that can only be called."""
    dtype = next((p.dtype for p in head.parameters() if p.is_floating_point()), torch.get_default_dtype())
    units = torch.eye(width, device=execution_device(head), dtype=dtype)
    bias = head(torch.zeros_like(units[:1]))[0]
    ids = ids.to(bias.device)
    columns = [(head(part) - bias)[:, ids] for part in units.split(chunk)]
    return torch.cat(columns).T.contiguous(), bias[ids]


@contextlib.contextmanager
def without_embed_norm(embed: nn.Module):
    """Some targets norm their embeddings inside the module; drafters read them before that norm, as native DFlash."""
    norm = getattr(embed, "embed_norm", None)
    if norm is None:
        yield
        return
    try:
        embed.embed_norm = nn.Identity()
        yield
    finally:
        embed.embed_norm = norm
