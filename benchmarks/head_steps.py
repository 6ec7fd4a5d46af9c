"""Does the target's head pay in two steps: over the inner nodes of a tree, then over the leaf that a walk ends at?

python benchmarks/head_steps.py --out FILE.json [--threads 2] [--nodes 4 8 16 32 64] [--dtype float32]

The walk needs logits of the node it stands at. Leaves are half of a tree, and it ends at one of them at most; but a
head's product reads all of the weight, however few rows it has. Times the head of SmolLM2-135M-Instruct over all nodes
of the pair's own trees, and over their inner nodes and then one row more, by the ways that passes take.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from smollm2 import NAME, load_smollm2  # noqa: E402

from hf_d2sd import D2SDAssistant, products, records  # noqa: E402
from hf_d2sd.benchmark.machine import versions  # noqa: E402
from hf_d2sd.checks import refuse_unwritable_file  # noqa: E402

REPEATS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pair", default=str(HERE.parent / "hub_cards" / f"{NAME}-D2SD"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    refuse_unwritable_file("--out", options.out, makes_folder=True)
    torch.set_num_threads(options.threads)
    model, tokenizer = load_smollm2(getattr(torch, options.dtype))
    assistant = D2SDAssistant.from_pretrained(options.pair, dtype=model.dtype)
    rows = []
    for nodes in options.nodes:
        inner, ends_at_leaf = shape_of_trees(model, tokenizer, assistant, nodes)
        row = {"nodes": nodes, "inner": inner, "walks that end at a leaf": ends_at_leaf}
        rows.append(row | times(model.lm_head.weight.detach(), nodes, inner, ends_at_leaf))
        print(rows[-1], flush=True)
    about = {"threads": options.threads, "dtype": options.dtype, "cpu": platform.machine(), "versions": versions()}
    options.out.write_text(json.dumps(about | {"milliseconds": rows}, indent=1), encoding="utf-8")


def shape_of_trees(model, tokenizer, assistant, nodes: int) -> tuple[int, float]:
    """Inner nodes of a wide tree, the mean rounded up, and the share of walks that end at a leaf."""
    inner, leaves, trees = 0, 0, 0
    for file in sorted((HERE / "prompts").glob("*.jsonl")):
        first = next(row for _, row in records.read_numbered(file))
        chat = [{"role": "user", "content": first["turns"][0]}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        options = dict(d2sd_tree_budget=nodes, d2sd_tree_width=8, d2sd_num_branches=4, d2sd_trace=True)
        model.generate(**inputs, assistant_model=assistant, do_sample=False, max_new_tokens=48, **options)
        for cycle in assistant.last_stats.trace:
            parents = set(cycle.parents)
            trees, inner = trees + 1, inner + len(parents - {-1})
            leaves += cycle.path[-1] not in parents
    return -(-inner // trees), round(leaves / trees, 2)


def times(weight: torch.Tensor, nodes: int, inner: int, ends_at_leaf: float) -> dict[str, float]:
    """Median milliseconds of the head in one step and in two, in turns."""
    hidden = torch.randn(nodes, weight.shape[1], dtype=weight.dtype)
    ways = {"all": (nodes,), "inner": (inner,), "one": (1,)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for repeat in range(REPEATS + 10):  # the first ones choose the way of each product
            for name, (rows,) in ways.items():
                start = time.perf_counter()
                products.linear(hidden[:rows], weight)
                if repeat >= 10:
                    found[name].append(1e3 * (time.perf_counter() - start))
    middle = {name: statistics.median(times) for name, times in found.items()}
    two = middle["inner"] + ends_at_leaf * middle["one"]
    return {"one step": round(middle["all"], 1), "two steps": round(two, 1)}


if __name__ == "__main__":
    main()
