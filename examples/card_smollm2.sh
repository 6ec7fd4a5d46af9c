#!/usr/bin/env bash
# The card of the shipped pair, from its files, the result file and what is written by hand.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=hub_cards/SmolLM2-135M-Instruct-D2SD
exec "${HF_D2SD:-hf-d2sd}" card --model $folder --out "${1:-$folder/README.md}" \
    --base_model HuggingFaceTB/SmolLM2-135M-Instruct --datasets openai/gsm8k yizhongw/self_instruct \
    --results benchmarks/results/acceptance-smollm2.json --details $folder.details.md
