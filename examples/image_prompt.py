"""An image in the prompt: the target reads it, and the drafters follow its hidden states, whatever they came from.

python examples/image_prompt.py --target google/gemma-3-4b-it --drafters FIRST SECOND --image photo.png
"""

import argparse
import time

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_d2sd import D2SDAssistant

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--target", default="google/gemma-3-4b-it", help="folder or Hub id of an image-text model")
parser.add_argument("--drafters", nargs="+", required=True, help="folders or Hub ids: the first, or first and second")
parser.add_argument("--image", help="file; default: a red square")
parser.add_argument("--question", default="What is in this picture?")
parser.add_argument("--max-new-tokens", type=int, default=64)
args = parser.parse_args()

image = Image.open(args.image) if args.image else Image.new("RGB", (224, 224), "red")
target = AutoModelForImageTextToText.from_pretrained(args.target, dtype="auto")
processor = AutoProcessor.from_pretrained(args.target)
assistant = D2SDAssistant.from_drafters(*args.drafters, dtype=target.dtype)
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": args.question}]}]
template = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
inputs = processor.apply_chat_template(chat, **template)

for name, options in (("plain", {}), ("drafted", dict(assistant_model=assistant))):
    start = time.perf_counter()
    out = target.generate(**inputs, do_sample=False, max_new_tokens=args.max_new_tokens, **options)
    text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{name}, {time.perf_counter() - start:.1f} s: {text}")
stats, prompt_tokens = assistant.last_stats, inputs["input_ids"].shape[1]
print(f"{prompt_tokens} prompt tokens with the image's; {stats.new_tokens} tokens in {stats.cycles + 1} target passes")
