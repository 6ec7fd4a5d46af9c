"""Acceptance and speed against branches K, the node budget and the tree's width, to choose a pair's defaults.

    python benchmarks/budgets.py --prompts PROMPTS.jsonl --dtype float32 --cases 0:none 0:16:8 4:32:8 --out FILE.json

A case is K:budget, or K:budget:width for wide trees.
Every prompt is answered by plain `generate` and by each case in turn, so that a busy machine slows all alike. Use
prompts that nothing is reported on.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from smollm2 import load_smollm2  # noqa: E402

import hf_d2sd  # noqa: E402

PAIR = HERE.parent / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"
CASES = ["0:none", "4:none", "0:8:8", "2:8:8", "0:16:8", "4:16:8", "0:32:8", "4:32:8", "4:64:8"]


def read_case(text: str) -> dict[str, int | None]:
    branches, budget, width = [*text.split(":"), "1"][:3]
    return {
        "d2sd_num_branches": int(branches),
        "d2sd_tree_budget": 10_000 if budget == "none" else int(budget),
        "d2sd_tree_width": int(width),
    }


def timed(target, inputs: torch.Tensor, **options) -> tuple[list[int], float]:
    start = time.perf_counter()
    out = target.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, **options)
    return out[0, inputs.shape[1] :].tolist(), time.perf_counter() - start


def measure(args) -> dict[str, dict]:
    target, tokenizer = load_smollm2(getattr(torch, args.dtype))
    assistant = hf_d2sd.D2SDAssistant.from_pretrained(
        args.pair, dtype=getattr(torch, args.drafter_dtype or args.dtype)
    )
    with open(args.prompts, encoding="utf-8") as lines:
        questions = [json.loads(line)["turns"][0] for line in lines if line.strip()]
    random.Random(args.seed).shuffle(questions)
    rows = {case: {"ratios": [], "tokens": 0, "cycles": 0, "nodes": 0, "differing": 0} for case in args.cases}
    for question in [questions[0], *questions[: args.max_prompts]]:  # the first one twice: a warm-up
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        plain, plain_seconds = timed(target, inputs, max_new_tokens=args.max_new_tokens)
        for case, row in rows.items():
            options = read_case(case)
            ours, seconds = timed(
                target, inputs, max_new_tokens=args.max_new_tokens, assistant_model=assistant, **options
            )
            stats = assistant.last_stats
            row["ratios"].append(plain_seconds / seconds)
            row["differing"] += ours != plain
            row["tokens"] += stats.new_tokens - 1
            row["cycles"] += stats.cycles
            row["nodes"] += sum(stats.tree_sizes)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--max-prompts", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--drafter-dtype", help="by default that of the target")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pair", default=str(PAIR))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = []
    for case, row in measure(args).items():
        ratios = row["ratios"][1:]
        table.append(
            {
                "branches:budget:width": case,
                "mean_acceptance_length": round(row["tokens"] / row["cycles"], 3),
                "mean_tree_size": round(row["nodes"] / row["cycles"], 1),
                "speed_over_plain": round(statistics.median(ratios), 3),
                "speed_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
                "prompts_differing": row["differing"],
            }
        )
        print(table[-1], flush=True)
    if args.out:
        result = {
            "what": "greedy, time of plain generate over time with drafters, prefill included, per prompt",
            "dtype": args.dtype,
            "threads": args.threads,
            "prompts": args.max_prompts,
            "max_new_tokens": args.max_new_tokens,
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "cpu": platform.machine(),
            "cases": table,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
