"""Greedy D²SD decoding against plain `generate` on SmolLM2-135M-Instruct, prompt by prompt, in float32.

    python benchmarks/equality.py --out benchmarks/results/equality-smollm2.json

Every prompt of benchmarks/prompts (both turns where there are two) is answered by plain `generate` in batches and by
`generate(assistant_model=...)` one by one. Where the two differ, plain `generate` answers that prompt by itself and
decides. Rows are written as they come (`--work`); a killed run goes on where it stopped, with the same drafters and as
many new tokens. The exit status is 1 if any row differs.
"""

import argparse
import hashlib
import json
import platform
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from smollm2 import load_smollm2  # noqa: E402

import hf_d2sd  # noqa: E402
from hf_d2sd import records  # noqa: E402
from hf_d2sd.benchmark.machine import versions  # noqa: E402
from hf_d2sd.checks import refuse_unwritable_file, refuse_unwritable_folder  # noqa: E402

PAIR = HERE.parent / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"


def read_prompts(files: list[Path]) -> list[dict]:
    """One entry for each turn: id, task, number of the turn, and the user turns up to it."""
    entries = []
    for file in files:
        for _, row in records.read_numbered(file):
            for turn in range(len(row["turns"])):
                key = f"{row['id']}#{turn}"
                entries.append({"key": key, "task": row["task"], "turns": row["turns"][: turn + 1]})
    return entries


