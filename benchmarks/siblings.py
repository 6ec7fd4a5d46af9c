"""After a token that only a sibling had right: is a drafter's next one right, with its path head, and without?

    python benchmarks/siblings.py --pair FOLDER --data TEXT --out FILE.json

A block drafter's marginals know nothing of the tokens before, so a tree's side branches go on as if its spine had been
right. Counted at random anchors of held-out rows along the target's own text: on the spine (the slot before had the
true token as its best), after a sibling (it had it second to eighth), and at all slots, each given the true token
before; and how often the true token is among the candidates at all, which is what no head can exceed. A third figure
is of the head and the text so far, for drafters that read it.

Beside them what a whole pass knows: the second drafter is shown the true tokens up to one that only a sibling of the
first drafter's block had right, and drafts the next.
"""

import argparse
import json
from pathlib import Path

import torch
from equality import PAIR
from smollm2 import load_smollm2

from hf_d2sd import D2SDAssistant, records
from hf_d2sd.paths import OfText, conditional, rest
from hf_d2sd.training.blocks import NO_LABEL, cut_blocks, draw_anchors, draw_prefix_lengths, true_tokens
from hf_d2sd.training.drafters import Trainee
from hf_d2sd.training.features import compute_features
from hf_d2sd.training.shards import batched, read_rows

SIBLINGS = 8  # ranks that count as one


@torch.inference_mode()
def count(model, target, rows, args) -> dict:
    """Of one drafter: places of each kind, and the share of right next tokens."""
    generator, sums = torch.Generator().manual_seed(0), {}
    trainee, candidates = Trainee(model, target), max(model.config.path_candidates, SIBLINGS)
    base = 0.0 if args.role == "first" else args.prefix_base
    for batch in batched(rows, args.rows):
        anchors = draw_anchors(batch, args.anchors, generator)
        lengths = draw_prefix_lengths(anchors.shape, model.config.block_size, base, generator)
        features = compute_features(target, batch, model.config.target_layer_ids)
        blocks = cut_blocks(batch, features, anchors, lengths, model.config)
        for kind, right in judged(trainee, blocks, candidates).items():
            seen = sums.setdefault(kind, [0, 0])
            seen[0] += len(right)
            seen[1] += int(right.sum())
    return {
        kind: {"places": places, "right": round(right / max(places, 1), 4)} for kind, (places, right) in sums.items()
    }


@torch.inference_mode()
def count_shown(pair, target, rows, args) -> dict:
    """Of the second drafter: its next token after a kept one that the first had second to eighth."""
    generator, places, right = torch.Generator().manual_seed(0), 0, 0
    trainees = [Trainee(model, target) for model in pair.drafters]
    for batch in batched(rows, args.rows):
        anchors = draw_anchors(batch, args.anchors, generator)
        lengths = draw_prefix_lengths(anchors.shape, pair.second.config.block_size, args.prefix_base, generator)
        features = compute_features(target, batch, pair.first.config.target_layer_ids)
        blocks = [
            cut_blocks(batch, features, anchors, kept, trainee.model.config)
            for kept, trainee in zip((torch.zeros_like(lengths), lengths), trainees)
        ]
        tokens, _ = guesses(trainees[0], blocks[0], SIBLINGS)
        ranks, truth = rank_of(tokens, true_tokens(blocks[0])), true_tokens(blocks[1])
        last, here = lengths[..., None], lengths[..., None] + 1  # the last kept token's slot, and the next one
        sibling = (ranks.gather(2, last) > 0) & (ranks.gather(2, last) < SIBLINGS) & (last > 0)
        sibling &= blocks[1].labels.gather(2, here) != NO_LABEL
        drafts = list(guesses(trainees[1], blocks[1], SIBLINGS)[1].values())[-1]  # with its head, if it has one
        places += int(sibling.sum())
        right += int((drafts.gather(2, here) == truth.gather(2, here))[sibling].sum())
    return {"places": places, "right": round(right / max(places, 1), 4)}


