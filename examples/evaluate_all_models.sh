#!/bin/bash
# Passkey retrieval with every checkpoint that train_all_models.sh wrote. Options at the end go to
# every evaluation: examples/evaluate_all_models.sh --device cpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shopt -s nullglob

CHECKPOINTS=(logs/*/checkpoints/*.ckpt)
if [ ${#CHECKPOINTS[@]} -eq 0 ]; then
    echo "error: no logs/*/checkpoints/*.ckpt: run examples/train_all_models.sh first" >&2
    exit 1
fi
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

for checkpoint in "${CHECKPOINTS[@]}"; do
    echo "Evaluating $checkpoint"
    "$PYTHON" examples/evaluate.py \
        --task passkey \
        --seq_len 32768 \
        --max_len 32768 \
        --checkpoint_path="$checkpoint" \
        --device cuda \
        "$@"
done
