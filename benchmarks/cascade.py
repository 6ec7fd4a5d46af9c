"""What verification, the second draft and the caches cost on a CPU, as ratios measured in one run.

    python benchmarks/cascade.py --out benchmarks/results/cascade-cpu.json

SmolLM2-135M-Instruct with the pair of this repository, float32. Each figure is a median; what is compared is run in
turns. Memory is what is allocated at most during a call, as torch's profiler counts it. The bounds stand beside the
figures; the exit status is 1 if one is missed.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from smollm2 import load_smollm2  # noqa: E402

import hf_d2sd  # noqa: E402
from hf_d2sd.benchmark.machine import processor_name  # noqa: E402
from hf_d2sd.cache import TreeCache, TreeLayer  # noqa: E402
from hf_d2sd.candidates import Draft, merge  # noqa: E402
from hf_d2sd.checks import refuse_unwritable_file  # noqa: E402
from hf_d2sd.drafting import DraftContext, Drafter  # noqa: E402
from hf_d2sd.growing import State, grow  # noqa: E402
from hf_d2sd.options import DecodingOptions  # noqa: E402
from hf_d2sd.target import Target  # noqa: E402
from hf_d2sd.tree import CandidateTree  # noqa: E402

PAIR = HERE.parent / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"


def medians(runs: dict, repeats: int) -> dict[str, float]:
    """Milliseconds of each of several functions, run in turns."""
    times = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mb(run) -> float:
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def random_tree(size: int, vocab: int) -> CandidateTree:
    """As D²SD makes them: a first block and branches off it, depth-major."""
    generator = torch.Generator().manual_seed(0)
    draft = torch.randint(vocab, (1, 15), generator=generator)
    redrafts = torch.randint(vocab, (1, 12, 15), generator=generator)
    first = Draft.of(draft[:, None], torch.full((1, 1, 15), 0.9))
    branches = Draft.of(redrafts, torch.full((1, 12, 15), 0.9)).after(first.cut(torch.arange(1, 13)[None]))
    return CandidateTree.from_candidates(torch.tensor([5]), merge(first, branches), budget=size)


def cache_step(context: int, repeats: int) -> dict:
    """32 nodes appended to a layer of 8 heads of 128, and 7 of them kept: preallocated, and by concatenation."""
    stored = torch.randn(1, 8, context, 128)
    nodes = torch.randn(1, 8, 32, 128)
    path = torch.tensor([[0, 1, 2, 4, 7, 9, 12]])
    tree, dynamic = TreeLayer(), transformers.cache_utils.DynamicLayer()
    for layer in (tree, dynamic):
        layer.update(stored, stored)

    def tree_step():
        place = tree.place()
        tree.update(nodes, nodes)
        tree.keep(place, path, [7])
        tree.crop(-7)

    def dynamic_step():
        dynamic.update(nodes, nodes)
        keys, values = dynamic.keys, dynamic.values
        kept = torch.cat([torch.arange(context), context + path[0]])
        dynamic.keys, dynamic.values = keys[:, :, kept], values[:, :, kept]
        dynamic.crop(-7)

    times = medians({"tree_cache_ms": tree_step, "dynamic_cache_ms": dynamic_step}, 10 * repeats)
    return {**times, "ratio": times["tree_cache_ms"] / times["dynamic_cache_ms"], "bound": 1 / 50}


def long_target(model, context: int, backend: str | None) -> Target:
    target = Target(model, TreeCache(model.config), {0}, backend=backend)
    ids = torch.randint(5, 1000, (1, context), generator=torch.Generator().manual_seed(0))
    for _ in target.prefill(ids, context, 512, logits_to_keep=1):
        pass
    return target


def verification(model, context: int, size: int, repeats: int) -> dict:
    """The target's pass over a tree, by the cascade and with an SDPA 4-D mask; and over one token, by each."""
    targets = {backend: long_target(model, context, backend) for backend in ("cpu", "sdpa")}
    trees = {"": random_tree(size, 1000), "_one_token": CandidateTree.anchor_only(torch.tensor([5]))}

    def verify(target, tree):
        def run():
            target.commit(target.verify(tree), torch.zeros(1, 0, dtype=torch.long), [0])

        return run

    runs = {f"{b}{name}_ms": verify(t, tree) for b, t in targets.items() for name, tree in trees.items()}
    return {**(times := medians(runs, repeats)), "ratio": times["cpu_ms"] / times["sdpa_ms"], "bound": 1.15}


