"""How much of a text's replies a draft vocabulary covers that was chosen on another text.

    python benchmarks/vocabulary.py --choose TEXT [TEXT ...] --count TEXT [TEXT ...]

Each TEXT is a folder of `hf-d2sd distill`. A token outside the draft vocabulary cannot be drafted: it ends the chain.
"""

import argparse
from pathlib import Path

import torch

from hf_d2sd import D2SDDrafterConfig
from hf_d2sd.training.drafters import frequent_tokens
from hf_d2sd.training.shards import read_rows


def coverage(chosen: list, counted: list, sizes: list[int], vocab_size: int) -> dict[int, float]:
    """By size: the share of the counted rows' reply tokens that are among the most frequent of the chosen rows."""
    replies = torch.cat([row.tokens[row.prompt_length :] for row in counted])
    shares = {}
    for size in sizes:
        config = D2SDDrafterConfig(vocab_size=vocab_size, draft_vocab_size=size)
        shares[size] = torch.isin(replies, frequent_tokens(chosen, config)).float().mean().item()
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=Path, nargs="+", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 12288, 16384, 24576])
    parser.add_argument("--vocab-size", type=int, default=49152, help="the target's; default: SmolLM2's")
    args = parser.parse_args()
    for size, share in coverage(read_rows(*args.choose), read_rows(*args.count), args.sizes, args.vocab_size).items():
        print(f"{size:6,d} {share:.4f}")


if __name__ == "__main__":
    main()
