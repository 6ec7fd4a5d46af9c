"""Is a call that says nothing of trees ever slower than plain decoding? On SmolLM2-135M-Instruct, where it runs.

python benchmarks/never_slower.py --out FOLDER [--pair FOLDER] [--threads 2] [--samples 2] [--new 96] [--repeats 3]

times plain decoding and `auto` on each of some prompts, greedy or at --temperature, in batches of 1 to 16, and on text
without structure: random tokens as prompts, at temperature 2; each several times, of which the middle ratio of the
seconds a token counts. Beside batches also `same tree`: the pair's own in every cycle, so that it shows from how many
rows on such trees do not pay any more. Then `hf-d2sd bench` runs with all strategies, greedy and at temperature 0.7.
All that for both dtypes.
A killed run goes on where it stopped; a measurement is a line of FOLDER/batches.jsonl as soon as it is there.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import set_seed

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from smollm2 import NAME, load_smollm2  # noqa: E402

from hf_d2sd import D2SDAssistant, records  # noqa: E402
from hf_d2sd.benchmark.options import BenchOptions  # noqa: E402
from hf_d2sd.benchmark.run import bench  # noqa: E402
from hf_d2sd.benchmark.suites import chat_text, read_suites  # noqa: E402

PROMPTS = sorted((HERE / "prompts").glob("*.jsonl"))
BATCHES, NOISE = (1, 2, 4, 8, 16), 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pair", default=str(HERE.parent / "hub_cards" / f"{NAME}-D2SD"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=2, help="prompts of each task")
    parser.add_argument("--new", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--temperature", type=float, default=0.0, help="of single prompts and batches; 0: greedy")
    parser.add_argument("--repeats", type=int, default=3, help="of each call")
    parser.add_argument("--only", nargs="+", help="these cases alone, as `noise 1` or an id of a prompt")
    parser.add_argument("--only_batches", action="store_true", help="leave the side by side of all strategies out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    for dtype in options.dtypes:
        batches(options, dtype)
        for temperature in () if options.only_batches or options.only else (0.0, 0.7):
            side_by_side(options, dtype, temperature)
    report(records.read(options.out / "batches.jsonl"))


def side_by_side(options, dtype: str, temperature: float) -> None:
    """All strategies on a few prompts of each task."""
    cache = Path(os.environ.get("HF_D2SD_CACHE") or Path.home() / ".cache" / "hf-d2sd")
    settings = dict(max_samples=options.samples, max_new_tokens=options.new, threads=options.threads, probes=0)
    run = BenchOptions(
        target=str(cache / NAME),
        drafters=[options.pair],
        prompts=PROMPTS,
        out=options.out / f"{dtype}-{temperature}",
        dtype=dtype,
        temperature=temperature,
        **settings,
    )
    bench(run)


def batches(options, dtype: str) -> None:
    """Plain decoding and `auto` in turns, on single prompts, batches of them, and noise."""
    file = options.out / "batches.jsonl"
    done = {tuple(row["key"]) for row in records.read(file)}
    model, tokenizer = load_smollm2(getattr(torch, dtype))
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    assistant = D2SDAssistant.from_pretrained(options.pair, dtype=model.dtype)
    prompts = read_suites(PROMPTS, options.samples)
    texts = {prompt.id: chat_text(tokenizer, list(prompt.turns[:1]), [], None, {}) for prompt in prompts}
    drawn = {"do_sample": True, "temperature": options.temperature} if options.temperature else {}
    for name, inputs, given in cases(tokenizer, texts, model.config.vocab_size):
        if options.only and name not in options.only:
            continue
        for repeat in range(options.repeats):
            key = (f"{dtype}, temperature {options.temperature}" if drawn else dtype, name, repeat)
            if key not in done:
                ways = {"plain": {}, "auto": dict(assistant_model=assistant, d2sd_auto=True)}
                if name.startswith("batch"):
                    ways["same tree"] = dict(assistant_model=assistant, d2sd_auto=False)
                row = timed(model, ways, inputs, options.new, repeat, {**drawn, **given})
                records.append(file, {"key": key, **row})


def cases(tokenizer, texts: dict[str, str], vocab: int):
    """Name, inputs of `generate`, and options of its."""

    def encoded(chosen: list[str]):
        return tokenizer(chosen, return_tensors="pt", padding=True, add_special_tokens=False)

    for name, text in texts.items():
        yield name, encoded([text]), dict(min_new_tokens=None)  # it ends where it ends
    for rows in BATCHES:
        yield f"batch of {rows}", encoded([list(texts.values())[i % len(texts)] for i in range(rows)]), {}
    for seed in range(NOISE):
        ids = torch.randint(vocab, (1, 128), generator=torch.Generator().manual_seed(seed))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield f"noise {seed}", inputs, dict(do_sample=True, temperature=2.0, top_k=0)


def timed(model, ways: dict[str, dict], inputs, new: int, repeat: int, given: dict) -> dict:
    """Of a call in each way, by its name: seconds, the prompt's pass included, and tokens; who goes first alternates.

    And what was decided where that was `auto`, in words.
    """
    row = {"seconds": {}, "tokens": {}}
    for name in list(ways) if repeat % 2 else reversed(ways):
        set_seed(repeat)
        start = time.perf_counter()
        arguments = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, **given}
        sequences = model.generate(**inputs, **arguments, **ways[name])
        row["seconds"][name] = time.perf_counter() - start
        row["tokens"][name] = sequences.shape[1] - inputs["input_ids"].shape[1]
        if name == "auto":
            row["decisions"] = str(ways[name]["assistant_model"].last_stats.decisions)
    return row


def report(rows: list[dict]) -> None:
    """The median of plain over each other way, of seconds a token, by dtype and case."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        taken = {way: seconds / row["tokens"][way] for way, seconds in row["seconds"].items()}
        for way in sorted(set(taken) - {"plain"}):
            found.setdefault((*row["key"][:2], way), []).append(taken["plain"] / taken[way])
    for (dtype, name, way), ratios in found.items():
        print(f"{dtype} {name}, {way}: {median(ratios):.2f} times plain ({min(ratios):.2f} to {max(ratios):.2f})")
    for dtype in dict.fromkeys(dtype for dtype, *_ in found):
        alone = [median(ratios) for (of, name, _), ratios in found.items() if of == dtype and "/" in name]
        if alone:
            print(
                f"{dtype}, {len(alone)} prompts: {median(alone):.2f} times plain, {min(alone):.2f} to {max(alone):.2f}"
            )


if __name__ == "__main__":
    main()
