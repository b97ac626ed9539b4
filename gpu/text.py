"""Train models of equal size on the same real text: `python gpu/text.py --out text.json`.

Bytes of Python's standard library, or of a folder that was brought along; every model sees the same
batches in the same order, for some seconds. Writes loss, tokens a second and memory every few
seconds, and at the end the loss by position on text that was held out, in rows longer than in
training.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from candidates import use_winners
from torch import Tensor

from longctx_layers import LongContextLM, create_model, parameter_groups

VOCABULARY = 256
HELD_OUT = 10  # one document in so many
LONGER = 2  # rows that are held out, than those of training
WARM_UP = 20  # steps of a rising learning rate
SKIPPED = {"site-packages", "test", "tests", "idlelib", "__pycache__"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a folder, instead of the standard library")
    parser.add_argument("--tiles", type=Path, help="what sweep.py wrote")
    parser.add_argument("--out", type=Path, default=Path("text.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", nargs="+", default=["dpassm", "vanilla"])
    parser.add_argument("--size", default="150m")
    parser.add_argument("--seconds", type=float, default=40, help="for each model")
    parser.add_argument("--every", type=float, default=3, help="seconds between two records")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    return parser.parse_args(argv)


def read(folder: Path | None) -> tuple[bytes, bytes]:
    """Text to train on, and text that is held out.

    Raises:
        ValueError: if there is hardly any.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    pattern = "*.py" if folder is None else "*"
    paths = [p for p in sorted(root.rglob(pattern)) if p.is_file()]
    paths = [p for p in paths if not SKIPPED & set(p.relative_to(root).parts)]
    random.Random(0).shuffle(paths)
    held_out = b"".join(p.read_bytes() for p in paths[::HELD_OUT])
    del paths[::HELD_OUT]
    training = b"".join(p.read_bytes() for p in paths)
    if len(held_out) < 10_000:
        raise ValueError(
            f"text: expected at least 100 kB of text in {root}, got {len(held_out + training)} "
            "bytes; pass --text with another folder"
        )
    return training, held_out


def batches(text: bytes, rows: int, length: int, device: str) -> Iterator[Tensor]:
    """`[rows, length + 1]` ids from random places, the same sequence of batches every time."""
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    draw = random.Random(0)
    while True:
        places = [draw.randrange(len(ids) - length) for _ in range(rows)]
        batch = torch.stack([ids[at : at + length + 1] for at in places])
        yield batch.to(device, torch.int64)


def train(model: LongContextLM, text: bytes, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train in place; a record every few seconds, of the mean loss since the last one."""
    cuda = args.device == "cuda"
    groups = parameter_groups(model, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.95), fused=cuda)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=WARM_UP)
    tokens, last, losses = 0, 0.0, []
    begin = time.perf_counter()
    for batch in batches(text, args.batch, args.length, args.device):
        with torch.autocast(args.device, torch.bfloat16):
            loss = model.loss(batch[:, :-1], batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        tokens += batch[:, 1:].numel()
        now = time.perf_counter() - begin
        done = now > args.seconds
        if done or now - last > args.every:
            yield {
                "seconds": round(now, 2),
                "tokens": tokens,
                "loss": round(sum(losses) / len(losses), 4),
                "tokens_per_second": round(len(losses) * batch[:, 1:].numel() / (now - last)),
            }
            last, losses = now, []
        if done:
            return


def loss_by_position(model: LongContextLM, text: bytes, args: argparse.Namespace) -> dict[str, Any]:
    """Mean loss of positions 1 to 64, to 128, and so on, on text that was held out."""
    length = min(LONGER * args.length, len(text) - 2)
    total = torch.zeros(length, device=args.device)
    rounds = 4
    draw = batches(text, max(1, args.batch // LONGER), length, args.device)
    for _ in range(rounds):
        batch = next(draw)
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
            total += model.loss(batch[:, :-1], batch[:, 1:], reduction="none").mean(0)
    edges = [0]
    while edges[-1] < length:
        edges.append(min(max(64, 2 * edges[-1]), length))
    pairs = pairwise(edges)
    return {f"{a + 1}-{b}": round((total[a:b].mean() / rounds).item(), 4) for a, b in pairs}


def main(argv: list[str] | None = None) -> None:
    """Train one model after the other; the file is written with every record."""
    args = parse(argv)
    use_winners(args.tiles)
    training, held_out = read(args.text)
    print(f"{len(training):,} bytes to train on, {len(held_out):,} held out")
    results: dict[str, Any] = {}
    for block in args.blocks:
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        model = create_model(VOCABULARY, args.size, block, device=args.device)
        print(model.describe())
        results[block] = {"parameters": sum(p.numel() for p in model.parameters()), "records": []}
        for record in train(model, training, args):
            results[block]["records"].append(record)
            print(block, json.dumps(record), flush=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
        if args.device == "cuda":
            results[block]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        results[block]["held_out_loss"] = loss_by_position(model.eval(), held_out, args)
        print(block, json.dumps(results[block]["held_out_loss"]), flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
