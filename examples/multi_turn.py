"""A chat that goes on from the cache of the turn before: neither target nor drafters read the old turns again.

python examples/multi_turn.py --target HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_d2sd import D2SDAssistant
from hf_d2sd.modeling import CACHE_NAME

PAIR = Path(__file__).resolve().parents[1] / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--target", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
parser.add_argument("--pair", default=PAIR, help="folder or Hub id of its drafters")
parser.add_argument("--max-new-tokens", type=int, default=32)
args = parser.parse_args()

target = AutoModelForCausalLM.from_pretrained(args.target, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(args.target)
assistant = D2SDAssistant.from_pretrained(args.pair)
options = dict(do_sample=False, max_new_tokens=args.max_new_tokens, assistant_model=assistant)
messages, sequence, reply, cache = [], torch.empty(1, 0, dtype=torch.long), "", DynamicCache(config=target.config)

for question in ("What is a lighthouse for?", "Who works there?", "Write a line about one of them."):
    messages.append({"role": "user", "content": question})
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    new = chat.split(reply)[-1].removeprefix(tokenizer.eos_token) if reply else chat
    tokens = tokenizer(new, add_special_tokens=False, return_tensors="pt").input_ids
    prompt = torch.cat([sequence, tokens], dim=1)
    sequence = target.generate(prompt, **{CACHE_NAME: cache}, **options)
    reply, warm = tokenizer.decode(sequence[0, prompt.shape[1] :], skip_special_tokens=True), assistant.last_stats
    messages.append({"role": "assistant", "content": reply})
    same = target.generate(prompt, **options).tolist() == sequence.tolist()
    print(f"> {question}\n{reply}\nread {warm.prompt_tokens} of {prompt.shape[1]} prompt tokens; ", end="")
    print(f"{warm.mean_acceptance_length:.2f} tokens a pass; the text is that without the cache: {same}\n")
