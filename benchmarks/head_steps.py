"""Does the target's head pay in two steps: over the inner nodes of a tree, then over the leaf that a walk ends at?

python benchmarks/head_steps.py --out FILE.json [--threads 2] [--nodes 4 8 16 32 64] [--dtype float32]

The walk needs logits of the node it stands at. Leaves are half of a tree, and it ends at one of them at most; but a
head's product reads all of the weight, however few rows it has. Times the head of SmolLM2-135M-Instruct over all nodes
of the pair's own trees, and over their inner nodes and then one row more, by the ways that passes take.

And would the second drafter's head pay over the slots that are read alone? Of its K blocks each keeps a prefix, whose
slots' logits nobody reads. Times that head, its likeliest tokens and their total over all slots and over the others.
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
from hf_d2sd.drafting import Drafter  # noqa: E402

REPEATS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pair", default=str(HERE.parent / "hub_cards" / f"{NAME}-D2SD"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--branches", type=int, nargs="+", default=[2, 4, 8], help="blocks of the second draft")
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
    drafts = [kept_slots(model, tokenizer, assistant, count) for count in options.branches]
    about = {"threads": options.threads, "dtype": options.dtype, "cpu": platform.machine(), "versions": versions()}
    found = about | {"milliseconds": rows, "second draft": drafts}
    options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def decoded(model, tokenizer, assistant, **options):
    """What was counted in a call with wide trees for the first prompt of each file."""
    for file in sorted((HERE / "prompts").glob("*.jsonl")):
        first = next(row for _, row in records.read_numbered(file))
        chat = [{"role": "user", "content": first["turns"][0]}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        options = dict(d2sd_tree_width=8, do_sample=False, max_new_tokens=48) | options
        model.generate(**inputs, assistant_model=assistant, **options)
        yield assistant.last_stats


def shape_of_trees(model, tokenizer, assistant, nodes: int) -> tuple[int, float]:
    """Inner nodes of a wide tree, the mean rounded up, and the share of walks that end at a leaf."""
    inner, leaves, trees = 0, 0, 0
    for stats in decoded(model, tokenizer, assistant, d2sd_tree_budget=nodes, d2sd_num_branches=4, d2sd_trace=True):
        for cycle in stats.trace:
            parents = set(cycle.parents)
            trees, inner = trees + 1, inner + len(parents - {-1})
            leaves += cycle.path[-1] not in parents
    return -(-inner // trees), round(leaves / trees, 2)


def times(weight: torch.Tensor, nodes: int, inner: int, ends_at_leaf: float) -> dict[str, float]:
    """Median milliseconds of the head in one step and in two."""
    hidden = torch.randn(nodes, weight.shape[1], dtype=weight.dtype)
    middle = in_turns(lambda rows: products.linear(hidden[:rows], weight), nodes, inner, 1)
    return {"one step": round(middle[nodes], 1), "two steps": round(middle[inner] + ends_at_leaf * middle[1], 1)}


def kept_slots(model, tokenizer, assistant, count: int) -> dict[str, float]:
    """Of a second draft of so many blocks: slots, those that are read, and median milliseconds of what reads them."""
    drafter, kept = Drafter(assistant.second, model), []
    slots = count * (assistant.second.config.block_size - 1)
    redraft = Drafter.redraft

    def counting(self, anchor, prefixes, *args):
        kept.extend(prefixes.kept.sum(1).tolist())
        return redraft(self, anchor, prefixes, *args)

    Drafter.redraft = counting
    try:
        list(decoded(model, tokenizer, assistant, d2sd_tree_budget=16, d2sd_num_branches=count))
    finally:
        Drafter.redraft = redraft
    read = slots - round(statistics.mean(kept))
    hidden = torch.randn(1, slots, model.config.hidden_size, dtype=model.dtype)

    def judge(rows: int) -> None:
        logits = drafter._head(hidden[:, :rows]).float()
        logits.topk(assistant.second.config.path_candidates, dim=-1)
        logits.logsumexp(-1)

    middle = in_turns(judge, slots, read)
    found = {"branches": count, "slots": slots, "slots that are read": read}
    return found | {"all": round(middle[slots], 1), "those that are read": round(middle[read], 1)}


@torch.inference_mode()
def in_turns(work, *sizes: int) -> dict[int, float]:
    """Median milliseconds of work on each number of rows."""
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for repeat in range(REPEATS + 10):  # the first ones choose the way of each product
        for size in found:
            start = time.perf_counter()
            work(size)
            if repeat >= 10:
                found[size].append(1e3 * (time.perf_counter() - start))
    return {size: statistics.median(times) for size, times in found.items()}


if __name__ == "__main__":
    main()
