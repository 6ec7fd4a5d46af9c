"""SmolLM2-135M-Instruct answers a prompt twice on the CPU: with plain generate, and with its pair of drafters.

    python examples/demo.py --prompt "Write a haiku about the sea."

Prints the answer with every token marked by who wrote it, whether both answers are the same text, both speeds, and
what was chosen: without --branches and --budget each cycle does what pays on this machine. The exit status is 1 if the
answers differ in float32.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from smollm2 import load_smollm2

import hf_d2sd
from hf_d2sd.apps.display import BRACKETS, LABELS, STYLES
from hf_d2sd.apps.loading import fastest_dtype
from hf_d2sd.benchmark.machine import processor_name

PAIR = Path(__file__).resolve().parents[1] / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"
PROMPT = "Explain step by step how to make a good cup of tea, and say why each step matters."
RUNS = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--pair", default=str(PAIR), help="folder or Hub id of the drafters")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the one that is fastest here")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--branches", type=int, help="d2sd_num_branches; default: in each cycle what pays")
    parser.add_argument("--budget", type=int, help="d2sd_tree_budget; default: in each cycle what pays")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    return parser.parse_args()


def chat_inputs(tokenizer, prompt: str) -> dict[str, torch.Tensor]:
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return dict(tokenizer(text, return_tensors="pt", add_special_tokens=False))


def answer(target, inputs: dict[str, torch.Tensor], **options) -> tuple[list[int], float]:
    """The new tokens of a greedy answer, and how many came in a second, prefill included."""
    start = time.perf_counter()
    out = target.generate(**inputs, do_sample=False, **options)
    tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, len(tokens) / (time.perf_counter() - start)


def compare(target, inputs: dict[str, torch.Tensor], plain: dict, drafted: dict) -> dict[str, tuple[list[int], float]]:
    """Tokens and median speed of both ways; runs alternate, so that a busy machine slows both alike."""
    ways = {"plain": plain, "drafted": drafted}
    tokens, speeds = {}, {name: [] for name in ways}
    for options in ways.values():
        answer(target, inputs, **{**options, "max_new_tokens": min(16, options["max_new_tokens"])})  # warm-up
    for _ in range(RUNS):
        for name, options in ways.items():
            tokens[name], speed = answer(target, inputs, **options)
            speeds[name].append(speed)
    return {name: (tokens[name], statistics.median(speeds[name])) for name in ways}


def split_text(tokenizer, tokens: list[int]) -> list[str]:
    """The piece of text that each token adds; a character of several tokens goes to the last of them."""
    pieces, shown = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        complete = end == len(tokens) or not text.endswith("\ufffd")
        pieces.append(text[len(shown) :] if complete else "")
        shown = text if complete else shown
    return pieces


def mark(pieces: list[str], sources: list[str], coloured: bool) -> Text:
    """The text, with neighbouring pieces of one source joined."""
    runs: list[list[str]] = []
    for piece, source in zip(pieces, sources):
        if runs and runs[-1][1] == source:
            runs[-1][0] += piece
        else:
            runs.append([piece, source])
    marked = Text()
    for piece, source in runs:
        left, right = ("", "") if coloured else BRACKETS[source]
        marked.append(f"{left}{piece}{right}", STYLES[source])
    return marked


def legend(counts: dict[str, int], coloured: bool) -> Text:
    line = Text()
    for source, label in LABELS.items():
        left, right = ("", "") if coloured else BRACKETS[source]
        line.append(f"{left}{label}{right}", STYLES[source])
        line.append(f": {counts[source]} tokens   ")
    return line


def verdict(same: bool, dtype: str) -> str:
    if same:
        return "the same text: yes"
    if dtype == "float32":
        return "the same text: no. In float32 that is an error; please report it."
    return (
        f"the same text: no. In {dtype} two tokens can be nearly tied, and a pass over many tokens rounds differently "
        "from a pass over one; in float32 the texts agree."
    )


def speed_line(plain: float, drafted: float, stats) -> str:
    line = f"plain generate {plain:.1f} tokens/s, with drafters {drafted:.1f} tokens/s: "
    ratio = drafted / plain
    if ratio >= 1:
        return f"{line}{ratio:.2f} times as fast"
    if stats.decisions is not None:
        return f"{line}{ratio:.2f} times the speed of plain: drafts hardly pay here, and trying them costs a little"
    return (
        f"{line}slower here, {ratio:.2f} times the speed of plain. The {stats.mean_acceptance_length:.2f} tokens that "
        f"a target pass gave did not pay for drafting and for passes over {stats.mean_tree_size:.0f} tokens; "
        "a smaller --budget or fewer --branches may."
    )


def machine_line(dtype: str) -> str:
    return (
        f"hf-d2sd {hf_d2sd.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {processor_name()}, {torch.get_num_threads()} threads, {dtype}"
    )


def main() -> int:
    args = parse_arguments()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.pair == str(PAIR) and not PAIR.is_dir():
        sys.exit(f"There are no drafters in {PAIR}: name a folder or a Hub id with --pair.")
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False, soft_wrap=False)
    console.print("Loading SmolLM2-135M-Instruct (the first time takes about a minute) and its drafters ...")
    chosen = getattr(torch, args.dtype) if args.dtype else fastest_dtype(torch.device("cpu"))
    dtype = str(chosen).removeprefix("torch.")
    target, tokenizer = load_smollm2(chosen)
    assistant = hf_d2sd.D2SDAssistant.from_pretrained(args.pair, dtype=chosen)

    plain = {"max_new_tokens": args.max_new_tokens}
    drafted = {
        **plain,
        "assistant_model": assistant,
        "d2sd_num_branches": args.branches,
        "d2sd_tree_budget": args.budget,
    }
    console.print(f"Answering {RUNS} times each way, after a warm-up ...")
    results = compare(target, chat_inputs(tokenizer, args.prompt), plain, drafted)
    (plain_tokens, plain_speed), (tokens, speed) = results["plain"], results["drafted"]
    stats, same, coloured = assistant.last_stats, plain_tokens == tokens, console.color_system is not None

    console.print(Panel(Text(args.prompt), title="prompt", title_align="left"))
    text = mark(split_text(tokenizer, tokens), stats.token_sources, coloured)
    console.print(Panel(text, title="answer with drafters", title_align="left"))
    if not same:
        other = tokenizer.decode(plain_tokens, skip_special_tokens=True)
        console.print(Panel(Text(other), title="plain answer", title_align="left"))
    console.print(legend(stats.tokens_by_source, coloured))
    console.print(Text(verdict(same, dtype)))
    console.print(Text(speed_line(plain_speed, speed, stats)))
    if stats.decisions is not None:
        console.print(Text(f"{stats.decisions}"))
    else:
        console.print(f"{stats.mean_acceptance_length:.2f} tokens for each target pass, where plain generate has 1")
    console.print(f"median of {RUNS} alternating runs after a warm-up, {len(tokens)} tokens, prefill included")
    console.print(Text(machine_line(dtype)))
    return 0 if same or dtype != "float32" else 1


if __name__ == "__main__":
    sys.exit(main())
