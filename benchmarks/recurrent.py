"""What a cycle costs a target with recurrent states, beside the same target with attention in all layers.

    python benchmarks/recurrent.py --out benchmarks/results/recurrent-cpu.json

Both are random models of one architecture (Qwen3.5's), alike in all sizes; in one of them three layers of four are
recurrent. Neither text nor drafters matter here: trees of given shapes are verified and a path of them is kept, as in
decoding. A tree of N nodes runs as C chains of L tokens where there are recurrent layers: so the pass over it is
longer, and after it the recurrent modules run again for what is kept. Memory is what the pass holds beside weights and
keys and values: copies of the states, and what the recurrent modules took in.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers

from hf_d2sd.benchmark.machine import processor_name
from hf_d2sd.cache import TreeCache
from hf_d2sd.target import Target, TargetPass
from hf_d2sd.tree import CandidateTree

SIZES = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    linear_num_key_heads=8,
    linear_num_value_heads=8,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
)
TARGETS = {
    "attention": ["full_attention"] * 8,
    "three of four layers recurrent": [*["linear_attention"] * 3, "full_attention"] * 2,
}
# A first block of 15 tokens; so many branches that keep a prefix of it and go on to depth 15.
TREES = {"a chain (K = 0)": (), "K = 4": (2, 4, 7, 11), "K = 8": (1, 2, 3, 4, 6, 8, 10, 12)}


def make_tree(prefixes: tuple[int, ...], block: int = 16, rows: int = 1) -> CandidateTree:
    """A chain of `block` nodes, and for each prefix length a branch that leaves it behind that node."""
    parents = list(range(-1, block - 1))
    for prefix in prefixes:
        parents += [prefix, *range(len(parents), len(parents) + block - 2 - prefix)]
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    fields = [torch.tensor(values).expand(rows, -1) for values in (parents, depths)]
    tokens = torch.randint(0, SIZES["vocab_size"], fields[0].shape)
    return CandidateTree(tokens, *fields, torch.zeros(tokens.shape), torch.zeros_like(tokens), max_depth=block - 1)


def on(device: str, tree: CandidateTree) -> CandidateTree:
    fields = (tree.tokens, tree.parents, tree.depths, tree.scores, tree.ranks)
    return CandidateTree(*(field.to(device) for field in fields), max_depth=tree.max_depth)


def held(step: TargetPass) -> dict[str, int]:
    """Bytes that a pass over chains needs: states before it, their copies, and what the recurrent modules took in."""
    if step.chains is None:
        return {"states": 0, "copies_of_states": 0, "inputs_kept": 0}
    states = sum(
        tensor.nbytes
        for layer in step.chains.before.values()
        for values in layer.values()
        for tensor in values.values()
        if tensor is not None
    )
    inputs = sum(
        value.nbytes
        for call in step.chains.calls.values()
        for value in (*call.args, *call.kwargs.values())
        if torch.is_tensor(value)
    )
    return {"states": states, "copies_of_states": states * step.chains.chains.tokens.shape[1], "inputs_kept": inputs}


def measure(models: dict, tree: CandidateTree, context: int, kept: int, repeats: int) -> dict[str, dict]:
    """Median times of a pass and of keeping `kept` nodes of its first chain, in milliseconds, the models in turn."""
    device = str(next(iter(models.values())).device)
    rows, tree = len(tree.tokens), on(device, tree)
    prompt = torch.randint(0, SIZES["vocab_size"], (rows, context), device=device)
    path = torch.arange(kept, device=device).expand(rows, -1)
    targets = {name: Target(model, TreeCache(model.config), {0}, rows=rows) for name, model in models.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for target in targets.values():
        list(target.prefill(prompt, context))
    for _ in range(repeats + 2):
        for name, target in targets.items():
            began = now(device)
            step = target.verify(tree)
            verified = now(device)
            target.commit(step, path, [kept] * rows)
            times[name].append((1e3 * (verified - began), 1e3 * (now(device) - verified)))
    found = {}
    for name, target in targets.items():
        verify, commit = (statistics.median(values) for values in zip(*times[name][2:]))
        step = target.verify(tree)
        found[name] = {
            "nodes": len(tree),
            "tokens_in_the_pass": len(tree) if step.chains is None else step.chains.chains.tokens[0].numel(),
            "verify_ms": round(verify, 2),
            "commit_ms": round(commit, 2),
            "keys_and_values": sum(layer.keys.nbytes + layer.values.nbytes for layer in target.cache.layers),
            **held(step),
        }
    return found


def now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the figures here as JSON")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache")
    parser.add_argument("--kept", type=int, default=5, help="nodes kept of a tree")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models, results = {}, {}
    for name, layer_types in TARGETS.items():
        torch.manual_seed(0)
        config = transformers.Qwen3_5TextConfig(**SIZES, layer_types=layer_types)
        models[name] = transformers.Qwen3_5ForCausalLM(config).eval().to(args.device, getattr(torch, args.dtype))
    for kind, prefixes in TREES.items():
        with torch.inference_mode():
            tree = make_tree(prefixes, rows=args.rows)
            results[kind] = measure(models, tree, args.context, args.kept, args.repeats)
        for name, figures in results[kind].items():
            mib = {key: figures[key] / 2**20 for key in ("keys_and_values", "copies_of_states", "inputs_kept")}
            print(
                f"{kind:>15}, {name:>30}: {figures['nodes']:3} nodes, {figures['tokens_in_the_pass']:3} tokens; "
                f"verify {figures['verify_ms']:7.1f} ms, commit {figures['commit_ms']:6.1f} ms; keys and values "
                f"{mib['keys_and_values']:5.1f} MiB, copies of states {mib['copies_of_states']:5.1f} MiB, "
                f"inputs kept {mib['inputs_kept']:4.2f} MiB"
            )
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else processor_name()
    facts = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": vars(args),
        "sizes": SIZES,
        "cycles": results,
    }
    if args.out:
        Path(args.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
