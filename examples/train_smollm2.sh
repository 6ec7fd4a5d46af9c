#!/usr/bin/env bash
# Train a pair of drafters for SmolLM2-135M-Instruct from nothing:
#
#     examples/train_smollm2.sh FOLDER
#
# FOLDER gets the target, the text, the runs, and the pair. Every stage goes on where it was stopped, so the script can be
# killed and started again; with STOP_AFTER=9 each stage ends after nine minutes, and the script ends with it unless the
# stage is done. The figures below are for a GPU, where both drafters and their path heads are trained in one loop.
#
# A GPU that is lent for so long: TEXT_MINUTES=12 TRAIN_MINUTES=8 writes text for twelve minutes, trains for eight whatever
# there is, calibrates and joins. What stands in FOLDER at any moment is of use: shards of text, the pair in training
# (both/last) and its log; but for the target and the checkpoint to go on from no file there is larger than SHARD (12MB).
#
# CPU=1 takes smaller figures, and trains the drafters side by side without path heads: about two hours on two cores with
# AMX, a process on each. With TEXT=examples/smollm2_text it learns from the text that is there, which took half of the time.
# INIT=FOLDER goes on from the drafters of another such FOLDER; with ONLY=second from the second one alone, beside the first
# as it is there. How the pair in hub_cards/ came about is in its card.
set -euo pipefail
out=${1:?usage: examples/train_smollm2.sh FOLDER}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
held_out=${HELD_OUT:-50} # one row in so many
stop=${STOP_AFTER:+--stop_after $STOP_AFTER}
shard=${SHARD:-12MB}
[ "${ONLY:-}" != second ] || : "${INIT:?ONLY=second goes on from the drafters of another FOLDER}"
mkdir -p "$out"

if [ "${CPU:-0}" = 1 ]; then
    : "${MAX_PROMPTS:=3500}" "${SELF_PROMPTS:=2400}" "${PASSAGES:=768}" "${CODE:=1024}" "${BATCH_SIZE:=128}" "${WRITERS:=2}"
    : "${STEPS:=3600}" "${ROWS:=8}" "${ANCHORS:=32}" "${LR:=1e-3}" "${SAVE_EVERY:=100}" "${COMPILE:=True}" "${FEATURES:=cache}" "${LOSS_CHUNK:=128}"
    : "${EVAL_EVERY:=2500}" "${SIDE_BY_SIDE:=1}" "${NEW_TOKENS:=160}" "${SECOND_TURNS:=0}"
    : "${PROMPT_TOKENS:=400}" "${PASSAGE_TOKENS:=1100}"
    # One thread a process, and memory that the allocator keeps: without these a step takes up to twice as long.
    export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
fi

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

# share PERCENT: the option that ends a stage of writing text after so much of TEXT_MINUTES.
share() { [ -z "${TEXT_MINUTES:-}" ] || awk "BEGIN { print \"--stop_after\", $TEXT_MINUTES * $1 / 100 }"; }

# text PERCENT FOLDER OPTION...: the target writes, and asks a second question of its own in each chat. On a CPU 160 tokens an
# answer, as long as what is measured and a little more, and no second question.
text() {
    local stop=${TEXT_MINUTES:+$(share "$1")} folder=$2
    stop=${stop:-${STOP_AFTER:+--stop_after $STOP_AFTER}}
    shift 2
    local report command=("$python" -m hf_d2sd.cli distill --target "$out/target" --out "$folder")
    command+=(--max_new_tokens "${NEW_TOKENS:-512}" --second_turns "${SECOND_TURNS:-1}" "$@" $stop)
    for _ in $(seq 2 "${WRITERS:-1}"); do "${command[@]}" >/dev/null & done
    report=$("${command[@]}")
    wait
    [ "${WRITERS:-1}" = 1 ] || report=$("${command[@]}" --stop_after 0) # what the other writers had in hand counts too
    echo "$report"
    # With ENOUGH=1 the text is what there is: the shards come in random order, so that any part is a fair sample.
    [ "${ENOUGH:-0}" = 1 ] || [ -n "${TEXT_MINUTES:-}" ] || [[ $report == *'"missing_shards": 0'* ]] ||
        { echo "shards are missing: run the script again to go on, or with ENOUGH=1 to do with what is there" >&2; exit 1; }
}

