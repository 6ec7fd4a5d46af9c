"""A new drafter for a target, and the drafter in training: with the target's frozen embedding and head."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import followers, paths
from ..binding import tokenizer_fingerprint
from ..compat import head_sizes
from ..drafting import draft_embedding, draft_head, head_rows
from ..modeling import D2SDDrafterConfig, D2SDDrafterModel, default_target_layer_ids
from .blocks import NO_LABEL, Blocks, masks_by_layer_type, true_tokens
from .losses import Labels, PathParts, path_losses, slot_losses, slot_weights
from .shards import Row

_KNOWN_ROPES = ("default", "linear", "dynamic", "yarn", "llama3")


def drafter_config(target, tokenizer, rows: Iterable[Row], **changes) -> D2SDDrafterConfig:
    """A drafter with the shape of the target's own layers, unless `changes` (values that are not None) say otherwise.

    The mask token is the tokenizer's, or a token that no row holds: the last such one.
    """
    text = target.config.get_text_config(decoder=True)
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    changes = {name: value for name, value in changes.items() if value is not None}
    if "mask_token_id" not in changes:
        changes["mask_token_id"] = tokenizer.mask_token_id
    if changes["mask_token_id"] is None:
        changes["mask_token_id"] = _unused_token(rows, text.vocab_size)
    num_layers = changes.get("num_hidden_layers", 2)
    settings = dict(
        vocab_size=text.vocab_size,
        hidden_size=target.get_input_embeddings().embedding_dim,
        target_hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=min(head_sizes(text)),
        hidden_act=getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None) or "silu",
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        rope_parameters=_rope_parameters(getattr(text, "rope_parameters", None)),
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        num_hidden_layers=num_layers,
        num_target_layers=layers,
        target_layer_ids=default_target_layer_ids(layers, num_layers),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    return D2SDDrafterConfig(**{**settings, **changes})


def _unused_token(rows: Iterable[Row], vocab_size: int) -> int:
    unused = torch.ones(vocab_size, dtype=torch.bool)
    for row in rows:
        unused[row.tokens] = False
    if not unused.any():
        raise ValueError("Every token of the vocabulary occurs in the rows: name one with --mask_token.")
    return int(unused.nonzero()[-1])


def _rope_parameters(parameters: dict | None) -> dict | None:
    """The target's, of its full-attention layers where they differ by layer; all of a head's dimensions turn."""
    if parameters is None:
        return None
    parameters = parameters.get("full_attention", parameters)
    if parameters.get("rope_type", "default") not in _KNOWN_ROPES:
        parameters = {"rope_type": "default", "rope_theta": parameters["rope_theta"]}
    return {name: value for name, value in parameters.items() if name != "partial_rotary_factor"}


def new_drafter(
    config: D2SDDrafterConfig, target, rows: Iterable[Row], init_layers: str, seed: int
) -> D2SDDrafterModel:
    """A drafter in float32 whose feature projection passes the last of its target layers through.

    Args:
        rows: whose tokens choose a pruned draft vocabulary.
        init_layers: "random", or "target": a copy of the target's top layers.

    Raises:
        ValueError: if the target's layers have another shape than the drafter's.
    """
    torch.manual_seed(seed)
    model = D2SDDrafterModel(config).float()
    width = config.target_hidden_size
    with torch.no_grad():
        if config.hidden_size == width:
            model.fc.weight.normal_(std=1e-3)
            model.fc.weight[:, -width:] += torch.eye(width)
        if config.draft_vocab_size is not None:
            model.draft_token_ids.copy_(frequent_tokens(rows, config))
    if init_layers == "target":
        _copy_top_layers(model, target)
    return model


def frequent_tokens(rows: Iterable[Row], config: D2SDDrafterConfig, response_weight: int = 4) -> Tensor:
    """(V',), ascending: the tokens that rows hold most often, and the end of the sequence; low ids where too few."""
    counts = torch.zeros(config.vocab_size, dtype=torch.long)
    for row in rows:
        counts += row.tokens[: row.prompt_length].bincount(minlength=config.vocab_size)
        counts += response_weight * row.tokens[row.prompt_length :].bincount(minlength=config.vocab_size)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    counts[[end for end in ends if end is not None]] = counts.max() + 1
    return counts.argsort(descending=True, stable=True)[: config.draft_vocab_size].sort().values


def _copy_top_layers(model: D2SDDrafterModel, target) -> None:
    sources = target.get_decoder().layers[-len(model.layers) :]
    for layer, source in zip(model.layers, sources, strict=True):
        there = source.state_dict()
        for name, tensor in layer.state_dict().items():
            if name not in there or there[name].shape != tensor.shape:
                seen = tuple(there[name].shape) if name in there else "missing"
                raise ValueError(
                    f"init_layers='target': the target's layers have {name} {seen}, the drafter's "
                    f"{tuple(tensor.shape)}. Use init_layers='random', or widths like the target's."
                )
            tensor.copy_(there[name])
    model.norm.load_state_dict(target.get_decoder().norm.state_dict())


class Trainee(nn.Module):
    """A drafter in training. Its parameters are the drafter's alone; the target's embedding and head are called.

    Args:
        loss: scheme of `slot_weights`, with its `tau`.
        chunk: slots whose logits exist at a time.
        path_head_alone: whether the rest of the drafter stays as it is.
        soft: where blocks have a teacher, the share of the loss that is cross-entropy to it.
    """

    def __init__(
        self,
        model: D2SDDrafterModel,
        target,
        loss: str = "decay",
        tau: float = 4.0,
        chunk: int = 1024,
        soft: float = 0.5,
        path_head_alone: bool = False,
    ):
        super().__init__()
        self._soft, self._path_head_alone = soft, path_head_alone
        if path_head_alone:
            model.requires_grad_(False).path_head.requires_grad_(True)
        self.model = model
        self._loss, self._tau, self._chunk = loss, tau, chunk
        head, dtype = draft_head(model, target.get_output_embeddings()), target.dtype
        self._embed = (draft_embedding(model, target.get_input_embeddings()),)  # in a tuple: no submodule
        self._head = lambda hidden: head(hidden.to(dtype))
        self._path_parts = None
        if model.path_head is not None:
            rows, ids = head_rows(model, target.get_output_embeddings()), getattr(model, "draft_token_ids", None)

            @torch.no_grad()
            def rows_at(places: Tensor) -> Tensor:
                return rows(places, places if ids is None else ids.to(places.device)[places])

            frozen = torch.no_grad()(lambda tokens: self._embed[0](tokens))
            self._before, at = model.path_head.tables(frozen, rows_at)
            self._path_parts = PathParts(model.path_head, self._head, at, model.config.path_candidates)
        self._draft_index = None  # (V,): a token's index among the head's outputs
        if model.config.draft_vocab_size is not None:
            index = torch.full((model.config.vocab_size,), NO_LABEL)
            index[model.draft_token_ids.cpu()] = torch.arange(model.config.draft_vocab_size)
            self._draft_index = index

    def hidden(self, blocks: Blocks) -> Tensor:
        """(B, N, γ, H)."""
        (embed,), config = self._embed, self.model.config
        tokens, positions = _slots(blocks, config)
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.own_embedding):
            embeds = embed(tokens)
        dtype = self.model.fc.weight.dtype
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._path_head_alone):
            output = self.model(
                noise_embeds=embeds.to(blocks.context.device, dtype),
                context_hidden_states=blocks.context.to(dtype),
                position_ids=positions,
                attention_mask=masks_by_layer_type(blocks, config),
                block_slots=config.block_slots,
            )
        hidden = output.last_hidden_state.view(*blocks.labels.shape[:2], config.block_slots, -1)
        if config.drafts_from_anchor:  # what slot k says is of place k + 1
            hidden = nn.functional.pad(hidden, (0, 0, 1, 0))
        return hidden

    def logits(self, blocks: Blocks) -> Tensor:
        """(M, V'): of the M slots that have labels."""
        return self._head(self.hidden(blocks)[blocks.labels != NO_LABEL]).float()

    def guesses(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Of the M slots that have labels the logits (M, V'), and each one's draft, a place among them (M,).

        By a path head, and where the text so far is read, both are given the true token before. At temperatures other
        than 1 what the text leaves of other tokens is then about what drafts have.
        """
        labelled = blocks.labels != NO_LABEL
        hidden = self.hidden(blocks)[labelled]
        logits, parts, of_text = self._head(hidden).float(), self._path_parts, self._of_text(blocks, labelled)
        if parts is None and of_text is None:
            return logits, logits.argmax(-1)
        best = logits.topk(min(self.model.config.path_candidates, logits.shape[-1]), dim=-1)
        scores = torch.zeros_like(best.values)
        said = None if of_text is None else of_text(slice(None), best.indices)
        if parts is not None:
            rows = parts.rows(best.indices).to(hidden.dtype)
            scores = parts.path_head(hidden, self._truth_before(blocks, labelled).to(hidden)[:, None], rows)[:, 0]
        others = paths.rest(best.values, logits.logsumexp(-1))
        given, left = (x[:, 0] for x in paths.corrected(best.values, scores[:, None], others, said))
        places = best.indices.gather(1, given.argmax(-1, keepdim=True))[:, 0]
        shift = torch.where(others.isfinite(), others - left, 0.0)  # others' logits stay as they are
        return logits.scatter(1, best.indices, given + shift[:, None]), places

    def _truth_before(self, blocks: Blocks, labelled: Tensor) -> Tensor:
        """(M, ...): the path head's vectors of the true tokens before the labelled slots; none is a block's first."""
        return self._before(true_tokens(blocks).roll(1, -1)[labelled])

    def _of_text(self, blocks: Blocks, labelled: Tensor) -> Callable[[slice, Tensor], paths.OfText] | None:
        """What gives, of some of the M labelled slots, what the text says of candidates at places (m, C), A being 1.

        The text is that before the block's anchor, which included; as when drafts are made.
        """
        weight, texts = self.model.config.path_text_weight, blocks.texts
        if weight is None or texts is None:
            return None
        row, block, _ = labelled.nonzero(as_tuple=True)
        ends, before = blocks.anchors[row, block], true_tokens(blocks).roll(1, -1)[labelled]
        ids = getattr(self.model, "draft_token_ids", None)
        known = torch.arange(1, texts.shape[1], device=texts.device)

        def said(some: slice, places: Tensor) -> paths.OfText:
            tokens = places if ids is None else ids.to(places.device)[places]
            of_rows = texts[row[some]]
            pairs = torch.stack([of_rows[:, :-1], of_rows[:, 1:]])
            pairs = pairs.masked_fill(known > ends[some, None], followers.NOTHING)  # (2, m, T - 1)
            found = followers.of_text(pairs, before[some, None, None], tokens[:, None], weight)
            return paths.OfText(found.scores[:, 0], found.left[:, 0])

        return said

    def forward(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
        """The loss (), which slots are right (B, N, γ), and the draft's probability of the label (B, N, γ)."""
        labelled = blocks.labels != NO_LABEL
        labels = blocks.labels[labelled]
        if self._draft_index is not None:
            labels = self._draft_index.to(labels.device)[labels]  # outside the draft vocabulary: NO_LABEL
        wanted = Labels(labels)
        if blocks.teacher_ids is not None:
            ids = blocks.teacher_ids[labelled]
            ids = ids if self._draft_index is None else self._draft_index.to(ids.device)[ids]
            wanted = Labels(labels, ids, blocks.teacher_log_probs[labelled], self._soft)
        losses, entropies, right = self._losses(self.hidden(blocks)[labelled], wanted, blocks, labelled)
        spread = torch.full(labelled.shape, torch.inf, device=losses.device)
        spread[labelled] = torch.where(labels != NO_LABEL, entropies, torch.inf)
        weights = slot_weights(self._loss, spread, spread.isfinite() | spread.isnan(), blocks.distance, self._tau)
        weights = weights[labelled]
        hits = torch.zeros_like(labelled)
        hits[labelled] = right
        return (losses * weights).sum() / weights.sum().clamp(min=1e-9), hits, torch.exp(-spread)

    def _losses(self, hidden: Tensor, wanted: Labels, blocks: Blocks, labelled: Tensor) -> tuple[Tensor, ...]:
        """Of each of M slots (M, H) the loss, the cross-entropy of its token, and whether the best one is right; (M,).

        With a path head the latter two are given the true token before, and the loss is the sum of both heads'.
        """
        if self._path_parts is None:
            return slot_losses(hidden, wanted, self._head, self._chunk)
        before = self._truth_before(blocks, labelled).to(hidden.device, hidden.dtype)
        of_text = self._of_text(blocks, labelled)
        given, right = path_losses(hidden.detach(), before, wanted.tokens, self._path_parts, self._chunk, of_text)
        if self._path_head_alone:
            return given, given.detach(), right
        losses, _, _ = slot_losses(hidden, wanted, self._head, self._chunk)
        return losses + given, given.detach(), right


def _slots(blocks: Blocks, config: D2SDDrafterConfig) -> tuple[Tensor, Tensor]:
    """Tokens (B, N·S) of the slots that the network sees, and positions (B, T + N·S) of the context and of these."""
    if not config.drafts_from_anchor:
        return blocks.tokens, blocks.position_ids
    past, own = blocks.position_ids.split([blocks.context.shape[1], blocks.tokens.shape[1]], dim=1)
    tokens, own = (x.view(blocks.labels.shape)[..., : config.block_slots].flatten(1) for x in (blocks.tokens, own))
    return tokens, torch.cat([past, own], dim=1)
