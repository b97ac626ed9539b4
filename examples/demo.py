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
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from demo_report import draw_loss_curves, draw_positions, page
from output import add_output, write
from torch import Tensor
from tqdm import tqdm

from longctx_layers import LongContextLM, create_model, parameter_groups

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
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


def documents(text: Path | None, shortest: int) -> list[bytes]:
    """Documents of at least `shortest` bytes, in a fixed order.

    Raises:
        ValueError: if there are fewer than ten.
    """
    root = Path(sysconfig.get_path("stdlib")) if text is None else text
    pattern = "*.py" if text is None else "*"
    paths = [root] if root.is_file() else sorted(root.rglob(pattern))
    found = []
    for path in paths:
        if path.is_file() and not SKIPPED & set(path.relative_to(root).parts):
            found.append(path.read_bytes())
    if root.is_file():  # one file is cut into documents
        size = max(4 * shortest, len(found[0]) // 50)
        found = [found[0][i : i + size] for i in range(0, len(found[0]), size)]
    found = [document for document in found if len(document) >= shortest]
    if len(found) < 10:
        raise ValueError(
            f"text: expected at least 10 documents of {shortest} bytes under {root}, found "
            f"{len(found)}; pass --text with a longer file or folder, or a shorter length"
        )
    return found


def split(found: list[bytes], seed: int) -> tuple[list[bytes], list[bytes]]:
    """Training and validation documents: one in eight is held out."""
    found = list(found)
    random.Random(seed).shuffle(found)
    held_out = max(2, len(found) // 8)
    return found[held_out:], found[:held_out]


def windows(found: list[bytes], count: int, length: int, draw: random.Random) -> Tensor:
    """`[count, length + 1]` ids: windows at random places, documents weighted by length."""
    drawn = draw.choices(found, weights=[len(d) for d in found], k=count)
    return torch.stack([stretch(document, length, draw) for document in drawn])


def stretch(document: bytes, length: int, draw: random.Random) -> Tensor:
    """`[length + 1]` ids from a random place."""
    begin = draw.randrange(len(document) - length)
    part = bytearray(document[begin : begin + length + 1])
    return torch.frombuffer(part, dtype=torch.uint8).long()


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
