"""Checks every CUDA backend and times a cycle at Qwen3-8B's shapes, in under ten minutes.

    python benchmarks/gpu_check.py

Needs a CUDA device and the library, nothing from the Hub: weights are random. It writes
`benchmarks/results/gpu-*.json` and exits with 1 if a check fails. Parts: errors of each kernel against attention in
double precision on random trees; decoding that equals plain `generate` in float32; agreement in bfloat16; then times
of plain steps, of verification by each backend, of each draft and of whole cycles, eager and compiled, against the
floor that memory bandwidth sets.
"""

import argparse
import contextlib
import json
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers as tf

import hf_d2sd
from hf_d2sd.attention import Nodes, cascade, plan_layer
from hf_d2sd.cache import TreeCache, TreeLayer
from hf_d2sd.candidates import Draft
from hf_d2sd.captured import FixedShapes, compile_once
from hf_d2sd.checks import refuse_unwritable_file
from hf_d2sd.choosing import Choosers
from hf_d2sd.decoding import Accepted, Batch
from hf_d2sd.drafting import Drafter
from hf_d2sd.growing import grow
from hf_d2sd.kernels import KERNELS, Facts
from hf_d2sd.modeling import CACHE_NAME
from hf_d2sd.modeling.configuration_d2sd import default_target_layer_ids
from hf_d2sd.options import DecodingOptions
from hf_d2sd.target import Target
from hf_d2sd.tree import CandidateTree

RESULTS = Path(__file__).resolve().parent / "results"
CUDA = torch.device("cuda")
PAPERS_ACCEPTANCE = 7.05  # tokens a target pass, arXiv 2606.04446


def tiny_models(dtype: torch.dtype = torch.float32):
    """A random Qwen3 and a pair of random drafters for it, small enough to decode in seconds."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = tf.Qwen3Config(vocab_size=512, num_hidden_layers=4, initializer_range=0.2, **sizes, **special)
    target = tf.Qwen3ForCausalLM(config).to(CUDA, dtype).eval()
    drafters = [
        hf_d2sd.D2SDDrafterModel(
            hf_d2sd.D2SDDrafterConfig(
                vocab_size=512, num_hidden_layers=2, target_layer_ids=[0, 2], num_target_layers=4, mask_token_id=1,
                block_size=block_size, **sizes,
            )
        )
        for block_size in (8, 10)
    ]  # fmt: skip
    return target, hf_d2sd.D2SDAssistant.from_drafters(*drafters).to(CUDA, dtype)


def obstacle(name: str) -> str | None:
    """Why a kernel cannot run here, for a bfloat16 model."""
    return KERNELS[name].obstacle(Facts.of(tiny_models(torch.bfloat16)[0]))


def random_tree(rows: int, size: int, generator: torch.Generator) -> CandidateTree:
    parents = torch.tensor(
        [
            [-1] + [int(torch.randint(max(0, node - 4), node, (), generator=generator)) for node in range(1, size)]
            for _ in range(rows)
        ]
    )
    depths = torch.zeros_like(parents)
    for node in range(1, size):
        depths[:, node] = depths.gather(1, parents[:, node, None])[:, 0] + 1
    fields = torch.zeros_like(parents), parents, depths, torch.zeros_like(parents).float(), torch.zeros_like(parents)
    return CandidateTree(*(field.to(CUDA) for field in fields))


def by_rule(query, key, value, seen, scale, sinks):
    """(B, H, N, D) in double precision; seen (B, N, keys)."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = (query.double() @ key.transpose(2, 3) * scale).masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        sinks = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=3)
    return scores.softmax(-1)[..., : key.shape[2]] @ value


