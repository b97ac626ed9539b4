"""What is to be measured, once it is known to fit, and how a row of it looks."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from longctx_layers.evals import Task
from longctx_layers.evals.program.models import Loaded
from longctx_layers.evals.program.rows import Rows


@dataclass
class Plan:
    """What is to be done: all of it is known to fit.

    Attributes:
        task: None for streaming perplexity.
        key: of all settings that a row depends on.
        rows, further: the files of rows by length, and by depth or place.
    """

    args: argparse.Namespace
    loaded: Loaded
    task: Task | None
    key: str
    rows: Rows
    further: Rows
    text: Any = None


def bar(plan: Plan, total: int, what: str) -> Any:
    """A progress bar in tokens; none into a file."""
    args = plan.args
    label = f"{args.task} {args.block} {what}"
    return tqdm(total=total, desc=label, unit="tokens", unit_scale=True, disable=None, leave=False)


def is_trained(args: argparse.Namespace) -> bool:
    """Whether the model has learnt anything: it was loaded, or is trained here."""
    return args.checkpoint is not None or args.train_steps > 0


def row_of(plan: Plan, length: int, score: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A row by length, from what was measured of it."""
    args, model = plan.args, plan.loaded.model
    named = ("accuracy", "n", "chance", "low", "high", "accuracy_state_zeroed", "reach")
    return {
        "task": args.task,
        "block": args.block,
        "length": length,
        **{name: score.pop(name) for name in named},
        "seconds": round(seconds, 3),
        **score,
        "trained": is_trained(args),
        "train_steps": args.train_steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": model.state_size(length),
        "seed": args.seed,
        "model": plan.loaded.fingerprint,
        "key": plan.key,
    }