def guesses(trainee: Trainee, blocks, candidates: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A drafter's likeliest tokens (B, N, γ, C), and what it drafts (B, N, γ) without and with its path head."""
    model = trainee.model
    hidden = trainee.hidden(blocks)
    logits = trainee._head(hidden).float()  # (B, N, γ, V')
    best = logits.topk(candidates, dim=-1)
    tokens = best.indices if model.config.draft_vocab_size is None else model.draft_token_ids[best.indices]
    drafts = {"without head": tokens[..., 0]}
    if model.path_head is not None:
        labelled = torch.ones_like(blocks.labels, dtype=torch.bool)
        before = trainee._before(true_tokens(blocks).roll(1, -1))[..., None, :].to(hidden.dtype)
        rows = trainee._path_parts.rows(best.indices).to(hidden.dtype)
        others = rest(best.values, logits.logsumexp(-1))
        scores = model.path_head(hidden, before, rows)
        chosen = conditional(best.values, scores, others)[..., 0, :].argmax(-1)
        drafts["with head"] = tokens.gather(-1, chosen[..., None])[..., 0]
        of_text = trainee._of_text(blocks, labelled)
        if of_text is not None:
            said = of_text(slice(None), best.indices.flatten(0, 2))
            said = OfText(said.scores.view(scores.shape), said.left.view(scores.shape[:-1]))
            chosen = conditional(best.values, scores, others, said)[..., 0, :].argmax(-1)
            drafts["with head and text"] = tokens.gather(-1, chosen[..., None])[..., 0]
    return tokens, drafts


def rank_of(tokens: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(B, N, γ): the place of the true token (B, N, γ) among the likeliest ones (B, N, γ, C), C if it is none."""
    found = tokens == truth[..., None]
    return torch.where(found.any(-1), found.int().argmax(-1), tokens.shape[-1])


def judged(trainee: Trainee, blocks, candidates: int) -> dict[str, torch.Tensor]:
    """By kind of place and with or without the head, whether each next token is right."""
    labelled, truth = blocks.labels != NO_LABEL, true_tokens(blocks)
    tokens, drafts = guesses(trainee, blocks, candidates)
    ranks = rank_of(tokens, truth)
    masked_before = labelled.roll(1, -1)
    masked_before[..., 0] = False
    before = ranks.roll(1, -1)
    places = {
        "all": labelled,
        "spine": labelled & masked_before & (before == 0),
        "sibling": labelled & masked_before & (before > 0) & (before < SIBLINGS),
    }
    result = {f"{kind}, {name}": (draft == truth)[at] for kind, at in places.items() for name, draft in drafts.items()}
    return result | {f"{kind}, among the candidates": (ranks < candidates)[at] for kind, at in places.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default=str(PAIR))
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of `hf-d2sd distill`")
    parser.add_argument("--held-out", type=int, default=50, help="as in training")
    parser.add_argument("--max-rows", type=int, default=64)
    parser.add_argument("--anchors", type=int, default=48)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prefix-base", type=float, default=0.8, help="second drafter: of its kept tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target, _ = load_smollm2(getattr(torch, args.dtype))
    pair = D2SDAssistant.from_pretrained(args.pair, dtype=target.dtype)
    rows = [row for row in read_rows(*args.data) if row.is_held_out(args.held_out) and row.response_length >= 16]
    rows = rows[:: max(1, len(rows) // args.max_rows)][: args.max_rows]
    result = {"pair": Path(args.pair).name, "rows": len(rows)}
    for args.role, model in zip(("first", "second"), pair.drafters):
        result[args.role] = count(model.requires_grad_(False), target, rows, args)
    result["second, shown a sibling"] = count_shown(pair, target, rows, args)
    print(json.dumps(result, indent=2))
    if args.out is not None:
        records.write_json(args.out, result)


if __name__ == "__main__":
    main()