def worst_error(name: str, dtype: torch.dtype, trees: int) -> tuple[float, float]:
    """The greatest error over random trees, rows, windows and sinks; and the greatest that the dtype explains.

    The bound is four times the error of torch's own attention with a mask on the same inputs.
    """
    generator, worst, stock = torch.Generator().manual_seed(0), 0.0, 0.0
    for seed in range(trees):
        rows, size, window = 1 + seed % 3, (1, 7, 16, 33, 64)[seed % 5], (None, 40, 200)[seed % 3]
        lengths = torch.randint(1, 600, (rows,), generator=generator).tolist()
        tree, layer = random_tree(rows, size, generator), TreeLayer(window)
        states = [torch.randn(rows, 8, max(lengths), 128, generator=generator).to(CUDA, dtype) for _ in range(2)]
        own = [torch.randn(rows, 8, size, 128, generator=generator).to(CUDA, dtype) for _ in range(2)]
        query = torch.randn(rows, 32, size, 128, generator=generator).to(CUDA, dtype)
        sinks = torch.randn(32, generator=generator).to(CUDA, dtype) if seed % 2 else None
        layer.update(*states)
        layer.set_lengths(lengths)
        nodes = Nodes.of_tree(tree)
        segments = list(vars(nodes.segments()).values())
        plan = plan_layer(KERNELS[name], nodes, segments, layer.place(), layer, window, dtype)
        key, value = layer.update(*own)
        got = cascade(
            query, key, value, plan.bounds, plan.edge, plan.mask, plan.prefix, plan.segments, sinks, name, 128**-0.5,
            0.0, plan.longest, plan.deepest, plan.causal, plan.has_prefix,
        )  # fmt: skip
        ends = torch.tensor(lengths, device=CUDA)[:, None, None]
        slots = torch.arange(max(lengths), device=CUDA)
        near = slots < ends
        seen = nodes.visible
        if window is not None:
            near = near & (ends - slots + nodes.depths[..., None] < window)
            seen = seen & ((nodes.depths[..., None] - nodes.depths[:, None]).abs() < window)
        seen = torch.cat([near.expand(-1, size, -1), seen], dim=2)
        keys, values = (torch.cat([s, o], dim=2) for s, o in zip(states, own))
        expected = by_rule(query, keys, values, seen, 128**-0.5, sinks).transpose(1, 2)
        worst = max(worst, float((got.double() - expected).abs().max()))
        masked = torch.nn.functional.scaled_dot_product_attention(
            query, keys.repeat_interleave(4, 1), values.repeat_interleave(4, 1), attn_mask=seen[:, None]
        )
        plain = by_rule(query, keys, values, seen, 128**-0.5, None)
        stock = max(stock, float((masked.double() - plain).abs().max()))
    return worst, 4 * stock


def prompts(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 500, (1, 20 + 13 * i), generator=generator).to(CUDA) for i in range(count)]


def equality(dtype: torch.dtype, backend: str | None = None) -> dict:
    """Greedy decoding with and without the pair, and how nearly tied two tokens were where a text first differs."""
    target, pair = tiny_models(dtype)
    trees = dict(assistant_model=pair, d2sd_attention_backend=backend, d2sd_auto=False)
    equal, gaps = [], [0.0]
    for ids in prompts(6):
        options = dict(do_sample=False, max_new_tokens=64)
        plain = target.generate(ids, **options)
        ours = target.generate(ids, **trees, **options)
        equal.append(bool(torch.equal(plain, ours)))
        if not equal[-1]:
            at = int((plain != ours).nonzero()[0, 1])
            with torch.no_grad():
                logits = target(plain[:, :at]).logits[0, -1].float()
            gaps.append(float((logits[plain[0, at]] - logits[ours[0, at]]).abs()))
    batch = torch.cat([ids[:, :20] for ids in prompts(6)])
    options = dict(do_sample=False, max_new_tokens=48)
    plain = target.generate(batch, **options)
    ours = target.generate(batch, **trees, **options)
    equal += (plain == ours).all(1).tolist()
    return {
        "backend": pair.attention_backend,
        "equal": sum(equal) / len(equal),
        "texts": len(equal),
        "gap_at_first_difference": round(max(gaps), 4),
    }


def compiled_equality(options: dict) -> dict:
    """Whether compiled cycles give the texts of eager ones, in bfloat16, and what was compiled after the first."""
    target, pair = tiny_models(torch.bfloat16)
    settings = dict(do_sample=False, max_new_tokens=64, assistant_model=pair, d2sd_auto=False)
    eager = [target.generate(ids, **settings) for ids in prompts(4)]
    pair.compile(**options)
    for _ in range(2):
        compiled = [target.generate(ids, **settings) for ids in prompts(4)]
    same = [float((a == b).float().mean()) for a, b in zip(eager, compiled)]
    return {"equal": min(same) > 0.5, "share_of_equal_tokens": round(statistics.mean(same), 3)}


def milliseconds(run, repeats: int = 12, warm: int = 3) -> float:
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)


def bandwidth() -> float:
    """Bytes a second that this device reads, by a sum over 4 GiB."""
    block = torch.ones(2**31, dtype=torch.bfloat16, device=CUDA)
    return block.numel() * 2 / (milliseconds(lambda: block.sum()) / 1000)


