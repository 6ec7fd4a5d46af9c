"""Prompts of several lengths in one batch: each row accepts what it can, and leaves when it has ended.

python examples/batch.py --target HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_d2sd import D2SDAssistant

PAIR = Path(__file__).resolve().parents[1] / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"
QUESTIONS = ("What is a lighthouse?", "Name three colours.", "Tom has 3 boxes with 12 eggs each. How many eggs?")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--target", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
parser.add_argument("--pair", default=PAIR, help="folder or Hub id of its drafters")
parser.add_argument("--max-new-tokens", type=int, default=64)
args = parser.parse_args()

target = AutoModelForCausalLM.from_pretrained(args.target, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(args.target, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
assistant = D2SDAssistant.from_pretrained(args.pair)
chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
template = dict(add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
target.generate(**tokenizer("warm-up", return_tensors="pt"), max_new_tokens=2)

for rows in range(1, len(chats) + 1):
    inputs = tokenizer.apply_chat_template(chats[:rows], **template)
    texts, seconds = {}, {}
    for name, options in (("plain", {}), ("drafted", dict(assistant_model=assistant))):
        start = time.perf_counter()
        out = target.generate(**inputs, do_sample=False, max_new_tokens=args.max_new_tokens, **options)
        texts[name], seconds[name] = out.tolist(), time.perf_counter() - start
    print(f"{rows} rows: the same texts: {texts['drafted'] == texts['plain']}, ", end="")
    print(f"{assistant.last_stats.mean_acceptance_length:.2f} tokens a pass and row (plain: 1), ", end="")
    print(f"{seconds['drafted']:.1f} s (plain: {seconds['plain']:.1f} s)")
