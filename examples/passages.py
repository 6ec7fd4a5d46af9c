"""Prompts about passages, made of what the target wrote before: summaries, questions about documents, rewriting.

    python examples/passages.py --target TARGET --data TEXT --count 1000 --most 6 --out prompts.jsonl

TEXT is one folder of `hf-d2sd distill` or several; the longest replies in words, not figures, are the passages, and
the short questions are asked about some of them at once. Drafters learn from such prompts to find in the context what
comes next, and from long ones to do so far away. `--code` prompts more are about the Python functions in the replies.
"""

import argparse
import random
import re
from pathlib import Path

from transformers import AutoTokenizer

from hf_d2sd.checks import refuse_unwritable_file
from hf_d2sd.records import write_lines
from hf_d2sd.training.shards import read_rows, refuse_missing_rows

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
SOME = (
    "{0}\n\nAnswer this question with the help of the texts above: {1}",
    "{0}\n\nQuestion: {1}\nAnswer:",
    "Answer the question from the texts below.\n\nQuestion: {1}\n\n{0}",
    "Here are some texts.\n\n{0}\n\nSummarize all of them.",
    "Summarize: {0}",
    "{0}\n\nSummarize this article.",
)
CODE = (
    "Explain what this code does:\n\n{code}",
    "What does this function return? Give an example.\n\n{code}",
    "Add a docstring and comments to this function:\n\n{code}",
    "Write tests for this function:\n\n{code}",
    "Is there a mistake in this function? Correct it.\n\n{code}",
    "{code}\n\nWrite this function in another way.",
)
HEADS = (
    "Complete the following Python function:\n\n{head}",
    "Implement this function:\n\n{head}",
    "Write the body of this function:\n\n{head}",
    "Finish this function so that it does what its docstring says.\n\n{head}",
    "{head}\n\nWrite a solution and an example of its use.",
)
MARK = "\u241f"  # stands for the user's words in the chat template
FUNCTION = re.compile(r"^def \w+\(.*\).*:$", re.MULTILINE)


def is_prose(text: str) -> bool:
    """Whether the text is words: no code, and hardly a figure."""
    return "```" not in text and sum(c.isdigit() for c in text) < 0.01 * len(text)


def about_code(request: str, reply: str) -> list[str]:
    """Prompts about the first Python function in a reply, and, if its request is short, for the function itself."""
    block = next((part for part in reply.split("```")[1::2] if FUNCTION.search(part)), None)
    if block is None:
        return []
    code = block.removeprefix("python").strip()
    prompts = [template.format(code=f"```python\n{code}\n```") for template in CODE]
    if "```" not in request and len(request) < 300:
        head = f'```python\n{FUNCTION.search(code)[0]}\n    """{request}"""\n```'
        prompts += [template.format(head=head) for template in HEADS]
    return prompts


def read_texts(folders: list[Path], tokenizer) -> list[tuple[str, str, int]]:
    """Request, reply, and the reply's tokens, of every row that is a chat's first turn."""
    chat = [{"role": "user", "content": MARK}]
    before, after = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).split(MARK)
    texts = []
    for row in read_rows(*folders):
        request = tokenizer.decode(row.tokens[: row.prompt_length]).removeprefix(before).removesuffix(after)
        if after in request:
            continue
        reply = tokenizer.decode(row.tokens[row.prompt_length :], skip_special_tokens=True).strip()
        texts.append((request, reply, row.response_length))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=1000, help="prompts about passages")
    parser.add_argument("--most", type=int, default=2, help="passages in a prompt")
    parser.add_argument("--several", type=float, default=0.33, help="share of prompts with more than one passage")
    parser.add_argument("--shortest", type=int, default=100, help="tokens in a passage")
    parser.add_argument("--code", type=int, default=0, help="prompts about functions, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    refuse_unwritable_file("--out", args.out)
    refuse_missing_rows(args.data)
    texts = read_texts(args.data, AutoTokenizer.from_pretrained(args.target))
    passages = sorted({reply for _, reply, length in texts if length >= args.shortest and is_prose(reply)})
    questions = sorted({request for request, _, _ in texts if request.endswith("?") and len(request) < 120})
    if args.count and not 2 <= args.most <= len(passages):
        raise SystemExit(f"--most {args.most}: from 2 to the {len(passages)} passages there are. Write more text.")
    rng = random.Random(args.seed)
    prompts = []
    for _ in range(args.count):
        if rng.random() >= args.several:
            prompts.append(rng.choice(ONE).format(rng.choice(passages)))
            continue
        chosen = rng.sample(passages, rng.randint(2, args.most))
        if rng.random() < 0.5:
            chosen = [f"Document {number}: {text}" for number, text in enumerate(chosen, 1)]
        template = rng.choice([template for template in SOME if questions or "{1}" not in template])
        prompts.append(template.format("\n\n".join(chosen), rng.choice(questions or [""])))
    code = sorted({prompt for request, reply, _ in texts for prompt in about_code(request, reply)})
    prompts += rng.sample(code, min(args.code, len(code)))
    write_lines(args.out, [{"prompt": prompt} for prompt in prompts])
    print(f"{len(prompts)} prompts; {len(passages)} passages, {len(questions)} questions, {len(code)} about code")


if __name__ == "__main__":
    main()
