#!/bin/bash
# Every size, block and length of the guide, one after another.
#
# A run that was interrupted goes on from its last checkpoint, and one that is complete ends at once:
# start the script again after a failure. Options at the end go to every run:
#   examples/train_all_models.sh --trainer.accelerator=cpu --trainer.max_steps=10
# MODELS, BLOCKS and SEQ_LENS choose, e.g. MODELS=tiny BLOCKS="dpassm window" SEQ_LENS=512.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

read -ra MODELS <<< "${MODELS:-150m 250m 350m}"
read -ra BLOCKS <<< "${BLOCKS:-dpassm blade baseline_longformer baseline_bigbird vanilla}"
read -ra SEQ_LENS <<< "${SEQ_LENS:-8192 16384 32768}"
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

for model in "${MODELS[@]}"; do
    for block in "${BLOCKS[@]}"; do
        for seq_len in "${SEQ_LENS[@]}"; do
            echo "Training $model $block with seq_len=$seq_len"
            "$PYTHON" examples/train.py fit \
                --model.num_params="$model" \
                --model.block="$block" \
                --data.max_seq_len="$seq_len" \
                --trainer.max_steps=10000 \
                --trainer.devices=1 \
                --trainer.accelerator=gpu \
                --trainer.default_root_dir="logs/$model-$block-$seq_len" \
                --ckpt_path=last \
                "$@"
        done
    done
done
