"""What a pass over one token costs SmolLM2-135M-Instruct: as stock runs it, and as plain steps do.

    python benchmarks/one_row.py --out FILE.json [--dtype float32] [--threads 2] [--context 240]

Both run in turns on caches of the same text, so that what else the machine does falls on both. Beside the passes stand
the ways of each weight's product, as the first passes timed them, and what was chosen.
"""

import argparse
import contextlib
import platform
import time
from pathlib import Path
from statistics import median

import equality  # noqa: F401  finds examples/smollm2.py
import torch
from smollm2 import load_smollm2
from transformers import DynamicCache

from hf_d2sd import products, records
from hf_d2sd.attention import TreeAttention
from hf_d2sd.benchmark.machine import versions
from hf_d2sd.checks import refuse_unwritable_file
from hf_d2sd.compat import for_few_tokens

TEXT = "The keeper of the lighthouse had a dog that was afraid of the sea."


def timed(run, within, cache, token: torch.Tensor) -> float:
    """Seconds of a pass over one token, which the cache then forgets."""
    start = time.perf_counter()
    with within():
        run(input_ids=token, past_key_values=cache)
    seconds = time.perf_counter() - start
    cache.crop(-1)
    return seconds


@torch.no_grad()
def measure(args) -> dict:
    target, tokenizer = load_smollm2(getattr(torch, args.dtype))
    ids = tokenizer(" ".join([TEXT] * (args.context // 15)), return_tensors="pt").input_ids
    grouped = TreeAttention.for_model(target).active_for_one
    ways = {"stock": (target, contextlib.nullcontext), "plain step": (for_few_tokens(target), grouped)}
    caches = {name: DynamicCache(config=target.config) for name in ways}
    for cache in caches.values():
        target(input_ids=ids, past_key_values=cache)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.passes):
        for name, (run, within) in ways.items():
            seconds[name].append(timed(run, within, caches[name], ids[:, -1:]))
    ratios = [stock / ours for stock, ours in zip(*seconds.values())]
    return {
        "dtype": args.dtype,
        "threads": args.threads,
        "cached tokens": ids.shape[1],
        "cpu": platform.machine(),
        "versions": versions(),
        "milliseconds": {name: round(1e3 * median(taken), 1) for name, taken in seconds.items()},
        "stock over plain step": round(median(ratios), 3),
        "microseconds of products": {
            " x ".join(map(str, key[1])): {
                "chosen": choice.best.__name__,
                **{way.__name__: round(1e6 * min(taken)) for way, taken in choice.times},
            }
            for key, choice in products._choices.items()
            if choice.best is not None
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=240, help="tokens in the cache, about")
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    refuse_unwritable_file("--out", args.out, makes_folder=True)
    torch.set_num_threads(args.threads)
    found = measure(args)
    records.write_json(args.out, found)
    print(found)


if __name__ == "__main__":
    main()
