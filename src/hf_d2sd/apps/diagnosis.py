"""Why drafts are bad: each suspicion is tried on text that the target has written, by the training's own forward."""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..modeling import D2SDAssistant, D2SDDrafterModel
from .findings import Finding, fine, note, wrong
from .loading import Pair
from .parity import Row, Trainee, compute_features, cut_blocks

_KEPT = {"first": 0, "second": 2}  # at what prefix length a role is judged
_LONGEST_KEPT = 3
_BLOCKS = 32  # of each row
_CLEAR = 3.0  # standard errors


@dataclass(frozen=True)
class Trial:
    """How often a drafter's next token is the target's own, over the same M places in every trial."""

    right: Tensor  # (M,) bool

    @property
    def accuracy(self) -> float:
        return float(self.right.float().mean()) if len(self.right) else 0.0

    def beats(self, other: "Trial") -> bool:
        """Clearly: of the places that one alone has right, by McNemar's test."""
        wins = int((self.right & ~other.right).sum())
        losses = int((other.right & ~self.right).sum())
        return wins - losses > _CLEAR * math.sqrt(max(wins + losses, 1))


class Bench:
    """Replies of the target, with the features of any of its layers.

    Args:
        rows: the target's own text, after a prompt each.
    """

    def __init__(self, target, rows: Sequence[Row]):
        self._target = target
        self._rows = [row for row in rows if row.response_length > _LONGEST_KEPT + 2]
        self._layers: dict[int, list[Tensor]] = {}  # by layer, (T, H) of each row

    def __len__(self) -> int:
        return len(self._rows)

    def features(self, layer_ids: Sequence[int]) -> list[Tensor]:
        missing = sorted(set(layer_ids) - self._layers.keys())
        if missing:
            whole = compute_features(self._target, self._rows, missing)
            for at, layer in enumerate(missing):
                width = whole[0].shape[1] // len(missing)
                self._layers[layer] = [row[:, at * width : (at + 1) * width] for row in whole]
        return [torch.cat([self._layers[layer][row] for layer in layer_ids], 1) for row in range(len(self._rows))]

    @torch.inference_mode()
    def try_out(
        self,
        model: D2SDDrafterModel,
        kept: int,
        layer_ids: Sequence[int] | None = None,
        mask: int | None = None,
        rows: int | None = None,
    ) -> Trial:
        """The first token after `kept` shown ones, at places spread over the replies.

        Args:
            layer_ids, mask: other ones than the drafter's config has.
            rows: how many of the replies; default: all.
        """
        config = copy.copy(model.config)
        config.mask_token_id = config.mask_token_id if mask is None else mask
        trainee, right = Trainee(model, self._target), []
        features = self.features(config.target_layer_ids if layer_ids is None else layer_ids)
        for row, own in list(zip(self._rows, features))[:rows]:
            anchors = _places(row, kept)[None]
            blocks = cut_blocks([row], [own], anchors, torch.full_like(anchors, kept), config)
            right.append(trainee(blocks)[1][blocks.distance == 1].cpu())
        return Trial(torch.cat(right))

    def best(self, model: D2SDDrafterModel, kept: int, changes: Sequence[dict]) -> tuple[dict, Trial] | None:
        """The change that makes the drafter best on one reply, with its trial on all of them.

        Args:
            changes: the likeliest first, which another one must clearly beat.
        """
        if not changes:
            return None
        best = max(changes, key=lambda change: self.try_out(model, kept, **change, rows=1).accuracy)
        likeliest, other = ((change, self.try_out(model, kept, **change)) for change in (changes[0], best))
        return other if other[1].beats(likeliest[1]) else likeliest


def _places(row: Row, kept: int) -> Tensor:
    """(N,), different anchors, 32 at most, spread over a response, each with a token to draft behind the kept ones."""
    return torch.linspace(row.prompt_length, len(row.tokens) - kept - 2, _BLOCKS).long().unique()


