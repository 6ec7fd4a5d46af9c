"""After a token that only a sibling had right: is a drafter's next one right, with its path head, and without?

    python benchmarks/siblings.py --pair FOLDER --data TEXT --out FILE.json

A block drafter's marginals know nothing of the tokens before, so a tree's side branches go on as if its spine had been
right. Counted at random anchors of held-out rows along the target's own text: on the spine (the slot before had the
true token as its best), after a sibling (it had it second to eighth), and at all slots, each given the true token
before; and how often the true token is among the candidates at all, which is what no head can exceed.
"""

import argparse
import json
from pathlib import Path

import torch
from equality import PAIR
from smollm2 import load_smollm2

from hf_d2sd import D2SDAssistant, records
from hf_d2sd.paths import conditional, rest
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
        for kind, right in judged(trainee, model, blocks, candidates).items():
            seen = sums.setdefault(kind, [0, 0])
            seen[0] += len(right)
            seen[1] += int(right.sum())
    return {
        kind: {"places": places, "right": round(right / max(places, 1), 4)} for kind, (places, right) in sums.items()
    }


def judged(trainee: Trainee, model, blocks, candidates: int) -> dict[str, torch.Tensor]:
    """By kind of place and with or without the head, whether each next token is right."""
    labelled, truth = blocks.labels != NO_LABEL, true_tokens(blocks)
    hidden = trainee.hidden(blocks)
    logits = trainee._head(hidden).float()  # (B, N, γ, V')
    best = logits.topk(candidates, dim=-1)
    tokens = best.indices if model.config.draft_vocab_size is None else model.draft_token_ids[best.indices]
    drafts = {"without head": tokens[..., 0]}
    if model.path_head is not None:
        before = trainee._before(truth.roll(1, -1))[..., None, :].to(hidden.dtype)
        rows = trainee._path_parts.rows(best.indices).to(hidden.dtype)
        others = rest(best.values, logits.logsumexp(-1))
        chosen = conditional(best.values, model.path_head(hidden, before, rows), others)[..., 0, :].argmax(-1)
        drafts["with head"] = tokens.gather(-1, chosen[..., None])[..., 0]
    found = tokens == truth[..., None]  # (B, N, γ, C)
    masked_before = labelled.roll(1, -1)
    masked_before[..., 0] = False
    rank_before = torch.where(found.any(-1), found.int().argmax(-1), candidates).roll(1, -1)
    places = {
        "all": labelled,
        "spine": labelled & masked_before & (rank_before == 0),
        "sibling": labelled & masked_before & (rank_before > 0) & (rank_before < SIBLINGS),
    }
    result = {f"{kind}, {name}": (draft == truth)[at] for kind, at in places.items() for name, draft in drafts.items()}
    return result | {f"{kind}, among the candidates": found.any(-1)[at] for kind, at in places.items()}


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
    print(json.dumps(result, indent=2))
    if args.out is not None:
        records.write_json(args.out, result)


if __name__ == "__main__":
    main()
