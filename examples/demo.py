"""Train a small DPASSM on real text, and its window alone, to see what the state is worth.

    make demo        (or: python examples/demo.py --help)

Two byte-level models of equal size see the same tokens of Python's standard library in the same
order: one with a window and a state space, one with the window alone. Both are then measured on
files they never saw, at four times the training length. Writes a page with pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx_layers import LongContextLM, create_model, parameter_groups
from longctx_layers.command_line import Parser, add_output
from longctx_layers.data.byte_text import documents, split, stretch, windows
from longctx_layers.evals import buckets, paired_interval, reach, stream
from longctx_layers.files import write_all
from longctx_layers.info import machine
from longctx_layers.reports import figures
from longctx_layers.reports.markdown import table
from longctx_layers.training.loop import ProgressBar, fit

MODELS: dict[str, dict[str, Any]] = {"dpassm": {"ssm_state_dim": 16}, "window": {}}
COLOURS = {"dpassm": figures.BLUE, "window": figures.VERMILION}
LABELS = {"dpassm": "DPASSM (window and state)", "window": "window alone"}
SMOOTHED = 10  # steps of the training loss that are averaged


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--sequence_length", type=int, default=512, help="in training")
    parser.add_argument("--window_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--validation_documents", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="a file or folder of text, instead of the stdlib")
    add_output(parser, "--output_dir", "demo")
    args = parser.parse_args(argv)
    least = {
        "steps": 1,
        "batch_size": 1,
        "sequence_length": 1,
        "window_size": 1,
        "validation_documents": 2,
    }
    for name, number in least.items():
        if getattr(args, name) < number:
            parser.error(f"--{name}: expected at least {number}, got {getattr(args, name)}")
    if args.learning_rate <= 0:
        parser.error(f"--learning_rate: expected a number above 0, got {args.learning_rate}")
    return args


def train(
    name: str, model: LongContextLM, text: list[bytes], args: argparse.Namespace
) -> dict[str, Any]:
    """Train in place on random windows of the text; returns losses and speed."""
    draw = random.Random(args.seed)  # the same batches for every model
    warmup = max(1, args.steps // 10)

    def loss_of_step(step: int) -> Tensor:
        batch = windows(text, args.batch_size, args.sequence_length, draw)
        return model.loss(batch[:, :-1], batch[:, 1:])

    def schedule(step: int) -> float:
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / args.steps))
        return min(1.0, (step + 1) / warmup) * cosine

    bar = ProgressBar(name, args.steps, tokens=args.batch_size * args.sequence_length)
    begin = time.perf_counter()
    losses = fit(
        parameter_groups(model, weight_decay=0.05),
        loss_of_step,
        args.steps,
        learning_rate=args.learning_rate,
        schedule=schedule,
        clipped=model.parameters(),
        progress=bar,
    )
    return {
        "train_loss": [
            (step, sum(losses[max(0, step - SMOOTHED) : step]) / min(SMOOTHED, step))
            for step in range(1, args.steps + 1, max(1, args.steps // 40))
        ],
        "tokens_per_second": bar.tokens_per_second,
        "train_seconds": time.perf_counter() - begin,
    }


def draw_loss_curves(models: dict[str, Any]) -> bytes:
    """Training loss by step, smoothed, as a PNG."""
    title = "Same tokens, same number of parameters"
    figure, axes = figures.new_figure(title, "training step", "training loss (nats per byte)")
    for name, result in models.items():
        steps, losses = zip(*result["train_loss"], strict=True)
        figures.draw_lines(axes, [figures.Line(steps, losses, LABELS[name], COLOURS[name])])
    return figures.png(figure, axes, columns=2)


def draw_by_position(metrics: dict[str, Any]) -> bytes:
    """Validation loss by position, as a PNG."""
    lines = [
        figures.position_line(result["by_position"], LABELS[name], COLOURS[name], "o")
        for name, result in metrics["models"].items()
    ]
    label = f"DPASSM, state zeroed every {metrics['reach']} bytes"
    zeroed = metrics["zeroed"]["by_position"]
    lines.append(figures.position_line(zeroed, label, COLOURS["dpassm"], "o", ":"))
    marked = {
        "reach of the\nstacked windows": metrics["reach"],
        "training\nlength": metrics["settings"]["sequence_length"],
    }
    title = "Loss by position, in files that neither model saw"
    return figures.draw_positions(title, "byte", lines, marked, columns=2)


def page(metrics: dict[str, Any]) -> str:
    """The Markdown page."""
    models, settings = metrics["models"], metrics["settings"]
    gain, cost = metrics["window_minus_dpassm"], metrics["zeroed"]["minus_dpassm"]
    n_bytes = settings["steps"] * settings["batch_size"] * settings["sequence_length"]
    header = [
        "model", "parameters", "validation loss (nats/byte)", "bits/byte", "perplexity/byte",
        "training tokens/s", "training s", "state bytes at 1,000,000 tokens",
    ]  # fmt: skip
    rows = [
        [
            LABELS[name], f"{r['parameters']:,}", f"{r['loss']:.4f}", f"{r['bits_per_byte']:.3f}",
            f"{r['perplexity']:.3f}", f"{r['tokens_per_second']:,.0f}",
            f"{r['train_seconds']:.0f}", f"{r['state_bytes']:,}",
        ]
        for name, r in models.items()
    ]  # fmt: skip
    both = zip(models["dpassm"]["by_position"], models["window"]["by_position"], strict=True)
    positions = [
        [f"{first} to {last}", f"{state:.3f}", f"{window:.3f}", f"{window - state:.3f}"]
        for (first, last, state), (_, _, window) in both
    ]
    sample = f"{metrics['prompt']} ⟦continuation⟧ {metrics['continuation']}".replace("```", "'''")
    parts = [
        "# A small DPASSM, and its window alone",
        f"`{metrics['command']}` on {metrics['machine']}. Both models saw the same {n_bytes:,} "
        f"bytes in sequences of {settings['sequence_length']}, with windows of "
        f"{settings['window_size']}; validation is on {metrics['validation_length']:,} bytes of "
        f"each of {metrics['validation_documents']} files that neither saw.",
        table(header, rows),
        f"Window minus DPASSM, paired: **{gain['mean']:.4f} nats per byte**, 95 % interval "
        f"{gain['low']:.4f} to {gain['high']:.4f}. With its state zeroed every {metrics['reach']} "
        "bytes, which is as far as the stacked windows see, DPASSM loses "
        f"{cost['mean']:.4f} nats ({cost['low']:.4f} to {cost['high']:.4f}): memory of what lies "
        "further back is worth at most that much. One pass and pieces of "
        f"{settings['sequence_length']} bytes differ by at most "
        f"{metrics['largest_difference_in_pieces']:.1e} nats in any token.",
        "![training loss](loss_curves.png)",
        "![loss by position](loss_by_position.png)",
        table(["position", "DPASSM", "window alone", "gain"], positions),
        "Two hundred bytes that DPASSM generated after a prompt from a held-out file:",
        f"```python\n{sample}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if argv is None else argv
    args = parse(arguments)
    length = 4 * args.sequence_length  # of validation
    training, held_out = split(documents(args.text, length + 2), args.seed)
    # One stretch of each document: the intervals treat them as independent.
    draw = random.Random(args.seed + 1)
    checks = torch.stack([stretch(d, length, draw) for d in held_out[: args.validation_documents]])
    size = sum(map(len, training)) / 1e6
    print(f"{len(training)} documents to train on, {size:.1f} MB; {len(held_out)} held out")

    models: dict[str, LongContextLM] = {}
    losses: dict[str, Tensor] = {}
    results: dict[str, Any] = {}
    for name, options in MODELS.items():
        torch.manual_seed(args.seed)
        model = create_model(256, "tiny", name, {"window_size": args.window_size, **options})
        count = sum(p.numel() for p in model.parameters())
        print(f"{name}: {count:,} parameters, feed-forward width {model.config.ffn_dim}")
        result = train(name, model, training, args)
        models[name] = model.eval()
        losses[name] = stream(model, checks, piece=args.sequence_length).loss
        mean = losses[name].mean().item()
        results[name] = {
            **result,
            "parameters": count,
            "loss": mean,
            "perplexity": math.exp(mean),
            "bits_per_byte": mean / math.log(2),
            "by_position": buckets(losses[name].mean(0).tolist()),
            "state_bytes": model.state_size(1_000_000),
        }
    model, own = models["dpassm"], losses["dpassm"]
    whole = stream(model, checks[:2], piece=length).loss
    every = max(1, reach(model) or 0)
    forgetful = stream(model, checks, piece=every, forget_every=every).loss
    prompt = checks[0, :200]
    text = model.generate(
        prompt, max_new_tokens=200, temperature=0.8, top_p=0.95,
        generator=torch.Generator().manual_seed(args.seed),
    )  # fmt: skip
    metrics = {
        "command": " ".join(["python examples/demo.py", *arguments]),
        "machine": machine(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "validation_length": length,
        "validation_documents": len(checks),
        "reach": every,
        "models": results,
        "window_minus_dpassm": paired_interval(losses["window"].mean(1), own.mean(1))._asdict(),
        "zeroed": {
            "by_position": buckets(forgetful.mean(0).tolist()),
            "minus_dpassm": paired_interval(forgetful.mean(1), own.mean(1))._asdict(),
        },
        "largest_difference_in_pieces": (whole - own[:2]).abs().max().item(),
        "prompt": bytes(prompt.tolist()).decode(errors="replace"),
        "continuation": bytes(text[len(prompt) :].tolist()).decode(errors="replace"),
    }
    files: dict[str, str | bytes] = {
        "report.md": page(metrics),
        "metrics.json": json.dumps(metrics, indent=1) + "\n",
        "loss_curves.png": draw_loss_curves(results),
        "loss_by_position.png": draw_by_position(metrics),
    }
    write_all(args.output_dir, files)
    print(f"\n{files['report.md']!s}\nWritten to {args.output_dir}/")
    return metrics


if __name__ == "__main__":
    main()
