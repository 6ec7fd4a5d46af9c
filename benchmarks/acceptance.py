"""Tokens a target pass of each strategy of the paper's ablation, greedy, on SmolLM2-135M-Instruct.

    python benchmarks/acceptance.py --pair FOLDER --out FILE.json

Every prompt of benchmarks/prompts (first turns) is answered with each strategy: the first drafter alone, the first
drafter reused as second, and D²SD with both. Rows go to FILE.jsonl as they come, and a killed run goes on where it
stopped. The mean over files is that of the files' own figures, so that each counts alike. Trees are whole unless
--budget cuts them.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from equality import HERE, PAIR, chat_ids, read_prompts
from smollm2 import load_smollm2

import hf_d2sd

STRATEGIES = ("first alone", "first reused as second", "D²SD")


def assistants(pair: str, branches: int, dtype: torch.dtype) -> dict[str, tuple[hf_d2sd.D2SDAssistant, int]]:
    """By strategy: an assistant, and its K."""
    both = hf_d2sd.D2SDAssistant.from_pretrained(pair, dtype=dtype)
    reused = hf_d2sd.D2SDAssistant.from_drafters(both.first, both.first)
    return dict(zip(STRATEGIES, ((both, 0), (reused, branches), (both, branches))))


def measure(args) -> list[dict]:
    """A row for each prompt and strategy: committed tokens and cycles."""
    dtype = getattr(torch, args.dtype)
    target, tokenizer = load_smollm2(dtype)
    strategies = assistants(args.pair, args.branches, dtype)
    path = args.out.with_suffix(".jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    known = {(row["key"], row["strategy"]) for row in rows}
    entries = []
    for file in args.prompts:
        first_turns = [{**e, "file": file.stem} for e in read_prompts([file]) if e["key"].endswith("#0")]
        entries += first_turns[:: max(1, len(first_turns) // args.max_prompts)] if args.max_prompts else first_turns
    for number, entry in enumerate(entries, 1):
        inputs = torch.tensor([chat_ids(tokenizer, entry, {})])
        for strategy, (assistant, branches) in strategies.items():
            if (entry["key"], strategy) in known:
                continue
            target.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                assistant_model=assistant,
                do_sample=False,
                max_new_tokens=args.max_new_tokens,
                d2sd_num_branches=branches,
                d2sd_tree_budget=args.budget,
            )
            stats = assistant.last_stats
            counts = {"tokens": stats.new_tokens - 1, "cycles": stats.cycles, "nodes": sum(stats.tree_sizes)}
            row = {"key": entry["key"], "file": entry["file"], "task": entry["task"], "strategy": strategy, **counts}
            rows.append(row)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{number}/{len(entries)}", flush=True)
    return rows


def table(rows: list[dict]) -> dict[str, dict]:
    """By strategy: tokens a target pass for each file and task, their mean over files, and nodes a pass."""
    result = {}
    for strategy in STRATEGIES:
        sums = defaultdict(lambda: [0, 0])
        mine = [row for row in rows if row["strategy"] == strategy]
        for row in mine:
            for group in {row["file"], row["task"]}:
                sums[group][0] += row["tokens"]
                sums[group][1] += row["cycles"]
        means = {group: round(tokens / max(cycles, 1), 3) for group, (tokens, cycles) in sorted(sums.items())}
        files = {row["file"] for row in mine}
        mean = sum(sums[file][0] / max(sums[file][1], 1) for file in files) / max(len(files), 1)
        nodes = sum(row["nodes"] for row in mine) / max(sum(row["cycles"] for row in mine), 1)
        result[strategy] = {"mean of files": round(mean, 3), "nodes a pass": round(nodes, 1), **means}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default=str(PAIR))
    parser.add_argument("--prompts", type=Path, nargs="+", default=sorted((HERE / "prompts").glob("*.jsonl")))
    parser.add_argument("--max-prompts", type=int, help="about so many of each file, evenly spread")
    parser.add_argument("--branches", type=int, default=4)
    parser.add_argument("--budget", type=int, default=10_000, help="nodes in a tree")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "what": "tokens committed in a target pass, greedy",
        "branches": args.branches,
        "budget": args.budget,
        "dtype": args.dtype,
        "max_new_tokens": args.max_new_tokens,
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "strategies": table(measure(args)),
    }
    args.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result["strategies"], indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
