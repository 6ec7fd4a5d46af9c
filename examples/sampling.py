"""Sampling stays the target's own: a seed gives the text that plain `generate` gives for it, in fewer passes.

python examples/sampling.py --target HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_d2sd import D2SDAssistant

PAIR = Path(__file__).resolve().parents[1] / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--target", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
parser.add_argument("--pair", default=PAIR, help="folder or Hub id of its drafters")
parser.add_argument("--max-new-tokens", type=int, default=64)
args = parser.parse_args()

target = AutoModelForCausalLM.from_pretrained(args.target, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(args.target)
assistant = D2SDAssistant.from_pretrained(args.pair)
chat = [{"role": "user", "content": "Begin a story about a lighthouse."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

for temperature in (0.5, 0.8, 1.1):
    options = dict(do_sample=True, temperature=temperature, top_p=0.95, max_new_tokens=args.max_new_tokens)
    set_seed(7)
    plain = target.generate(**inputs, **options)
    set_seed(7)
    drafted = target.generate(**inputs, **options, assistant_model=assistant)
    stats = assistant.last_stats
    print(f"temperature {temperature}: the same text as plain: {drafted.tolist() == plain.tolist()}, ", end="")
    print(f"{stats.new_tokens} tokens in {stats.cycles + 1} target passes (plain: {stats.new_tokens})")
    print(tokenizer.decode(drafted[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), "\n")
