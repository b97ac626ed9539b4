"""Real text: train at a short length, read a stream that is a hundred times as long."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory.plan import BLOCKS, Drift
from longctx_layers.data.module import LongContextData
from longctx_layers.evals import drift, has_memory, reach, rotations, stream
from longctx_layers.evals.program.streaming import part_of, text_of
from longctx_layers.training.checkpoint_files import newest_checkpoint
from longctx_layers.training.checkpoints import load_trained

ROTATIONS = 4
FORGOTTEN = 64  # the probe clears the state whenever it has read so many tokens
ROWS = 8


def train(run: Drift, root: Path) -> Path:
    """Train a tiny model of bytes, or continue its training; returns its last checkpoint."""
    block, options = BLOCKS[run.name]
    flags = {
        "seed_everything": run.seed,
        "model.num_params": "tiny",
        "model.block": block,
        **{f"model.{name}": value for name, value in options.items()},
        "model.learning_rate": 2e-3,
        "data.dataset_name": "stdlib",
        "data.seq_len": run.length,
        "data.batch_size": ROWS,
        "data.carry_state": True,
        "data.separate_documents": run.anew,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": run.steps,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": False,
        "trainer.log_every_n_steps": max(1, run.steps // 10),
        "trainer.default_root_dir": root,
        "checkpoint.every_n_steps": 50,
        "checkpoint.keep": 1,
        "ckpt_path": "last",
    }
    program = [sys.executable, "-m", "longctx_layers.training.train", "fit"]
    subprocess.run([*program, *(f"--{k}={v}" for k, v in flags.items())], check=True)
    checkpoint = newest_checkpoint(root)
    assert checkpoint is not None
    return checkpoint


def drift_rows(run: Drift, logs: Path) -> dict[str, Any]:
    """Train, read held-out text as a stream, and measure the loss by position."""
    root = logs / f"drift-{run.name}-{run.seed}-{run.key}"
    model = load_trained(train(run, root)).model
    data = LongContextData("stdlib", tokenizer="bytes")
    data.setup("fit")
    text = text_of(data, run.stream, ROTATIONS, seed=0)
    part = part_of(run.stream, ROTATIONS)
    rotated = rotations(text.ids, ROTATIONS, part)
    ids = torch.cat([rotated, rotated[:, :1]], dim=1)
    begin = time.perf_counter()
    read = stream(model, ids, piece=1024)
    seconds = time.perf_counter() - begin
    slope = drift(read.loss, part, skip=run.length)
    zeroed = None
    if has_memory(model):
        zeroed = stream(model, ids, forget_every=FORGOTTEN).loss.mean().item()
    return {
        "anew": run.anew,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": run.steps,
        "trained_tokens": run.steps * ROWS * run.length,
        "training_length": run.length,
        "stream_length": rotated.shape[1],
        "rotations": ROTATIONS,
        "part": part,
        "by_position": [losses.mean().item() for losses in read.loss.split(part, 1)],
        "first": read.loss[:, : run.length].mean().item(),
        "loss": read.loss[:, run.length :].mean().item(),
        "loss_state_zeroed": zeroed,
        "zeroed_every": FORGOTTEN,
        "slope": slope._asdict(),
        "reach": reach(model),
        "state_bytes": model.state_size(rotated.shape[1]),
        "state_bytes_held": read.state_bytes,
        "tokens_per_second": rotated.numel() / seconds,
    }
