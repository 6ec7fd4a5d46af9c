"""Tokens a target pass of each strategy, greedy, on SmolLM2-135M-Instruct: the paper's ablation, and wide trees.

    python benchmarks/acceptance.py --pair FOLDER --out FILE.json

Every prompt of benchmarks/prompts (first turns) is answered with each strategy by real decoding, some of a task
side by side. Rows go to FILE.jsonl as they come, their settings to FILE.run.json, and a killed run goes on where it
stopped; several runs with --part share the work. The mean over files is that of the files' own figures, so that each
counts alike.

With --replay the target's greedy text is written once, plainly, and its hidden states are computed once: drafters then
decode it with everything real but the target's passes, see `hf_d2sd.benchmark.replaying`. The figures differ from real
decoding by what bf16 rounds otherwise in passes of other shapes.

The rows of the paper's ablation hold all nodes that the drafts give; the wide trees hold --nodes, the anchor included:
the nodes a pass are printed beside each figure, since they are what a pass costs. Several --nodes give a row each, and
--heads with without measures the pair a second time without its path heads and what the text so far says of paths (and
the temperatures that go with them); heads and text measure it with one of the two.

The oracles, which need --replay, follow the target's own path for as long as the drafts' candidates hold it: what no
tree of these candidates can exceed.
"""

import argparse
import dataclasses
import functools
import json
import platform
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from equality import HERE, PAIR, chat_ids, read_prompts
from smollm2 import load_smollm2
from transformers import GenerationConfig

import hf_d2sd
from hf_d2sd import records, vocabulary
from hf_d2sd.benchmark.replaying import Text, follow, replay
from hf_d2sd.benchmark.strategies import Models, all_strategies, find_strategy
from hf_d2sd.checks import refuse_unknown_dtype, refuse_unwritable_file
from hf_d2sd.decoding import decode
from hf_d2sd.options import settle
from hf_d2sd.training.features import compute_features
from hf_d2sd.training.shards import Row

ROWS = {
    "first drafter alone": "dflash",
    "+ resampled branches": "resample",
    "first drafter reused as second": "reuse",
    "D²SD as in the paper": "d2sd",
    "+ a third level": "d2sd-3",
    "wide tree, first drafter alone": "ddtree",
    "wide tree, first drafter reused": "reuse:width={width},budget={nodes}",
    "wide tree, D²SD": "d2sd-wide",
    "wide tree, D²SD, a third level": "d2sd-wide:levels=3",
    "wide tree, D²SD, a fourth level": "d2sd-wide:levels=4",
    "the text so far alone": "context",
    "wide tree, D²SD and the text so far": "d2sd-context",
    "wide tree, D²SD, a third level and the text so far": "d2sd-context:levels=3",
}
SIZED = [row for row in ROWS if row.startswith("wide")]


ORACLES = {"oracle, first drafter alone": "ddtree", "oracle, D²SD": "d2sd-wide"}
# What drafts know of their paths: in the words of the table, and whether the pair has its heads, and reads the text.
PATHS = {
    "with": ("", True, True),
    "without": (", without heads", False, False),
    "heads": (", heads alone", True, False),
    "text": (", text alone", False, True),
}


def strategies(args) -> dict[str, tuple[str, int, str]]:
    """By the words of the table: a strategy's name, nodes of a wide tree, and which of `PATHS`."""
    result = {}
    for heads in args.heads:
        for row in args.strategies:
            name = {**ROWS, **ORACLES}[row]
            trees = args.nodes if "{nodes}" in name or row in SIZED else args.nodes[:1]
            for nodes in trees:
                words = row if len(trees) == 1 else f"{row}, {nodes} nodes"
                words += PATHS[heads][0]
                result[words] = name.format(width=args.width, nodes=nodes), nodes, heads
    return result


def generate_arguments(args, models: dict[str, Models], name: str, nodes: int, heads: str) -> dict:
    known = all_strategies(args.branches, args.width, nodes)
    return find_strategy(name, known).generate_arguments(models[heads])


