"""Let the target write the text its drafters learn from: greedy responses to prompts, in resumable shards.

    python examples/distill_responses.py --target TARGET --prompts prompts.jsonl --self-prompts 3000 --out data/

`--prompts` takes JSON lines with `turns` (the first turn is used). `--self-prompts N` adds prompts that the target
writes itself: its chat template is opened at the user's turn and sampled (the idea of Magpie, arXiv 2406.08464).
A shard holds one batch; a shard that is already there is skipped, so a killed run continues where it stopped.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def open_user_turn(tokenizer) -> str:
    """The chat template up to the place where the user's words begin."""
    marker = "\u241f"
    text = tokenizer.apply_chat_template([{"role": "user", "content": marker}], tokenize=False)
    return text[: text.index(marker)]


def read_prompts(paths: list[str], limit: int | None, seed: int) -> list[str]:
    prompts = []
    for path in paths:
        with open(path, encoding="utf-8") as lines:
            rows = [json.loads(line)["turns"][0] for line in lines if line.strip()]
        random.Random(seed).shuffle(rows)
        prompts += rows[:limit]
    return prompts


@torch.inference_mode()
def write_self_prompts(model, tokenizer, count: int, batch_size: int, seed: int) -> list[str]:
    """Prompts sampled from the target itself (T=1), without empty ones and repetitions."""
    torch.manual_seed(seed)
    opening = tokenizer(open_user_turn(tokenizer), return_tensors="pt", add_special_tokens=False).input_ids
    found: dict[str, None] = {}
    while len(found) < count:
        inputs = opening.expand(batch_size, -1)
        out = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=True, max_new_tokens=80)
        for row in out[:, opening.shape[1] :]:
            if not (row == tokenizer.eos_token_id).any():
                continue
            text = tokenizer.decode(row, skip_special_tokens=True).strip()
            if len(text) >= 12:
                found.setdefault(text)
        print(f"self-written prompts: {len(found)}/{count}", flush=True)
    return list(found)[:count]


def save_shard(path: Path, prompts: torch.Tensor, mask: torch.Tensor, responses: torch.Tensor, eos: int) -> int:
    """Rows without padding, one after another; `lengths` and `prompt_lengths` cut them apart again."""
    rows, prompt_lengths = [], []
    for prompt, keep, response in zip(prompts, mask.bool(), responses):
        ends = (response == eos).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(response)
        rows.append(torch.cat([prompt[keep], response[:length]]))
        prompt_lengths.append(int(keep.sum()))
    partial = path.with_suffix(".partial")
    save_file(
        {
            "tokens": torch.cat(rows).to(torch.int32),
            "lengths": torch.tensor([len(row) for row in rows]),
            "prompt_lengths": torch.tensor(prompt_lengths),
        },
        partial,
    )
    os.replace(partial, path)
    return sum(map(len, rows)) - sum(prompt_lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--prompts", nargs="*", default=[])
    parser.add_argument("--per-file", type=int, help="take at most this many prompts of each file")
    parser.add_argument("--self-prompts", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--max-prompt-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.target, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=args.dtype).eval()

    prompt_file = out / "prompts.json"
    if not prompt_file.exists():
        prompts = read_prompts(args.prompts, args.per_file, args.seed)
        if args.self_prompts:
            prompts += write_self_prompts(model, tokenizer, args.self_prompts, args.batch_size, args.seed)
        prompts = list(dict.fromkeys(prompts))
        prompt_file.write_text(json.dumps(prompts))
    prompts = json.loads(prompt_file.read_text())

    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    chats = [c for c in chats if len(tokenizer(c).input_ids) <= args.max_prompt_tokens]
    # Neighbours of like length share a batch; the batches themselves come in random order, so any prefix is a sample.
    chats.sort(key=len)
    batches = [chats[i : i + args.batch_size] for i in range(0, len(chats), args.batch_size)]
    order = list(range(len(batches)))
    random.Random(args.seed).shuffle(order)
    start, written = time.time(), 0
    for done, index in enumerate(order):
        path = out / f"rows-{index:05d}.safetensors"
        if path.exists():
            continue
        inputs = tokenizer(batches[index], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=args.max_new_tokens,
                cache_implementation="static",
                disable_compile=True,
            )
        responses = output[:, inputs.input_ids.shape[1] :]
        written += save_shard(path, inputs.input_ids, inputs.attention_mask, responses, tokenizer.eos_token_id)
        print(f"batch {done + 1}/{len(order)}  {written} tokens  {written / (time.time() - start):.0f}/s", flush=True)


if __name__ == "__main__":
    main()
