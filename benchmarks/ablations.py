"""What each option of `hf-d2sd train` is worth: the same short run of a first drafter with one option changed.

    python benchmarks/ablations.py --target TARGET --data TEXT --work FOLDER --out FILE.json

TEXT is a folder of `hf-d2sd distill`. Every variant takes the same number of steps over the same rows; the second
drafters of the last two lines learn beside the first drafter of the line "base". With --pair every variant goes on
from the drafters of that pair, and those that would have another shape are left out. Two lines change the seed alone:
a difference from "base" that is no greater than theirs means nothing. Measured on rows that are held out of training,
at every position of every response, along the target's own text: tokens a target pass of the chain (the drafted
tokens before the first wrong one, and the target's own), and for a second drafter those of a chain whose rest is
drafted again where the first drafter goes wrong. A killed run goes on; several processes share the variants.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_d2sd import records
from hf_d2sd.benchmark.machine import processor_name
from hf_d2sd.checks import refuse_unwritable_file, refuse_unwritable_folder
from hf_d2sd.training.blocks import cut_blocks
from hf_d2sd.training.drafters import Trainee
from hf_d2sd.training.features import compute_features
from hf_d2sd.training.options import TrainOptions
from hf_d2sd.training.shards import Row, batched, refuse_missing_rows
from hf_d2sd.training.trainer import DrafterRun

VARIANTS = {
    "base": {},
    "another seed": {"seed": 1},
    "a third seed": {"seed": 2},
    "layers from the target's top": {"init_layers": "target"},
    "D-PACE weights": {"loss": "dpace"},
    "layer-wise feature fusion": {"feature_fusion": "layerwise"},
    "top-8 distillation": {"distill_top_k": 8},
    "averaged weights (0.99)": {"ema": 0.99},
    "one layer": {"num_layers": 1},
    "three layers": {"num_layers": 3},
    "half the inner width": {"intermediate_size": 768},
    "five target layers": {"target_layer_ids": [2, 9, 15, 21, 27]},
    "4,096 draft tokens": {"draft_vocab_size": 4096},
    "whole vocabulary": {"draft_vocab_size": None},
    "second drafter, prior alone": {"role": "second", "on_policy": 0.0},
    "second drafter, half on-policy": {"role": "second", "on_policy": 0.5},
}


RESHAPING = ("num_layers", "intermediate_size", "target_layer_ids", "feature_fusion", "init_layers")


def keeps_shape(variant: str) -> bool:
    changes = VARIANTS[variant]
    return not any(option in changes for option in RESHAPING) and changes.get("draft_vocab_size", 1) is not None


def options_of(variant: str, args) -> TrainOptions:
    base = dict(
        target=args.target,
        data=args.data,
        out=args.work / variant.replace(" ", "-").replace(",", ""),
        block_size=8,
        num_layers=2,
        target_layer_ids=[9, 18, 27],
        qk_norm=False,
        draft_vocab_size=8192,
        mask_token=args.mask_token,
        rows=8,
        anchors=32,
        loss_chunk=128,
        lr=args.lr,
        max_steps=args.steps,
        eval_every=10 * args.steps,
        save_every=100,
        held_out=25,
        compile=args.compile,
        first=str(args.work / "base" / "last") if "second" in variant else None,
    )
    if args.pair is not None:
        first = args.pair if "second" in variant else None
        base |= dict(init=args.pair, first=first, draft_vocab_size=None, held_out=50)  # as in the pair's own training
    return TrainOptions(**{**base, **VARIANTS[variant]})


class Ablation(DrafterRun):
    """A training run that does not decode: it is measured at its end, along the target's text."""

    def _evaluate(self) -> dict:
        return {}


def run_variant(variant: str, args, path: Path) -> None:
    options = options_of(variant, args)
    options.out.mkdir(parents=True, exist_ok=True)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=options.dtype).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    run = Ablation(options, target, tokenizer, Accelerator(mixed_precision="bf16"))
    run.load()
    begun, cpu, wall = run.step, time.process_time(), time.perf_counter()
    run.run()
    steps = max(run.step - begun, 1)
    result = {
        "variant": variant,
        "options": VARIANTS[variant],
        "tokens_a_pass": round(measure(run, target), 4),
        "cpu_seconds_a_step": round((time.process_time() - cpu) / steps, 3),
        "seconds_a_step": round((time.perf_counter() - wall) / steps, 3),
        "parameters": sum(p.numel() for p in run.trainee.model.parameters()),
    }
    records.write_json(path, result, indent=None)
    print(result, flush=True)


@torch.no_grad()
def measure(run: DrafterRun, target) -> float:
    """Tokens a target pass, over all response positions of the held-out rows."""
    model = run.snapshot()
    mine = Trainee(model, target, chunk=128)
    first = Trainee(run.first, target, chunk=128) if run.first is not None else mine
    lengths = []
    for rows in batched(run.held_out, 4):
        for row in rows:
            plain = Row(row.tokens, row.prompt_length)
            features = compute_features(target, [plain], model.config.target_layer_ids)
            end = len(plain.tokens) - model.config.block_size
            if end <= plain.prompt_length:
                continue
            anchors = torch.arange(plain.prompt_length, end)[None]
            accepted = accepted_tokens(first, plain, features, anchors, torch.zeros_like(anchors))
            if run.first is not None:
                kept = accepted.clamp(max=model.config.block_size - 2)
                accepted = kept + accepted_tokens(mine, plain, features, anchors, kept)
            lengths.append(1 + accepted.float())
    return torch.cat(lengths, dim=1).mean().item()


def accepted_tokens(trainee: Trainee, row: Row, features, anchors: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(1, N): right tokens in a row, from the first that is drafted after `kept` (1, N) visible ones."""
    blocks = cut_blocks([row], features, anchors, kept, trainee.model.config)
    with torch.autocast(anchors.device.type, torch.bfloat16):
        _, right, _ = trainee(blocks)
    slot = torch.arange(right.shape[-1])
    return ((right | (slot <= kept[..., None])).int().cumprod(-1).sum(-1) - 1 - kept).clamp(min=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pair", help="to go on from")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--mask-token", default="<empty_output>")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    possible = [variant for variant in VARIANTS if args.pair is None or keeps_shape(variant)]
    args.variants = args.variants or possible
    if not set(args.variants) <= set(possible):
        parser.error(f"drafters that are there keep their shape; with --pair the variants are {possible}")
    refuse_unwritable_folder("--work", args.work)
    refuse_unwritable_file("--out", args.out)
    refuse_missing_rows([args.data])
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    paths = {variant: args.work / f"{options_of(variant, args).out.name}.json" for variant in args.variants}
    for variant, path in paths.items():
        if "second" in variant and args.pair is None:  # beside "base", which another process may have in hand
            base = args.work / "base.json"
            records.write_once(base, lambda path: run_variant("base", args, path), wait=True)
        records.write_once(path, lambda path, variant=variant: run_variant(variant, args, path))
    if args.out is None:
        return
    for variant, path in paths.items():
        records.write_once(path, lambda path, variant=variant: run_variant(variant, args, path), wait=True)
    result = {
        "what": "tokens a target pass along the target's greedy text of held-out rows, after a short run",
        "pair": args.pair and Path(args.pair).name,
        "steps": args.steps,
        "lr": args.lr,
        "blocks_a_step": 8 * 32,
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "cpu": f"{processor_name()}, {args.threads} threads a process",
        "variants": [json.loads(path.read_text(encoding="utf-8")) for path in paths.values()],
    }
    records.write_json(args.out, result)


if __name__ == "__main__":
    main()