def read_pair(args, heads: str) -> Models:
    pair = hf_d2sd.D2SDAssistant.from_pretrained(args.pair, dtype=getattr(torch, args.dtype))
    _, has_heads, reads_text = PATHS[heads]
    for drafter in pair.drafters if heads != "with" else ():
        drafter.config.confidence_temperatures = None
        if not has_heads:
            drafter.path_head = drafter.config.path_rank = None
        if not reads_text:
            drafter.config.path_text_weight = None
    return Models(pair)


def batches(args, tokenizer) -> list[tuple[str, str, list[str], list[list[int]]]]:
    """File, task, keys and prompts of each batch: prompts of one task, of like length."""
    result = []
    for file in args.prompts:
        tasks = defaultdict(list)
        entries = [entry for entry in read_prompts([file]) if entry["key"].endswith("#0")]
        if args.max_prompts:
            entries = entries[:: max(1, len(entries) // args.max_prompts)][: args.max_prompts]
        for entry in entries:
            tasks[entry["task"]].append((chat_ids(tokenizer, entry, {}), entry["key"]))
        for task, prompts in tasks.items():
            prompts.sort(key=lambda prompt: len(prompt[0]))
            for start in range(0, len(prompts), args.batch_size):
                part = prompts[start : start + args.batch_size]
                result.append((file.stem, task, [key for _, key in part], [ids for ids, _ in part]))
    return result


def left_padded(rows: list[list[int]], filler: int) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = [[filler] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def read_rows(path: Path) -> list[dict]:
    """The rows of a run and of its parts."""
    files = sorted([path.with_suffix(".jsonl"), *path.parent.glob(f"{path.stem}-[0-9]*.jsonl")])
    return [row for file in files for row in records.read(file)]


def measure(args) -> None:
    """Write a row for each batch and strategy: committed tokens, target passes and nodes."""
    dtype = getattr(torch, args.dtype)
    target, tokenizer = load_smollm2(dtype)
    models = {heads: read_pair(args, heads) for heads in args.heads}
    path = args.out.with_name(f"{args.out.stem}{f'-{args.part}' if args.parts > 1 else ''}.jsonl")
    known = {(row["keys"][0], row["strategy"]) for row in read_rows(args.out)}
    todo = batches(args, tokenizer)[args.part :: args.parts]
    for number, (file, task, keys, prompts) in enumerate(todo, 1):
        inputs, texts = left_padded(prompts, target.generation_config.eos_token_id), None
        for name, strategy in strategies(args).items():
            if (keys[0], name) in known:
                continue
            arguments = generate_arguments(args, models, *strategy)
            if args.replay:
                texts = texts or known_texts(args, target, inputs, prompts)
                counts = replayed(follow if name.startswith("oracle") else decode, args, target, texts, arguments)
            else:
                counts = decoded(args, target, inputs, arguments)
            records.append(path, {"file": file, "task": task, "keys": keys, "strategy": name, **counts})
        print(f"{number}/{len(todo)}", flush=True)


def decoded(args, target, inputs: dict, arguments: dict) -> dict:
    """Tokens, passes and nodes of real decoding."""
    end = target.generation_config.eos_token_id
    target.generate(**inputs, do_sample=False, max_new_tokens=args.max_new_tokens, pad_token_id=end, **arguments)
    stats = arguments["assistant_model"].last_stats
    committed = stats.committed_per_cycle
    return {"tokens": sum(committed), "passes": len(committed), "nodes": sum(stats.tree_sizes)}


def known_texts(args, target, inputs: dict, prompts: list[list[int]]) -> list[Text]:
    """The target's own greedy replies to all prompts, and its hidden states; replies of one token are left out."""
    end = target.generation_config.eos_token_id
    options = {"do_sample": False, "max_new_tokens": args.max_new_tokens, "pad_token_id": end}
    replies = target.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    replies = [reply[: reply.index(end) + 1] if end in reply else reply for reply in replies]
    rows = [Row(torch.tensor(ids + reply), len(ids)) for ids, reply in zip(prompts, replies) if len(reply) > 1]
    layers = tuple(range(target.config.num_hidden_layers))
    states = compute_features(target, rows, layers)

    def reader(row: torch.Tensor):
        parts = row.unflatten(-1, (len(layers), -1))
        return functools.cache(lambda layer_ids: parts[:, list(layer_ids)].flatten(1))

    known = []
    for row, states_of_row in zip(rows, states):
        read = reader(states_of_row)
        known.append(Text(row.tokens, row.prompt_length, lambda ids, read=read: read(tuple(ids))))
    return known


def replayed(loop, args, target, texts: list[Text], arguments: dict) -> dict:
    """Tokens, passes and nodes, had the texts been decoded so."""
    arguments = dict(arguments)
    assistant = arguments.pop("assistant_model")
    options = settle(assistant, GenerationConfig(**arguments))
    end = target.generation_config.eos_token_id
    return dataclasses.asdict(replay(assistant, target, texts, options, args.max_new_tokens, [end], loop))


def settings(args) -> dict:
    """What rows must have in common to stand in one table."""
    names = ("branches", "width", "max_new_tokens", "batch_size", "max_prompts", "dtype", "replay", "words")
    nodes = args.nodes if len(args.nodes) > 1 else args.nodes[0]
    return {"pair": Path(args.pair).name, "nodes": nodes, **{name: getattr(args, name) for name in names}}


def table(args, rows: list[dict]) -> dict[str, dict]:
    """By strategy: tokens a target pass for each file and task, their mean over files, and nodes a pass."""
    result = {}
    for strategy in strategies(args):
        sums = defaultdict(lambda: [0, 0])
        mine = [row for row in rows if row["strategy"] == strategy]
        for row in mine:
            for group in {row["file"], row["task"]}:
                sums[group][0] += row["tokens"]
                sums[group][1] += row["passes"]
        means = {group: tokens / max(passes, 1) for group, (tokens, passes) in sorted(sums.items())}
        files = sorted({row["file"] for row in mine})
        result[strategy] = {
            "prompts": sum(len(row["keys"]) for row in mine),
            "mean of files": round(sum(means[file] for file in files) / max(len(files), 1), 4),
            "nodes a pass": round(sum(row["nodes"] for row in mine) / max(sum(row["passes"] for row in mine), 1), 1),
            **{group: round(mean, 4) for group, mean in means.items()},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default=str(PAIR))
    parser.add_argument("--prompts", type=Path, nargs="+", default=sorted((HERE / "prompts").glob("*.jsonl")))
    parser.add_argument("--max-prompts", type=int, help="so many of each file, evenly spread")
    parser.add_argument(
        "--strategies", nargs="+", choices=[*ROWS, *ORACLES], default=list(ROWS), help="rows of the table"
    )
    parser.add_argument("--branches", type=int, default=4, help="K")
    parser.add_argument("--width", type=int, default=8, help="of the wide trees")
    parser.add_argument("--nodes", type=int, nargs="+", default=[32], help="of the wide trees")
    parser.add_argument("--heads", nargs="+", choices=list(PATHS), default=["with"], help="path heads")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--words", type=int, default=vocabulary.MOST_WORDS, help="most that a call adds to drafts' words"
    )
    parser.add_argument("--replay", action="store_true", help="leave out the target's passes over trees")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not args.replay and set(args.strategies) & set(ORACLES):
        parser.error("oracles need --replay.")
    refuse_unwritable_file("--out", args.out, makes_folder=True)
    refuse_unknown_dtype(args.dtype)
    torch.set_num_threads(args.threads)
    vocabulary.MOST_WORDS = args.words
    records.begin(args.out.with_suffix(".run.json"), settings(args))
    measure(args)
    result = {
        "what": "tokens committed in a target pass, greedy, the prompt's pass left out",
        "pair": Path(args.pair).name,
        "branches": args.branches,
        "width and nodes of wide trees": [args.width, *args.nodes],
        "dtype": args.dtype,
        "max_new_tokens": args.max_new_tokens,
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "cpu": platform.machine(),
        "strategies": table(args, read_rows(args.out)),
    }
    records.write_json(args.out, result)
    print(json.dumps(result["strategies"], indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