def chat_ids(tokenizer, entry: dict, plain: dict[str, dict]) -> list[int]:
    """The prompt of a turn; the turns before it are answered by plain decoding."""
    messages = []
    for number, turn in enumerate(entry["turns"]):
        if number:
            reply = plain[f"{entry['key'].rpartition('#')[0]}#{number - 1}"]["tokens"]
            messages.append({"role": "assistant", "content": tokenizer.decode(reply, skip_special_tokens=True)})
        messages.append({"role": "user", "content": turn})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def until_end(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def plain_batch(target, rows: list[list[int]], count: int) -> list[list[int]]:
    """Plain greedy replies to left-padded rows."""
    eos = target.generation_config.eos_token_id
    width = max(map(len, rows))
    ids = torch.tensor([[eos] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count)
    return [until_end(row, eos) for row in out[:, width:].tolist()]


def logit_gap(target, ids: list[int], one: list[int], other: list[int]) -> float:
    """How far apart the target's logits of the two tokens are where the replies part."""
    at = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    with torch.inference_mode():
        logits = target(torch.tensor([ids + one[:at]])).logits[0, -1]
    return float((logits[one[at]] - logits[other[at]]).abs())


def answer_plainly(args, shard: int, target, tokenizer, entries: list[dict]) -> None:
    """Write `plain-*.jsonl`: the reply to every prompt that has none yet, in batches of prompts of like length."""
    for turns in (1, 2):
        plain = read_rows(args.work, "plain")
        todo = [entry for entry in entries if len(entry["turns"]) == turns and entry["key"] not in plain]
        prompts = sorted(
            ((chat_ids(tokenizer, entry, plain), entry["key"]) for entry in todo), key=lambda p: len(p[0])
        )
        for start in range(0, len(prompts), args.batch_size):
            part = prompts[start : start + args.batch_size]
            replies = plain_batch(target, [ids for ids, _ in part], args.max_new_tokens)
            rows = [{"key": key, "tokens": reply} for (_, key), reply in zip(part, replies)]
            records.append(args.work / f"plain-{shard}.jsonl", *rows)
            print(f"shard {shard}: plain replies {start + len(part)}/{len(prompts)}", flush=True)


def compare(target, tokenizer, assistant, entry: dict, plain: dict[str, dict], count: int) -> dict:
    """One prompt with the drafters, against its plain reply."""
    ids, reply = chat_ids(tokenizer, entry, plain), plain[entry["key"]]["tokens"]
    inputs = torch.tensor([ids])
    options = dict(attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=count)
    ours = target.generate(inputs, **options, assistant_model=assistant)[0, len(ids) :].tolist()
    equal_to_batched = ours == reply
    if not equal_to_batched:
        reply = plain_batch(target, [ids], count)[0]
    stats = assistant.last_stats
    return {
        "key": entry["key"],
        "task": entry["task"],
        "equal": ours == reply,
        "equal_to_batched": equal_to_batched,
        "gap": None if ours == reply else logit_gap(target, ids, reply, ours),
        "new_tokens": len(ours),
        "cycles": stats.cycles,
        "nodes": sum(stats.tree_sizes),
        "sources": stats.tokens_by_source,
    }


def work(args, shard: int) -> None:
    """Answer this shard's prompts that no row is written for yet."""
    torch.set_num_threads(1)
    target, tokenizer = load_smollm2(torch.float32)
    entries = read_prompts(args.prompts)
    names = sorted({entry["key"].rpartition("#")[0] for entry in entries})
    if args.max_prompts is not None:
        names = sorted(random.Random(0).sample(names, min(args.max_prompts, len(names))))
    mine = {name for i, name in enumerate(names) if i % args.workers == shard}
    entries = [entry for entry in entries if entry["key"].rpartition("#")[0] in mine]
    assistant = hf_d2sd.D2SDAssistant.from_pretrained(args.pair, dtype=torch.float32)
    for _ in range(2):  # first those whose plain replies an earlier run has left
        compare_all(args, shard, target, tokenizer, assistant, entries)
        answer_plainly(args, shard, target, tokenizer, entries)


def compare_all(args, shard: int, target, tokenizer, assistant, entries: list[dict]) -> None:
    """Write `rows-*.jsonl` for every prompt that has a plain reply and no row yet."""
    plain, done = read_rows(args.work, "plain"), read_rows(args.work, "rows")
    todo = [entry for entry in entries if entry["key"] in plain and entry["key"] not in done]
    random.Random(0).shuffle(todo)  # what a stopped run leaves is then a sample of all tasks
    for number, entry in enumerate(todo, 1):
        row = compare(target, tokenizer, assistant, entry, plain, args.max_new_tokens)
        records.append(args.work / f"rows-{shard}.jsonl", row)
        if number % 10 == 0 or not row["equal"]:
            print(f"shard {shard}: {number}/{len(todo)}, {row['key']} equal: {row['equal']}", flush=True)


def read_rows(folder: Path, kind: str) -> dict[str, dict]:
    """The rows of all shards, by key."""
    files = sorted(folder.glob(f"{kind}-*.jsonl"))
    return {row["key"]: row for file in files for row in records.read(file)}


def weights_of(pair: str) -> str:
    return hashlib.sha256((Path(pair) / "model.safetensors").read_bytes()).hexdigest()


def summary(args, rows: dict[str, dict]) -> dict:
    tasks = defaultdict(lambda: defaultdict(int))
    for row in rows.values():
        for task in (row["task"], "all"):
            total = tasks[task]
            total["prompts"] += 1
            total["equal"] += row["equal"]
            total["tokens"] += row["new_tokens"]
            total["committed_in_cycles"] += row["new_tokens"] - 1
            total["cycles"] += row["cycles"]
            total["nodes"] += row["nodes"]
    for total in tasks.values():
        cycles = max(total["cycles"], 1)
        total["mean_acceptance_length"] = round(total.pop("committed_in_cycles") / cycles, 3)
        total["mean_tree_size"] = round(total.pop("nodes") / cycles, 1)
    return {
        "what": "greedy D²SD against plain generate, SmolLM2-135M-Instruct, float32, CPU",
        "max_new_tokens": args.max_new_tokens,
        "differing": [{name: row[name] for name in ("key", "gap")} for row in rows.values() if not row["equal"]],
        "decided_by_unbatched_plain": sum(not row["equal_to_batched"] for row in rows.values()),
        "tasks": tasks,
        "drafters_sha256": weights_of(args.pair),
        "versions": versions(),
        "cpu": f"{platform.machine()}, {args.workers} processes of one thread",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, default=sorted((HERE / "prompts").glob("*.jsonl")))
    parser.add_argument("--pair", default=str(PAIR))
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-prompts", type=int, help="so many, drawn at random, with all their turns")
    parser.add_argument("--batch-size", type=int, default=16, help="of plain generate")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=HERE / "results" / "equality-smollm2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    refuse_unwritable_folder("--work", args.work)
    refuse_unwritable_file("--out", args.out)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.shard is not None:
        work(args, args.shard)
        return 0
    settings = {"drafters_sha256": weights_of(args.pair), "max_new_tokens": args.max_new_tokens}
    records.begin(args.work / "run.json", settings)
    load_smollm2(torch.float32)  # converted once, before the workers read it
    command = [sys.executable, __file__, *sys.argv[1:]]
    running = [subprocess.Popen([*command, "--shard", str(shard)]) for shard in range(args.workers)]
    codes = [process.wait() for process in running]
    if any(codes):
        return 2
    rows = read_rows(args.work, "rows")
    result = summary(args, rows)
    records.write_json(args.out, result)
    print(json.dumps(result["tasks"], indent=2))
    print(f"{len(rows)} prompts, {len(result['differing'])} differ")
    return 1 if result["differing"] else 0


if __name__ == "__main__":
    sys.exit(main())
