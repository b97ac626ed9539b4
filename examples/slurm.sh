#!/bin/bash
# Several machines under SLURM: sbatch examples/slurm.sh [options of examples/train.py fit]
#
# One task a GPU, and --ntasks-per-node, --gres and --trainer.devices agree. When the job's time is
# nearly up SLURM sends SIGUSR1; the program then writes a checkpoint after the current step and puts
# the job back into the queue, and --ckpt_path=last resumes from it.
#SBATCH --job-name=longctx
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue
#SBATCH --output=logs/slurm-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

export OMP_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false

srun "${PYTHON:-.venv/bin/python}" examples/train.py fit \
    --trainer.accelerator=gpu \
    --trainer.num_nodes="$SLURM_JOB_NUM_NODES" \
    --trainer.devices="${SLURM_NTASKS_PER_NODE:-8}" \
    --trainer.strategy=fsdp \
    --trainer.precision=bf16-mixed \
    --trainer.default_root_dir="logs/${SLURM_JOB_NAME:-longctx}" \
    --data.num_workers=4 \
    --data.persistent_workers=True \
    --ckpt_path=last \
    "$@"
