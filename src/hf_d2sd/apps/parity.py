"""Whether a pair decodes as it was trained, and whether texts with drafters are the target's own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..candidates import Draft
from ..compat import read_text
from ..drafting import Drafter
from ..modeling import D2SDDrafterModel
from ..target import TargetPass
from .answering import Answer, AnswerOptions, answer
from .findings import Finding, fine, note, wrong
from .loading import Pair

try:
    from ..training.blocks import cut_blocks
    from ..training.drafters import Trainee
    from ..training.features import compute_features
    from ..training.shards import Row
except ImportError as error:
    raise ImportError("hf-d2sd doctor compares with the training's forward: pip install 'hf-d2sd[train]'.") from error


@dataclass(frozen=True)
class Reply:
    """A prompt answered both ways."""

    plain: Answer
    drafted: Answer
    gap: float | None = None  # between the logits of the two tokens where the texts part
    resolution: float = 0.0  # what such logits can differ by, for rounding alone

    @property
    def row(self) -> Row:
        """The plain text, to train on or to compare with."""
        tokens = torch.tensor(self.plain.sequence)
        return Row(tokens, len(tokens) - len(self.plain.tokens))


def reply_both_ways(pair: Pair, options: AnswerOptions, input_ids: Tensor) -> Reply:
    plain, drafted = (answer(pair, options, input_ids, plain=way) for way in (True, False))
    if plain.tokens == drafted.tokens:
        return Reply(plain, drafted)
    return Reply(plain, drafted, *_gap(pair, plain, drafted))


@torch.inference_mode()
def _gap(pair: Pair, plain: Answer, drafted: Answer) -> tuple[float, float]:
    """How far apart the target's logits are where two replies part, and what rounding in its dtype is worth there."""
    both = list(zip(plain.sequence, drafted.sequence))
    at = next((i for i, (a, b) in enumerate(both) if a != b), None)
    if at is None:  # one goes on where the other ends
        return torch.inf, 0.0
    logits = pair.target(torch.tensor([plain.sequence[:at]], device=pair.target.device)).logits[0, -1].float()
    one, other = logits[list(both[at])]
    return float((one - other).abs()), 4 * torch.finfo(pair.target.dtype).eps * float(logits.abs().max())


def check_texts(replies: Sequence[Reply], dtype: str) -> Finding:
    """In words, whether greedy texts with drafters are the plain ones, and how near the tokens were if not."""
    tokens = sum(len(reply.plain.tokens) for reply in replies)
    parted = [(reply.gap, reply.resolution) for reply in replies if reply.gap is not None]
    ran = f"{len(replies)} prompts, {tokens} tokens, {dtype}"
    if not parted:
        return fine("texts", f"With drafters the greedy texts are those of plain generate ({ran}).")
    gaps = ", ".join(f"{gap:.2g}" for gap, _ in parted)
    if all(gap <= resolution for gap, resolution in parted):
        return note(
            "texts",
            f"{len(parted)} of {len(replies)} greedy texts part from plain generate's where the target's two best "
            f"logits are {gaps} apart, which is rounding in {dtype} ({ran}).",
            "Both are the target's own choice; in float32 they agree.",
        )
    return wrong(
        "texts",
        f"{len(parted)} of {len(replies)} greedy texts part from plain generate's, where the target's logits are "
        f"{gaps} apart: that is no rounding ({ran}).",
        "Try --attention_backend eager, and report it with the output of this command.",
    )


# The training's forward and the decoding's ---------------------------------------------------------------------------


def check_forwards(pair: Pair, rows: Sequence[Row]) -> Iterator[Finding]:
    """Each drafter's draft of the same blocks by decoding and by the training's one masked forward."""
    for role, kept in (("first", (0,)), ("second", (0, 1, 2))):
        model = getattr(pair.assistant, role)
        if model is not None:
            yield _check_forward(pair.target, role, model, rows, [v for v in kept if v < model.config.block_size - 1])


def _check_forward(target, role: str, model: D2SDDrafterModel, rows: Sequence[Row], kept: list[int]) -> Finding:
    pairs: list[tuple[Tensor, Tensor]] = []
    for row in rows:
        anchors = _anchors(row, model.config.block_size)
        wanted = training_logits(target, model, row, [(anchor, v) for anchor in anchors for v in kept])
        seen = [logits for anchor in anchors for logits in decoding_logits(target, model, row, anchor, kept)]
        pairs += zip(wanted, seen, strict=True)
    if not pairs:
        return note("forward", f"{role}: the replies are too short to compare its two forwards.")
    worst = max(float((wanted - seen).abs().max()) for wanted, seen in pairs)
    largest = max(float(wanted.abs().max()) for wanted, _ in pairs)
    words = f"{role}: {len(pairs)} blocks by decoding and by the training's forward differ by at most {worst:.1e}"
    if worst <= 1e-3 * max(largest, 1.0):
        return fine("forward", f"{words}.")
    return wrong(
        "forward",
        f"{words}, with logits up to {largest:.3g}.",
        "Decoding does not compute what was trained. Try --attention_backend eager, and report it.",
    )


def _anchors(row: Row, block_size: int) -> list[int]:
    """The response's first token and one further on, where a whole block follows."""
    last = len(row.tokens) - block_size
    return sorted({at for at in (row.prompt_length, row.prompt_length + 7) if at <= last})


@torch.inference_mode()
def training_logits(target, model: D2SDDrafterModel, row: Row, places: list[tuple[int, int]]) -> list[Tensor]:
    """(γ - 1 - v, V') for each anchor and length of a kept prefix v, by the forward that a drafter is trained with."""
    if not places:
        return []
    features = compute_features(target, [row], model.config.target_layer_ids)
    anchors, kept = torch.tensor(places).T[:, None]
    blocks = cut_blocks([row], features, anchors, kept, model.config)
    counts = [model.config.block_size - 1 - v for _, v in places]
    return list(Trainee(model, target).logits(blocks).split(counts))


@torch.inference_mode()
def decoding_logits(target, model: D2SDDrafterModel, row: Row, anchor: int, kept: list[int]) -> list[Tensor]:
    """The same by decoding: features go through the drafter's cache, the blocks are branches of one draft."""
    ids, size = row.tokens[None, :anchor].to(target.device), model.config.block_size
    last, states = read_text(target, ids, model.config.target_layer_ids)
    drafter = Drafter(model, target)
    drafter.extend(TargetPass(last, states), [anchor])
    block = row.tokens[anchor : anchor + size].to(target.device)
    tokens = block[1:].expand(1, len(kept), -1)
    prefixes = Draft.of(tokens, torch.ones(tokens.shape), torch.tensor([kept], device=target.device))
    logits = drafter.redraft(block[:1], prefixes, size).logits
    assert logits is not None
    logits = logits[0]  # (K, γ-1, V')
    temperatures = model.config.confidence_temperatures or [1.0] * (size - 1)
    logits = logits * logits.new_tensor(temperatures)[:, None]
    return [own[v:] for own, v in zip(logits, kept)]
