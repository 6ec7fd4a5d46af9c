#!/usr/bin/env bash
# Train a pair of drafters for SmolLM2-135M-Instruct from nothing:
#
#     examples/train_smollm2.sh FOLDER
#
# FOLDER gets the target, the text, both runs, and the pair. Every stage goes on where it was stopped, so the script can
# be killed and started again; with STOP_AFTER=9 each stage ends after nine minutes, and the script ends with it unless
# the stage is done. On a GPU the text and the steps below take well under an hour in all; on two CPU cores make them
# smaller: SELF_PROMPTS=1500 MAX_PROMPTS=2500 FIRST_STEPS=4000 SECOND_STEPS=4000 ROWS=4 ANCHORS=32 BATCH_SIZE=96.
set -euo pipefail
out=${1:?usage: examples/train_smollm2.sh FOLDER}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
stop=${STOP_AFTER:+--stop_after $STOP_AFTER}
mkdir -p "$out"

if [ ! -d "$out/target" ]; then
    PYTHONPATH=$here "$python" - "$out/target" <<'PYTHON'
import os, sys
from smollm2 import load_smollm2

target, tokenizer = load_smollm2()
partial = sys.argv[1] + ".partial"
target.save_pretrained(partial)
tokenizer.save_pretrained(partial)
os.replace(partial, sys.argv[1])
PYTHON
fi

# Text: 160 tokens an answer, as long as what is measured, and a little more.
text=$("$python" -m hf_d2sd.cli distill --target "$out/target" --out "$out/text" \
    --prompts "$here/prompts/instruct_train_prompts.jsonl" "$here/prompts/gsm8k_train_prompts.jsonl" \
    --max_prompts "${MAX_PROMPTS:-8000}" --self_prompts "${SELF_PROMPTS:-60000}" --openings "$here/openings.txt" \
    --max_new_tokens 160 --max_prompt_tokens 400 --batch_size "${BATCH_SIZE:-512}" $stop)
echo "$text"
[[ $text == *'"missing_shards": 0'* ]] || { echo "shards are missing: run the script again to go on" >&2; exit 1; }

# drafter ROLE STEPS [OPTION...]
drafter() {
    local role=$1 steps=$2
    shift 2
    "$python" -m hf_d2sd.cli train --target "$out/target" --data "$out/text" --out "$out/$role" --role "$role" \
        --block_size 8 --num_layers 2 --target_layer_ids 9 18 27 --qk_norm False --draft_vocab_size 8192 \
        --mask_token '<empty_output>' --rows "${ROWS:-16}" --anchors "${ANCHORS:-64}" --lr "${LR:-1e-3}" \
        --features "${FEATURES:-online}" --max_steps "$steps" --eval_every 1000 --save_every 500 $stop "$@"
    "$python" - "$out/$role/checkpoint.safetensors" "$steps" <<'PYTHON'
import sys
from safetensors import safe_open

with safe_open(sys.argv[1], "pt") as file:
    step = int(file.get_tensor("step"))
if step < int(sys.argv[2]):
    sys.exit(f"step {step} of {sys.argv[2]}: run the script again to go on")
PYTHON
}
drafter first "${FIRST_STEPS:-30000}"
drafter second "${SECOND_STEPS:-30000}" --first "$out/first/best"

for role in first second; do
    base=$([ "$role" = second ] && echo 0.9 || echo 0)
    "$python" -m hf_d2sd.cli calibrate --target "$out/target" --data "$out/text" --drafter "$out/$role/best" \
        --prefix_base "$base" --plot "$out/$role-calibration.png" >"$out/$role-calibration.json"
done
"$python" -m hf_d2sd.cli join --first "$out/first/best" --second "$out/second/best" --num_branches 2 --tree_budget 8 \
    --out "$out/pair"
