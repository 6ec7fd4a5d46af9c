"""A target with int8 weights, and the pair it had before: drafters call its embedding and head, whatever they are.

pip install torchao
python examples/quantized.py --target HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
from pathlib import Path

from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from hf_d2sd import D2SDAssistant

PAIR = Path(__file__).resolve().parents[1] / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--target", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
parser.add_argument("--pair", default=PAIR, help="folder or Hub id of its drafters")
parser.add_argument("--max-new-tokens", type=int, default=48)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.target)
assistant = D2SDAssistant.from_pretrained(args.pair)
chat = [{"role": "user", "content": "Tom has 3 boxes with 12 eggs each and breaks 5 eggs. How many are left?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
int8 = dict(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu")

for name, how in (("float32", {}), ("int8", int8)):
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype="float32", **how)
    options = dict(do_sample=False, max_new_tokens=args.max_new_tokens)
    plain = target.generate(**inputs, **options)
    drafted = target.generate(**inputs, **options, assistant_model=assistant)
    stats = assistant.last_stats
    print(
        f"{name}: {stats.new_tokens} tokens in {stats.cycles + 1} target passes (plain: {stats.new_tokens}); ", end=""
    )
    print(f"the same text as this target's plain one: {drafted.tolist() == plain.tolist()}")
    print(tokenizer.decode(drafted[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), "\n")