def large_models(layers: int = 36, width: int = 4096, vocab: int = 151936):
    """Qwen3-8B's shapes and drafters of five layers, with random weights."""
    sizes = dict(hidden_size=width, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    sizes |= dict(vocab_size=vocab, intermediate_size=3 * width, max_position_embeddings=40960)
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    drafter = hf_d2sd.D2SDDrafterConfig(
        num_hidden_layers=5,
        block_size=16,
        mask_token_id=1,
        num_target_layers=layers,
        target_layer_ids=default_target_layer_ids(layers, 5),
        **sizes,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with CUDA:
            target = tf.Qwen3ForCausalLM(tf.Qwen3Config(num_hidden_layers=layers, **sizes, **special)).eval()
            drafters = [hf_d2sd.D2SDDrafterModel(drafter) for _ in range(2)]
    finally:
        torch.set_default_dtype(torch.float32)
    return target, hf_d2sd.D2SDAssistant.from_drafters(*drafters)


def filled_target(model, context: int, layer_ids: set[int], backend: str | None) -> Target:
    """A target whose cache holds random states for so many tokens: their values do not change what a pass costs."""
    target = Target(model, TreeCache(model.config), layer_ids, backend=backend)
    for layer in target.cache.layers:
        states = torch.randn(1, 8, context, 128, device=CUDA, dtype=torch.bfloat16)
        layer.update(states, states)
    target.positions = [context]
    return target


def filled_drafter(model, target, context: int) -> Drafter:
    drafter = Drafter(model, target)
    for layer in drafter.context.cache.layers:
        states = torch.randn(1, 8, context - 1, 128, device=CUDA, dtype=torch.bfloat16)
        layer.update(states, states)
    drafter.context.positions = [context - 1]
    width = model.fc.in_features
    drafter.context.extend(torch.randn(1, 1, width, device=CUDA, dtype=torch.bfloat16), [context], [1])
    return drafter


def plain_step(model, context: int, compiled: bool) -> float:
    """One token by plain decoding over a static cache, as `generate` runs it."""
    cache = tf.StaticCache(config=model.config, max_cache_len=context + 64)
    run = torch.compile(model.forward, mode="reduce-overhead") if compiled else model.forward
    token, position = torch.tensor([[5]], device=CUDA), torch.tensor([[context]], device=CUDA)
    for layer in cache.layers:
        states = torch.randn(1, 8, context, 128, device=CUDA, dtype=torch.bfloat16)
        layer.update(states, states)

    def step():
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)
        return run(input_ids=token, position_ids=position, use_cache=True, **{CACHE_NAME: cache}).logits.argmax(-1)

    return milliseconds(step)


def cycle_times(model, pair, context: int, budget: int, compiler) -> dict:
    """Each part of a cycle, and the whole of it, of trees with `budget` nodes; all rejected but the anchor."""
    layers = {i for drafter in pair.drafters for i in drafter.config.target_layer_ids}
    target = filled_target(model, context, layers, None)
    drafters = [filled_drafter(drafter, model, context) for drafter in pair.drafters]
    batch = Batch(target, drafters, endless_choosers(), DecodingOptions(4, budget, 16, 16))
    path = torch.zeros(1, 16 if compiler is not None else 1, dtype=torch.long, device=CUDA)

    def cycle(batch):
        step = batch.target.verify(grow(batch.state([5])))
        step.logits.argmax(-1).tolist()
        batch.commit(step, Accepted([], [[0]], [[5]], path))

    with FixedShapes(compiler)(batch) if compiler is not None else contextlib.nullcontext(batch) as batch:
        cycle(batch)
        result = {"cycle_ms": milliseconds(lambda: cycle(batch), warm=4)}
        tree = grow(batch.state([5]))

        def verify():
            target.commit(target.verify(tree), path, [0])

        if compiler is None:
            result["verify_ms"] = milliseconds(verify)
    return result


def endless_choosers() -> Choosers:
    """Greedy choosers of one row that may go on for a thousand tokens."""
    criteria = tf.StoppingCriteriaList([tf.MaxLengthCriteria(1025)])
    return Choosers(torch.tensor([[5]], device=CUDA), tf.LogitsProcessorList(), criteria, do_sample=False)


def draft_times(model, pair, context: int) -> dict:
    """The first draft of 16 and the second of 4 blocks of 16, each over a context of so many tokens."""
    first, second = (filled_drafter(drafter, model, context) for drafter in pair.drafters)
    anchor, tokens = torch.tensor([5], device=CUDA), torch.arange(15, device=CUDA)[None]
    lengths = torch.tensor([[0, 1, 2, 3]], device=CUDA)

    def again(drafter):
        features = torch.zeros(1, 1, drafter.model.fc.in_features, device=CUDA)
        drafter.context.cache.set_lengths([context - 1])
        drafter.context.waiting = ((features.bfloat16(), [1]),)

    def run_first():
        again(first)
        first.draft(anchor, 16)

    def run_second():
        again(second)
        second.redraft(anchor, Draft.of(tokens[None], torch.ones(1, 1, 15, device=CUDA)).cut(lengths), 16)

    return {"first_ms": milliseconds(run_first), "second_ms": milliseconds(run_second)}


def timings(contexts: list[int], sizes: list[int]) -> dict:
    model, pair = large_models()
    speed = bandwidth()
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name) * 2
    drafted = sum(p.numel() for p in pair.parameters()) * 2 + 2 * model.lm_head.weight.numel() * 2
    result = {"bandwidth_gb_s": round(speed / 1e9), "weights": "random, of Qwen3-8B's shapes"}
    for context in contexts:
        keys = 36 * 2 * 8 * 128 * 2 * context
        row = {
            "floor_plain_step_ms": round(1000 * (weights + keys) / speed, 3),
            "floor_cycle_ms": round(1000 * (weights + keys + drafted + 10 * 2 * 8 * 128 * 2 * context) / speed, 3),
            "plain_step_ms": plain_step(model, context, compiled=False),
            "plain_step_compiled_ms": plain_step(model, context, compiled=True),
            **draft_times(model, pair, context),
        }
        for name in (*KERNELS, "sdpa"):
            if name != "sdpa" and KERNELS[name].obstacle(Facts.of(model)):
                continue
            target = filled_target(model, context, {0}, name)
            for size in sizes:
                tree = random_tree(1, size, torch.Generator().manual_seed(size))

                def verify(target=target, tree=tree):
                    target.commit(target.verify(tree), torch.zeros(1, 1, dtype=torch.long, device=CUDA), [0])

                row[f"verify_{size}_{name}_ms"] = milliseconds(verify)
        row["eager"] = cycle_times(model, pair, context, 64, None)
        compiler = lambda f: compile_once({"dynamic": False, "mode": "reduce-overhead"}, f)  # noqa: E731
        row["compiled"] = cycle_times(model, pair, context, 64, compiler)
        row["compiled_cycle_over_compiled_step"] = round(
            row["compiled"]["cycle_ms"] / row["plain_step_compiled_ms"], 3
        )
        row["bound"] = 1.6
        row["tokens_per_second_at_7.05"] = round(1000 * PAPERS_ACCEPTANCE / row["compiled"]["cycle_ms"], 1)
        row["tokens_per_second_at_7.05_floor"] = round(1000 * PAPERS_ACCEPTANCE / row["floor_cycle_ms"], 1)
        result[f"context_{context}"] = row
        print(json.dumps({f"context_{context}": row}), flush=True)
        torch.cuda.empty_cache()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 8192, 32768])
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 32, 64, 128])
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    refuse_unwritable_file("--out", args.out)
    if not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA device.", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.cuda.get_device_name()
    result = {
        "what": "checks and costs on a GPU; random weights, of Qwen3-8B's shapes for the timings",
        "command": " ".join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]]),
        "hardware": device,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": tf.__version__},
    }
    failed = check_all(result)
    out = args.out or RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    if not args.checks_only:
        with torch.no_grad():
            result["timings"] = timings(args.contexts, args.sizes)
        out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{out}: {'failed: ' + ', '.join(failed) if failed else 'all checks hold'}")
    return bool(failed)


def check_all(result: dict) -> list[str]:
    """Run the checks, write what they gave into `result`, and return the names of those that failed."""
    failed, checks = [], result.setdefault("checks", {})

    def note(name: str, figures: dict, holds: bool) -> None:
        checks[name] = figures
        print(json.dumps({name: figures}), flush=True)
        if not holds:
            failed.append(name)

    for name in (name for name in KERNELS if name != "cpu"):
        reason = obstacle(name)
        if reason:
            checks[name] = {"skipped": reason}
            continue
        for dtype in (torch.float16, torch.bfloat16):
            worst, bound = worst_error(name, dtype, trees=60)
            note(f"{name} {dtype}", {"error": worst, "bound": bound}, worst <= bound)
        agreement = equality(torch.bfloat16, name)
        note(f"{name} decodes in bfloat16", agreement, agreement["gap_at_first_difference"] < 0.5)
    exact = equality(torch.float32)
    note("decodes in float32", exact, exact["equal"] == 1.0)
    for options in ({}, {"mode": "reduce-overhead"}):
        compiled = compiled_equality(options)
        note(f"compiled {options}", compiled, compiled["equal"])
    return failed


if __name__ == "__main__":
    sys.exit(main())
