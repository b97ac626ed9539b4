"""What rounding the rates of state spaces to bfloat16 costs, compared with all other parameters.

    python -m benchmarks.speed.rates_table    (some minutes; docs/integration.md shows its table)

Byte-level models are trained on Python's standard library and evaluated on the beginnings of long
held-out files: with only the rates rounded, only all other parameters, and both.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.measuring import command
from benchmarks.speed.training import train_on_text
from longctx_layers import create_model
from longctx_layers.command_line import Parser
from longctx_layers.data.byte_text import documents, split
from longctx_layers.evals import token_losses
from longctx_layers.info import machine
from longctx_layers.testing import rates

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpassm": ("dpassm", {"window_size": 16, "ssm_state_dim": 16}),
    'dpassm, `ssm="diagonal"`': (
        "dpassm",
        {"window_size": 16, "ssm_state_dim": 64, "ssm": "diagonal"},
    ),
    "blade": ("blade", {"chunk_size": 32, "state_dim": 16}),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="training steps")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument("--bytes", type=int, default=16384, help="bytes of each held-out file")
    parser.add_argument("--files", type=int, default=10)
    parser.add_argument(
        "--text", type=Path, help="a file or folder of text; default: Python's standard library"
    )
    return parser.parse_args(argv)


@torch.no_grad()
def loss(model: nn.Module, rows: list[Tensor]) -> float:
    """The mean loss over all bytes."""
    return sum(token_losses(model, row[None]).mean().item() for row in rows) / len(rows)


def version(model: nn.Module, *, low_rates: bool, low_rest: bool) -> nn.Module:
    """A copy of a model with some of its parameters rounded to bfloat16."""
    changed = deepcopy(model)
    if low_rest:
        changed.bfloat16()
    if low_rates:
        for parameter in rates(changed).values():
            parameter.data = parameter.data.bfloat16().float()
    return changed


def table(args: argparse.Namespace) -> list[str]:
    """The lines of the table."""
    training, held_out = split(documents(args.text, 4 * args.sequence_length), seed=0)
    rows = [
        torch.frombuffer(bytearray(d[: args.bytes + 1]), dtype=torch.uint8).long()
        for d in held_out
        if len(d) > args.bytes
    ][: args.files]
    lines = [
        f"| model | only the rates in bfloat16 | all else in bfloat16 | both ({len(rows)} files) |",
        "|---|---|---|---|",
    ]
    for name, (block, options) in MODELS.items():
        torch.manual_seed(0)
        model = create_model(256, "tiny", block, block_kwargs=options)
        train_on_text(
            block,
            model,
            training,
            steps=args.steps,
            batch_size=args.batch_size,
            sequence_length=args.sequence_length,
        )
        model.eval()
        exact = loss(model, rows)
        costs = [
            loss(version(model, low_rates=a, low_rest=b), rows) - exact
            for a, b in ((True, False), (False, True), (True, True))
        ]
        lines.append(f"| {name} | " + " | ".join(f"{cost:+.6f}" for cost in costs) + " |")
    return lines


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    print("\n".join([*table(args), "", f"`{command()}`: {machine()}."]))


if __name__ == "__main__":
    main()
