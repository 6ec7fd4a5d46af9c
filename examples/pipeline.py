"""A text-generation pipeline takes the pair as its `assistant_model`; nothing else of it changes.

python examples/pipeline.py --target HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import time
from pathlib import Path

from transformers import pipeline

from hf_d2sd import D2SDAssistant

PAIR = Path(__file__).resolve().parents[1] / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"
QUESTIONS = ("Why does bread rise?", "Tom has 3 boxes with 12 eggs each and breaks 5 eggs. How many are left?")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--target", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
parser.add_argument("--pair", default=PAIR, help="folder or Hub id of its drafters")
parser.add_argument("--max-new-tokens", type=int, default=64)
args = parser.parse_args()

assistant = D2SDAssistant.from_pretrained(args.pair)
plain = pipeline("text-generation", args.target, dtype="float32")
drafted = pipeline("text-generation", model=plain.model, tokenizer=plain.tokenizer, assistant_model=assistant)
plain("warm-up", max_new_tokens=2)

for question in QUESTIONS:
    chat, replies = [{"role": "user", "content": question}], {}
    for name, pipe in (("plain", plain), ("drafted", drafted)):
        start = time.perf_counter()
        (output,) = pipe(chat, max_new_tokens=args.max_new_tokens, do_sample=False)
        replies[name] = output["generated_text"][-1]["content"], time.perf_counter() - start
    stats, (text, seconds) = assistant.last_stats, replies["drafted"]
    print(f"{question}\n{text}\nThe same text as plain: {text == replies['plain'][0]}.")
    print(f"{stats.new_tokens} tokens in {stats.cycles + 1} target passes and {seconds:.1f} s; ", end="")
    print(f"plain: {stats.new_tokens} passes, {replies['plain'][1]:.1f} s.\n")
