"""Both engines of `hf-d2sd distill` side by side: the same prompts, the same texts, tokens a second of each.

    python benchmarks/distill_engines.py --target TARGET --prompts PROMPTS.jsonl --count 48 --out FILE.json

Rounds alternate between the engines. Medians of the rounds are compared: on a CPU of the process's own seconds, which
other work on the machine changes less than the clock's.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from hf_d2sd import records
from hf_d2sd.benchmark.machine import environment
from hf_d2sd.training.chats import read_chats
from hf_d2sd.training.distill import DistillOptions, Writer
from hf_d2sd.training.engines import make_engine
from hf_d2sd.training.shards import batched


@dataclass
class Options:
    target: str
    prompts: list[str]
    out: Path
    count: int = 48
    max_new_tokens: int = 256
    batch_size: int = field(default=16, metadata={"help": "of batches; continuous batching gets all prompts at once"})
    slots: list[int] = field(default_factory=lambda: [16])
    rounds: int = 2
    dtype: str = "float32"


@torch.inference_mode()
def gap(model, prompt: list[int], one: list[int], other: list[int]) -> float:
    """How far apart the logits are of the first tokens that differ: a near-tie, or an error."""
    same = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), None)
    if same is None:
        return 0.0
    logits = model(torch.tensor([prompt + one[:same]], device=model.device)).logits[0, -1].float()
    return round(abs(float(logits[one[same]] - logits[other[same]])), 3)


def main(options: Options) -> None:
    distill = DistillOptions(options.target, options.out, options.prompts, dtype=options.dtype)
    writer = Writer(distill)
    chats = sorted(read_chats(options.prompts, options.count, seed=0), key=lambda chat: chat.order)
    prompts = [tokens for tokens in map(writer.opening_tokens, chats) if tokens is not None]  # the others are too long
    settings = dict(do_sample=False, max_new_tokens=options.max_new_tokens, **writer._ends)
    engines = {"batches": (make_engine("batches", writer.model), options.batch_size)} | {
        f"continuous, {slots} slots": (make_engine("continuous", writer.model, slots), len(prompts))
        for slots in options.slots
    }
    clock = time.perf_counter if writer.model.device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    texts = {}
    for _ in range(options.rounds):
        for name, (engine, size) in engines.items():
            started = clock()
            texts[name] = [text.tolist() for part in batched(prompts, size) for text in engine(part, settings)]
            seconds[name].append(round(clock() - started, 2))
            print(name, seconds[name][-1], "s", flush=True)
    tokens = {name: sum(map(len, found)) for name, found in texts.items()}
    speed = {name: tokens[name] / statistics.median(taken) for name, taken in seconds.items()}
    result = {
        "settings": {**vars(options), "out": None},
        "environment": environment(),
        "seconds": seconds,
        "reply_tokens": tokens,
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "ratio_to_batches": {name: round(value / speed["batches"], 3) for name, value in speed.items()},
        "same_texts": {name: sum(a == b for a, b in zip(found, texts["batches"])) for name, found in texts.items()},
    }
    result["gaps"] = {  # of the logits where the texts part
        name: sorted(gap(writer.model, *row) for row in zip(prompts, found, texts["batches"]) if row[1] != row[2])
        for name, found in texts.items()
    }
    records.write_json(options.out, result)
    print(result["ratio_to_batches"], result["same_texts"])


if __name__ == "__main__":
    main(*HfArgumentParser(Options).parse_args_into_dataclasses())
