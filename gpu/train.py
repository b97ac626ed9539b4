"""Tokens a second of training steps: `python gpu/train.py --tiles sweep.json`.

Forward, backward and AdamW in bfloat16 autocast, on random tokens, for each block and backend.
Utilisation counts six operations a parameter and token, over what a large matrix product reaches
on this device (`--rates`, from rates.py); attention and state spaces come on top of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from candidates import use_winners

from longctx_layers import create_model, use_backend

WARM_UP = 2  # steps that compile and allocate


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=Path, help="what sweep.py wrote")
    parser.add_argument("--rates", type=Path, help="what rates.py wrote")
    parser.add_argument("--out", type=Path, help="a JSON file, one row a measurement")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", nargs="+", default=["dpassm", "vanilla", "blade"])
    parser.add_argument("--backends", nargs="+", default=["auto", "torch"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--tokens", type=int, default=32768, help="of a batch, at least")
    parser.add_argument("--size", default="150m")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement")
    parser.add_argument("--total", type=float, default=55, help="no new measurement after these")
    return parser.parse_args(argv)


def measure(block: str, backend: str, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """One block on one backend."""
    cuda = args.device == "cuda"
    torch.manual_seed(0)
    model = create_model(args.vocab, args.size, block, device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=cuda)
    batch = max(1, args.tokens // length)
    ids = torch.randint(args.vocab, (batch, length + 1), device=args.device)

    def step() -> float:
        with torch.autocast(args.device, torch.bfloat16), use_backend(backend):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the device

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        step()
    begin = time.perf_counter()
    steps, loss = 0, float("nan")
    while steps == 0 or time.perf_counter() - begin < args.seconds:
        loss = step()
        steps += 1
    tokens = steps * batch * length / (time.perf_counter() - begin)
    row: dict[str, Any] = {"block": block, "backend": backend, "length": length, "batch": batch}
    row |= {"tokens_per_second": round(tokens), "loss": round(loss, 4)}
    if cuda:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if args.rates is not None and args.rates.exists():
        peak = json.loads(args.rates.read_text())["operations_per_second"]
        parameters = sum(p.numel() for p in model.parameters())
        row["utilisation"] = round(6 * parameters * tokens / peak, 3)
    return row


def main(argv: list[str] | None = None) -> None:
    """Measure one after the other, the fast paths first, as far as time allows."""
    args = parse(argv)
    use_winners(args.tiles)
    begin = time.perf_counter()
    rows = []
    for backend in args.backends:
        for length in args.lengths:
            for block in args.blocks:
                key = {"block": block, "backend": backend, "length": length}
                if time.perf_counter() - begin > args.total:
                    print("out of time, not measured:", key)
                    continue
                try:
                    row = measure(block, backend, length, args)
                except Exception as error:  # out of memory, say: the others are measured
                    row = {**key, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()
                rows.append(row)
                print(json.dumps(row), flush=True)
                if args.out is not None:
                    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
