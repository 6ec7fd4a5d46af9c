"""Text as it comes, in bursts: each pass of the target yields all it accepted, coloured by who drafted it.

python examples/streaming.py --target HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
from pathlib import Path
from threading import Thread

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_d2sd import D2SDAssistant
from hf_d2sd.streaming import SourceStreamer

PAIR = Path(__file__).resolve().parents[1] / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"
COLOURS = {"first": "\033[32m", "second": "\033[35m", "context": "\033[36m", "target": "\033[0m"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--target", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
parser.add_argument("--pair", default=PAIR, help="folder or Hub id of its drafters")
parser.add_argument("--prompt", default="Why does bread rise?")
parser.add_argument("--max-new-tokens", type=int, default=64)
args = parser.parse_args()

target = AutoModelForCausalLM.from_pretrained(args.target, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(args.target)
assistant = D2SDAssistant.from_pretrained(args.pair)
chat = [{"role": "user", "content": args.prompt}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
streamer = SourceStreamer(tokenizer, assistant)
options = dict(do_sample=False, max_new_tokens=args.max_new_tokens, assistant_model=assistant, streamer=streamer)

Thread(target=target.generate, kwargs=dict(**inputs, **options), daemon=True).start()
for text, source in streamer:
    print(f"{COLOURS[source]}{text}", end="", flush=True)
stats = assistant.last_stats
print(
    "\033[0m\n\nfirst drafter green, second purple, the text so far cyan, the target itself plain:",
    stats.tokens_by_source,
)
print(f"{stats.new_tokens} tokens came in {stats.cycles + 1} bursts; plain decoding gives one at a time")