# take FOLDER: its shards, with what is kept beside them. One shard alone, as in examples/smollm2_text, is cut into shards
# of 128 rows, since features are computed, held in memory and kept a shard at a time.
take() {
    local shards=("$1"/rows-*.safetensors)
    if [ "${#shards[@]}" != 1 ]; then
        cp -rn "$1" "$out/"
        return
    fi
    "$python" - "$1" "$out/$(basename "$1")" <<'PYTHON'
import sys
from pathlib import Path
from hf_d2sd.training.shards import batched, read_rows, write_shard

source, out = map(Path, sys.argv[1:])
rows = read_rows(source)
out.mkdir(exist_ok=True)
for index, part in enumerate(batched(rows, 128)):
    path = out / f"rows-{index:05d}.safetensors"
    if not path.exists():
        write_shard(path, part)
PYTHON
}
known="text passages more long code tasks"
[ "${CPU:-0}" = 1 ] || known+=" chat documents second_turns" # whose features take more disk than most have
if [ -n "${TEXT:-}" ]; then # text that was written before
    for part in ${PARTS:-$known}; do
        [ -z "${PARTS:-}" ] && [ ! -d "$TEXT/$part" ] || take "$TEXT/$part" # asked for by name: it must be there
    done
else
    text 60 "$out/text" --prompts "$here/prompts/instruct_train_prompts.jsonl" "$here/prompts/gsm8k_train_prompts.jsonl" \
        --max_prompts "${MAX_PROMPTS:-8000}" --self_prompts "${SELF_PROMPTS:-60000}" --openings "$here/openings.txt" \
        --max_prompt_tokens "${PROMPT_TOKENS:-1100}" --batch_size "${BATCH_SIZE:-512}"
    # Then prompts about passages and functions of what it wrote.
    [ -f "$out/passages.jsonl" ] || "$python" "$here/passages.py" --target "$out/target" --data "$out/text" \
        --count "${PASSAGES:-12000}" --most "${MOST:-7}" --several 0.5 --code "${CODE:-12000}" --out "$out/passages.jsonl"
    text 40 "$out/passages" --prompts "$out/passages.jsonl" --max_prompt_tokens "${PASSAGE_TOKENS:-1800}" --batch_size "$((${BATCH_SIZE:-512} / 2))"
fi

data=()
for part in $known; do [ ! -d "$out/$part" ] || data+=("$out/$part"); done

# drafter ROLE [OPTION...]
drafter() {
    local role=$1 schedule=(--max_steps "${STEPS:-30000}")
    shift
    [ -z "${TRAIN_MINUTES:-}" ] || schedule=(--minutes "$TRAIN_MINUTES")
    "$python" -m hf_d2sd.cli train --target "$out/target" --data "${data[@]}" --out "$out/$role" \
        ${INIT:+--init "$INIT/$role/last"} \
        --role "$role" --block_size 8 --num_layers 2 --target_layer_ids 9 18 27 --qk_norm False \
        --draft_vocab_size "${DRAFT_VOCAB:-12288}" --mask_token '<empty_output>' --rows "${ROWS:-64}" --anchors "${ANCHORS:-96}" \
        --lr "${LR:-1.5e-3}" --tau "${TAU:-2}" --features "${FEATURES:-online}" --compile "${COMPILE:-False}" \
        --loss_chunk "${LOSS_CHUNK:-4096}" --eval_every "${EVAL_EVERY:-1000}" --save_every "${SAVE_EVERY:-100}" \
        --seed "${SEED:-0}" --held_out "$held_out" --max_shard_size "$shard" "${schedule[@]}" $stop "$@"
    "$python" - "$out/$role/checkpoint.safetensors" "${schedule[@]}" <<'PYTHON'
import sys
from safetensors import safe_open

with safe_open(sys.argv[1], "pt") as file:
    step = int(file.get_tensor("step"))
    done = file.get_tensor("spent") / 60 if sys.argv[2] == "--minutes" else step
if done < float(sys.argv[3]):
    sys.exit(f"step {step}, {float(done):g} of {sys.argv[3]} {sys.argv[2][2:]}: run the script again to go on")
PYTHON
}
beside() { drafter second --prefix_base "${PREFIX_BASE:-0.8}" ${INIT:+--first "$INIT/first/last" --on_policy "${ON_POLICY:-0}"}; }
if [ "${ONLY:-}" = second ]; then
    cp -rn "$INIT/first" "$out/"
    beside
elif [ "${SIDE_BY_SIDE:-0}" = 1 ]; then # a core each: on policy can be only the first drafter that is there already
    beside &
    drafter first
    wait $!
else # the target's features, half of what a step costs on a GPU, serve both
    drafter both --prefix_base "${PREFIX_BASE:-0.8}" --on_policy "${ON_POLICY:-0}" --path_rank "${PATH_RANK:-128}"
fi

first=$out/both/last second=$out/both/last
[ -d "$out/both" ] || first=$out/first/last second=$out/second/last
"$python" -m hf_d2sd.cli join --first "$first" --second "$second" --num_branches 4 --tree_width 8 \
    --tree_budget "${TREE_BUDGET:-16}" --max_shard_size "$shard" --out "$out/pair"
"$python" -m hf_d2sd.cli calibrate --target "$out/target" --data "${data[@]}" --drafter "$out/pair" \
    --prefix_base "${PREFIX_BASE:-0.8}" --held_out "${CALIBRATION:-$held_out}" --plot "$out/calibration.png" >"$out/calibration.json"
