"""Prompts about passages, made of what the target wrote before: summaries, questions about documents, rewriting.

    python examples/passages.py --target TARGET --data TEXT --count 1000 --out prompts.jsonl

TEXT is a folder of `hf-d2sd distill`; its longest replies in words, not figures, are the passages, and its short
questions are asked about two of them at once. Drafters learn from such prompts to find in the context what comes next.
"""

import argparse
import json
import random
from pathlib import Path

from transformers import AutoTokenizer

from hf_d2sd.training.shards import read_rows

ONE = (
    "Summarize: {0}",
    "Summarize the following text in a few sentences.\n\n{0}",
    "{0}\n\nGive a short summary of this.",
    "What is the main idea of this passage?\n\n{0}",
    "Read this and list its key points.\n\n{0}",
    "Rewrite this text in simpler words.\n\n{0}",
    "Correct any mistakes in this text and repeat it.\n\n{0}",
    "Passage:\n{0}\n\nQuestion: Who or what is this about, and what happens?",
)
TWO = (
    "{0}\n\n{1}\n\nAnswer this question with the help of the texts above: {2}",
    "Document 1: {0}\n\nDocument 2: {1}\n\nQuestion: {2}\nAnswer:",
    "Here are two texts.\n\n{0}\n\n{1}\n\nSummarize both.",
)


def is_prose(text: str) -> bool:
    """Whether the text is words: no code, and hardly a figure."""
    return "```" not in text and sum(c.isdigit() for c in text) < 0.01 * len(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--shortest", type=int, default=100, help="tokens in a passage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    rows = read_rows(args.data)
    replies = [
        tokenizer.decode(row.tokens[row.prompt_length :], skip_special_tokens=True).strip()
        for row in rows
        if row.response_length >= args.shortest
    ]
    passages = sorted(set(filter(is_prose, replies)))
    folder = args.data / "prompts"
    written = [text for file in sorted(folder.glob("*.json")) for text in json.loads(file.read_text())["prompts"]]
    questions = sorted({text for text in written if text.endswith("?") and len(text) < 120})
    if len(passages) < 2:
        raise SystemExit(f"{args.data} has {len(passages)} passages; two are needed. Write more text.")
    rng = random.Random(args.seed)
    prompts = []
    for index in range(args.count):
        template = rng.choice(ONE if index % 3 or not questions else TWO)
        prompts.append(template.format(*rng.sample(passages, 2), rng.choice(questions or [""])))
    args.out.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    print(f"{len(prompts)} prompts out of {len(passages)} passages and {len(questions)} questions")


if __name__ == "__main__":
    main()
