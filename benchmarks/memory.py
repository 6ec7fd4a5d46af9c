"""Peak memory of greedy D²SD decoding over plain `generate`, SmolLM2-135M-Instruct, float32, each in its own process.

    python benchmarks/memory.py --out benchmarks/results/memory-smollm2.json

The peak is the process's greatest resident set, as the kernel counts it. The bound: the drafters' weights, a tenth of
the key-value cache, and 200 MB. The exit status is 1 beyond it.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from transformers import Cache

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from smollm2 import load_smollm2  # noqa: E402

PAIR = HERE.parent / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"
QUESTION = "Write a long story about a lighthouse keeper and the sea."


def run(kind: str, pair: str, prompt_tokens: int, new_tokens: int) -> dict:
    """One process: load the target, decode, and say how much memory that took."""
    torch.set_num_threads(1)
    target, tokenizer = load_smollm2(torch.float32)
    assistant = None
    if kind == "d2sd":
        import hf_d2sd

        assistant = hf_d2sd.D2SDAssistant.from_pretrained(pair)
    words = tokenizer(QUESTION, return_tensors="pt").input_ids
    inputs = words.repeat(1, -(-prompt_tokens // words.shape[1]))[:, :prompt_tokens]
    options = dict(do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    out = target.generate(inputs, assistant_model=assistant, return_dict_in_generate=True, **options)
    layers = next(value for value in out.values() if isinstance(value, Cache)).layers
    drafters = sum(p.numel() * p.element_size() for p in assistant.parameters()) if assistant else 0
    return {
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "cache_mb": sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in layers) / 2**20,
        "drafters_mb": drafters / 2**20,
    }


def in_a_process(kind: str, args) -> dict:
    command = [sys.executable, __file__, "--pair", args.pair, "--kind", kind]
    command += ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default=str(PAIR))
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", choices=("plain", "d2sd"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(run(args.kind, args.pair, args.prompt_tokens, args.new_tokens)))
        return 0
    from hf_d2sd.checks import refuse_unwritable_file  # in this process alone: the others are measured

    refuse_unwritable_file("--out", args.out)
    plain, ours = in_a_process("plain", args), in_a_process("d2sd", args)
    over = ours["peak_mb"] - plain["peak_mb"]
    bound = ours["drafters_mb"] + 0.1 * ours["cache_mb"] + 200
    result = {
        "what": "peak resident memory in MiB, SmolLM2-135M-Instruct, float32, CPU",
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "plain_peak": round(plain["peak_mb"]),
        "d2sd_peak": round(ours["peak_mb"]),
        "over_plain": round(over),
        "bound": round(bound),
        "drafters": round(ours["drafters_mb"]),
        "cache": round(ours["cache_mb"]),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if over <= bound else 1


if __name__ == "__main__":
    sys.exit(main())