def check_roles(assistant: D2SDAssistant, bench: Bench) -> Finding:
    """Whether the two drafters stand in each other's place: only the second learns to go on after kept prefixes."""
    if assistant.second is None:
        return note("roles", "There is a first drafter alone: it decodes as DFlash does.")
    first, second = assistant.first, assistant.second
    lengths = [
        kept
        for kept in range(1, _LONGEST_KEPT + 1)
        if kept < min(first.config.block_size, second.config.block_size) - 1
    ]
    if not lengths or not len(bench):
        return note("roles", "The blocks are too short to tell the drafters' roles.")
    mine, other = (
        Trial(torch.cat([bench.try_out(model, kept).right for kept in lengths])) for model in (second, first)
    )
    words = f"After kept prefixes the second drafter's next token is right in {mine.accuracy:.0%} of places"
    if other.beats(mine):
        return wrong(
            "roles",
            f"{words}, the first's in {other.accuracy:.0%}: the drafters are swapped, or the second was trained as a "
            "first.",
            "Name them in the other order: --drafters FIRST SECOND, or join them again.",
        )
    return fine("roles", f"{words}, the first's in {other.accuracy:.0%}.")


def diagnose(pair: Pair, bench: Bench) -> Iterator[Finding]:
    """For each drafter, what other layers or mask token make it clearly better; in the end, what that leaves."""
    for role, kept in _KEPT.items():
        model = getattr(pair.assistant, role)
        if model is None or kept >= model.config.block_size - 1 or not len(bench):
            continue
        present = bench.try_out(model, kept)
        better = [
            finding
            for finding in (_other_layers(role, model, kept, bench, present), _other_mask(role, pair, bench, present))
            if finding is not None
        ]
        yield from better
        if not better and present.accuracy < 0.2:
            yield wrong(
                "weights",
                f"The {role} drafter's next token is right in {present.accuracy:.0%} of places, and no order of its "
                "layers and no mask token makes it better.",
                "Its weights are damaged, or were trained for another target or another kind of text: get them again, "
                "or train.",
            )


def _other_layers(role: str, model: D2SDDrafterModel, kept: int, bench: Bench, present: Trial) -> Finding | None:
    ids = list(model.config.target_layer_ids)
    found = bench.best(model, kept, [{"layer_ids": order} for order in _orders(ids, model.config)])
    if found is None or not found[1].beats(present):
        return None
    best, trial = list(found[0]["layer_ids"]), found[1]
    return wrong(
        "layers",
        f"With target_layer_ids {best} the {role} drafter's next token is right in {trial.accuracy:.0%} of places, "
        f"with its config's {ids} in {present.accuracy:.0%}.",
        f"Set target_layer_ids to {best} in config.json.",
    )


def _orders(ids: list[int], config) -> list[tuple[int, ...]]:
    """Other orders of the layers, the rising one first, and the same ids counted from one layer before or behind."""
    permutations = itertools.permutations(sorted(ids)) if len(ids) <= 4 else [sorted(ids), sorted(ids)[::-1]]
    layers = config.num_target_layers or max(ids) + 1
    shifted = [[i + by for i in sorted(ids)] for by in (-1, 1)]
    possible = [tuple(order) for order in [*permutations, *shifted] if 0 <= min(order) and max(order) < layers]
    return [order for order in dict.fromkeys(possible) if list(order) != ids]


def _other_mask(role: str, pair: Pair, bench: Bench, present: Trial) -> Finding | None:
    """Tried are the tokenizer's special tokens, of which one usually is the mask token, and the other drafter's."""
    model = getattr(pair.assistant, role)
    tokenizer, config = pair.tokenizer, model.config
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    special |= {drafter.config.mask_token_id for drafter in pair.assistant.drafters}
    size = pair.target.config.get_text_config(decoder=True).vocab_size
    candidates = sorted(token for token in special if token != config.mask_token_id and token < size)
    found = bench.best(model, _KEPT[role], [{"mask": token} for token in candidates[:64]])
    if found is None or not found[1].beats(present):
        return None
    best, trial = found[0]["mask"], found[1]
    return wrong(
        "mask token",
        f"With {best} ({tokenizer.decode([best])!r}) as mask token the {role} drafter's next token is right in "
        f"{trial.accuracy:.0%} of places, with its config's {config.mask_token_id} "
        f"({tokenizer.decode([config.mask_token_id])!r}) in {present.accuracy:.0%}.",
        f"Set mask_token_id to {best} in config.json, or to the token that the drafter was trained with.",
    )
