"""Train a small DPASSM on real text, beside its window alone, and show what its memory is worth.

    make demo        (or: python examples/demo.py --help)

Two byte-level models of equal size see the same tokens of Python's standard library in the same
order: one with a window and a state space, one with the window alone. Both are then measured on
files they never saw, at four times the training length. Writes a page with pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longctx_layers import LongContextLM, create_model, parameter_groups
from longctx_layers.data.byte_text import documents, split, stretch, windows
from longctx_layers.evals import buckets
from longctx_layers.files import write
from longctx_layers.reports.figures import lengths_along, mark_place, new_figure, png, style_of
from longctx_layers.reports.files import add_output

MODELS = {
    "dpassm": {"ssm_state_dim": 16},
    "window": {},
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512, help="in training")
    parser.add_argument("--window-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--validation-documents", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="a file or folder of text, instead of the stdlib")
    add_output(parser, "--output-dir", "demo")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "sequence_length", "window_size"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag}: expected at least 1, got {getattr(args, name)}")
    if args.validation_documents < 2:
        parser.error(
            f"--validation-documents: expected at least 2, got {args.validation_documents}"
        )
    if args.learning_rate <= 0:
        parser.error(f"--learning-rate: expected a number above 0, got {args.learning_rate}")
    return args


def train(
    name: str, model: LongContextLM, found: list[bytes], args: argparse.Namespace
) -> dict[str, Any]:
    """Train in place: AdamW, warm-up and cosine, clipping. Returns losses and speed."""
    groups = parameter_groups(model, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    warm_up = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warm_up)
            * (0.1 + 0.45 * (1 + math.cos(math.pi * step / args.steps)))
        ),
    )
    draw = random.Random(args.seed)  # the same batches for every model
    losses: list[float] = []
    begin = time.perf_counter()
    bar = tqdm(range(args.steps), desc=name, unit="step", disable=None)
    for step in bar:
        batch = windows(found, args.batch_size, args.sequence_length, draw)
        loss = model.loss(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        speed = (step + 1) * args.batch_size * args.sequence_length / (time.perf_counter() - begin)
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:,.0f} tokens/s")
        if bar.disable and (step + 1) % max(1, args.steps // 10) == 0:
            print(
                f"{name} step {step + 1}: loss {losses[-1]:.3f}, {speed:,.0f} tokens/s", flush=True
            )
    return {
        "train_loss": losses,
        "tokens_per_second": speed,
        "train_seconds": time.perf_counter() - begin,
    }


@torch.no_grad()
def token_losses(model: LongContextLM, ids: Tensor, piece: int, *, forget: bool = False) -> Tensor:
    """Loss of each token `[n, T]` in nats, in pieces with the state carried from one to the next.

    `forget` zeroes the state space before each piece; keys, values and convolution stay.
    """
    model.eval()
    state, losses = None, []
    for x, y in zip(ids[:, :-1].split(piece, 1), ids[:, 1:].split(piece, 1), strict=True):
        if forget and state is not None:
            state = tuple(layer._replace(h=torch.zeros_like(layer.h)) for layer in state)
        logits, state = model(x, state, return_state=True)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
        losses.append(loss)
    return torch.cat(losses, 1)


def paired(first: Tensor, second: Tensor) -> dict[str, float]:
    """Mean difference of two rows of losses `[n]`, with its 95 % interval (normal, paired)."""
    difference = (first - second).double()
    half = 1.96 * difference.std().item() / math.sqrt(len(difference))
    mean = difference.mean().item()
    return {"mean": mean, "low": mean - half, "high": mean + half}


# ---- The page

COLOURS = {name: style_of(name)[0] for name in ("dpassm", "window")}
LABELS = {"dpassm": "DPASSM (window and state)", "window": "window alone"}


def draw_loss_curves(metrics: dict[str, Any]) -> bytes:
    """Training loss by step, smoothed over ten steps, as a PNG."""
    figure, axes = new_figure(
        "Same tokens, same number of parameters", "training step", "training loss (nats per byte)"
    )
    for name, result in metrics["models"].items():
        losses = result["train_loss"]
        smooth = [sum(losses[max(0, i - 9) : i + 1]) / min(10, i + 1) for i in range(len(losses))]
        axes.plot(range(1, len(losses) + 1), smooth, color=COLOURS[name], label=LABELS[name])
    return png(figure, axes, columns=2)


def draw_positions(metrics: dict[str, Any]) -> bytes:
    """Validation loss by position, as a PNG."""
    figure, axes = new_figure(
        "Loss by position, in files that neither model saw",
        "position in the sequence (bytes)",
        "validation loss (nats per byte)",
    )
    zeroed = metrics["zeroed"]
    lines = [
        (name, result["by_position"], "o-", LABELS[name])
        for name, result in metrics["models"].items()
    ]
    label = f"DPASSM, state zeroed every {metrics['reach']} bytes"
    lines.append(("dpassm", zeroed["by_position"], "o:", label))
    for name, losses, style, label in lines:
        rows = buckets(losses)
        places = [(first * last) ** 0.5 for first, last, _ in rows]
        means = [mean for _, _, mean in rows]
        axes.plot(places, means, style, color=COLOURS[name], label=label)
    lengths_along(axes)
    mark_place(axes, metrics["reach"], "reach of the\nstacked windows")
    mark_place(axes, metrics["settings"]["sequence_length"], "training\nlength")
    return png(figure, axes, columns=2)


def page(metrics: dict[str, Any]) -> str:
    """The Markdown page."""
    gain, settings = metrics["window_minus_dpassm"], metrics["settings"]
    zeroed = metrics["zeroed"]
    cost = zeroed["minus_dpassm"]
    seen = settings["steps"] * settings["batch_size"] * settings["sequence_length"]
    rows = [
        f"| {LABELS[name]} | {r['parameters']:,} | {r['loss']:.4f} | {r['bits_per_byte']:.3f} | "
        f"{r['perplexity']:.3f} | {r['tokens_per_second']:,.0f} | {r['train_seconds']:.0f} | "
        f"{r['state_bytes'][1000000]:,} |"
        for name, r in metrics["models"].items()
    ]
    both = zip(
        buckets(metrics["models"]["dpassm"]["by_position"]),
        buckets(metrics["models"]["window"]["by_position"]),
        strict=True,
    )
    positions = [
        f"| {first} to {last} | {with_state:.3f} | {alone:.3f} | {alone - with_state:.3f} |"
        for (first, last, with_state), (_, _, alone) in both
    ]
    return "\n".join(
        [
            "# A small DPASSM beside its window alone",
            "",
            f"`{metrics['command'].strip()}` on {metrics['machine']}. Both models saw the same "
            f"{seen:,} bytes in "
            f"sequences of {settings['sequence_length']}, with windows of "
            f"{settings['window_size']}; validation is on {metrics['validation_length']:,} bytes "
            f"of each of {metrics['validation_documents']} files that neither saw.",
            "",
            "| model | parameters | validation loss (nats/byte) | bits/byte | perplexity/byte | "
            "training tokens/s | training s | state bytes at 1,000,000 tokens |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Window minus DPASSM, paired: **{gain['mean']:.4f} nats per byte**, 95 % interval "
            f"{gain['low']:.4f} to {gain['high']:.4f}. With its state zeroed every "
            f"{metrics['reach']} bytes, as far as the stacked windows reach, DPASSM loses "
            f"{cost['mean']:.4f} nats ({cost['low']:.4f} to {cost['high']:.4f}): so much at most "
            "is memory of what lies further back. "
            f"One pass and pieces of {settings['sequence_length']} bytes differ by at most "
            f"{metrics['largest_difference_in_pieces']:.1e} nats in any token.",
            "",
            "![training loss](loss_curves.png)",
            "",
            "![loss by position](loss_by_position.png)",
            "",
            "| position | DPASSM | window alone | gain |",
            "|---|---|---|---|",
            *positions,
            "",
            "Two hundred bytes that DPASSM wrote after a prompt out of a held-out file:",
            "",
            "```python",
            (metrics["prompt"] + " ⟦model writes⟧ " + metrics["continuation"]).replace(
                "```", "'''"
            ),
            "```",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    length = 4 * args.sequence_length  # of validation
    training, validation = split(documents(args.text, length + 2), args.seed)
    # One stretch of each document: the interval below takes them for independent.
    draw = random.Random(args.seed + 1)
    checks = torch.stack(
        [stretch(document, length, draw) for document in validation[: args.validation_documents]]
    )
    size = sum(map(len, training)) / 1e6
    print(f"{len(training)} documents to train on, {size:.1f} MB; {len(validation)} held out")

    models, results = {}, {}
    for name, options in MODELS.items():
        torch.manual_seed(args.seed)
        model = create_model(
            vocab_size=256, num_params="tiny", block_type=name,
            block_kwargs={"window_size": args.window_size, **options},
        )  # fmt: skip
        count = sum(p.numel() for p in model.parameters())
        print(f"{name}: {count:,} parameters, feed-forward width {model.config.ffn_dim}")
        result = train(name, model, training, args)
        losses = token_losses(model, checks, args.sequence_length)
        mean = losses.mean().item()
        results[name] = {
            **result, "parameters": count, "loss": mean, "perplexity": math.exp(mean),
            "bits_per_byte": mean / math.log(2), "by_position": losses.mean(0).tolist(),
            "state_bytes": {n: model.state_size(n) for n in (1_000, 1_000_000)},
        }  # fmt: skip
        models[name] = (model, losses)
    model, losses = models["dpassm"]
    gain = paired(models["window"][1].mean(1), losses.mean(1))
    whole = token_losses(model, checks[:2], length)
    reach = max(1, len(model.blocks) * (args.window_size - 1))
    forgetful = token_losses(model, checks, reach, forget=True)
    streamed = (whole - losses[:2]).abs().max().item()
    prompt = checks[0, :200]
    text = model.generate(
        prompt, max_new_tokens=200, temperature=0.8, top_p=0.95,
        generator=torch.Generator().manual_seed(args.seed),
    )  # fmt: skip
    metrics = {
        "command": "python examples/demo.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "validation_length": length,
        "validation_documents": len(checks),
        "reach": reach,
        "models": results,
        "window_minus_dpassm": gain,
        "zeroed": {
            "by_position": forgetful.mean(0).tolist(),
            "minus_dpassm": paired(forgetful.mean(1), losses.mean(1)),
        },
        "largest_difference_in_pieces": streamed,
        "prompt": bytes(prompt.tolist()).decode(errors="replace"),
        "continuation": bytes(text[len(prompt) :].tolist()).decode(errors="replace"),
    }
    write(args.output_dir / "loss_curves.png", draw_loss_curves(metrics))
    write(args.output_dir / "loss_by_position.png", draw_positions(metrics))
    write(args.output_dir / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    report = page(metrics)
    write(args.output_dir / "report.md", report)
    print("\n" + report + f"\nWritten to {args.output_dir}/")
    return metrics


if __name__ == "__main__":
    main()