def second_draft(model, pair, context: int, repeats: int) -> dict:
    """K=4 blocks over one context, and over K copies of it."""
    shared = Drafter(pair.second, model)
    width = len(pair.second.config.target_layer_ids) * pair.second.config.target_hidden_size
    shared.context.extend(torch.randn(1, context, width), [context], [context])
    anchor, block = torch.tensor([5]), pair.second.config.block_size
    tokens = torch.arange(10, 9 + block)[None, None]
    prefixes = Draft.of(tokens, torch.ones(tokens.shape)).cut(torch.tensor([[0, 1, 2, 3]]))
    shared.redraft(anchor, prefixes, block)

    def again(drafter, rows):
        # One token is new each time, as after a cycle that accepts nothing; afterwards it is forgotten.
        drafter.context.waiting = ((torch.zeros(rows, 1, width), [1] * rows),)

    def on_one():
        again(shared, 1)
        shared.redraft(anchor, prefixes, block)
        shared.context.cache.set_lengths([context])

    def on_copies():
        copies = Drafter(pair.second, model)
        copies.context = DraftContext(shared.context.cache.rows([0] * 4), [context] * 4)
        again(copies, 4)
        blocks = shared._masked_blocks(anchor, 4, block).view(4, 1, block)
        copies._denoise(blocks, 1)

    times = medians({"one_context_ms": on_one, "copies_ms": on_copies}, repeats)
    memory = {"one_context_mb": peak_mb(on_one), "copies_mb": peak_mb(on_copies)}
    return {
        **times,
        **memory,
        "ratio": times["one_context_ms"] / times["copies_ms"],
        "bound": 0.8,
        "memory_ratio": memory["one_context_mb"] / memory["copies_mb"],
        "memory_bound": 1 / 3,
    }


def cycle_memory(model, pair, size: int) -> dict:
    """Allocated at most during a cycle with trees of so many nodes, and during a plain step, at 2k and 8k tokens."""
    result = {}
    for context in (2048, 8192):
        target = long_target(model, context, None)
        drafters = [Drafter(drafter, model) for drafter in pair.drafters]
        for drafter in drafters:
            width = len(drafter.model.config.target_layer_ids) * drafter.model.config.target_hidden_size
            drafter.context.extend(torch.randn(1, context, width), target.positions, [context])
        target._capture = [i + 1 for drafter in drafters for i in drafter.model.config.target_layer_ids]
        block = pair.first.config.block_size
        options = DecodingOptions(num_branches=12, tree_budget=None, block_size=block, second_block_size=block)

        def cycle(target=target, drafters=drafters, options=options):
            drafted = grow(State(torch.tensor([5]), drafters, options))
            tree = random_tree(size, 1000)
            step = target.verify(tree)
            target.commit(step, torch.zeros(1, 1, dtype=torch.long), [1])
            for drafter in drafters:
                drafter.extend(step, target.positions, torch.zeros(1, 1, dtype=torch.long), [1])
            return drafted

        def plain(target=target):
            step = target.verify(CandidateTree.anchor_only(torch.tensor([5])))
            target.commit(step, torch.zeros(1, 0, dtype=torch.long), [0])

        cycle()
        result[f"cycle_mb_at_{context}"], result[f"plain_step_mb_at_{context}"] = peak_mb(cycle), peak_mb(plain)
    over = {
        context: result[f"cycle_mb_at_{context}"] - result[f"plain_step_mb_at_{context}"] for context in (2048, 8192)
    }
    return {**result, "over_plain_mb": over[8192], "ratio": over[8192] / over[2048], "bound": 1.05}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="names of measurements")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    refuse_unwritable_file("--out", args.out)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, _ = load_smollm2()
    pair = hf_d2sd.D2SDAssistant.from_pretrained(PAIR, dtype=torch.float32)
    measurements = {
        "cache_step_8k": lambda: cache_step(8192, args.repeats),
        "verification_32_nodes_4k": lambda: verification(model, 4096, 32, args.repeats),
        "second_draft_4_branches_4k": lambda: second_draft(model, pair, 4096, args.repeats),
        "cycle_memory_64_nodes": lambda: cycle_memory(model, pair, 64),
    }
    result = {
        "what": "costs on a CPU, SmolLM2-135M-Instruct and its pair, float32; milliseconds and MiB",
        "command": " ".join(["python", "benchmarks/cascade.py", *sys.argv[1:]]),
        "hardware": f"{processor_name()}, {args.threads} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    failed = []
    with torch.no_grad():
        for name, measure in measurements.items():
            if args.only and name not in args.only:
                continue
            figures = measure()
            result[name] = {key: round(value, 4) for key, value in figures.items()}
            print(json.dumps({name: result[name]}), flush=True)
            holds = figures["ratio"] <= figures["bound"]
            if not (holds and figures.get("memory_ratio", 0) <= figures.get("memory_bound", 1)):
                failed.append(name)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if failed:
        print(f"Bounds are missed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
