"""One launch of each kernel at a training shape, for a profiler: `ncu ... python gpu/hot.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from calls import Shape, calls
from candidates import use_winners

KERNELS = (("ssd", 64), ("forward", 64), ("queries", 64))


def main(argv: list[str] | None = None) -> None:
    """Launch."""
    shape = Shape()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=Path, help="what sweep.py wrote")
    parser.add_argument("--device", default="cuda", help="cpu needs TRITON_INTERPRET=1")
    parser.add_argument("--batch", type=int, default=shape.batch)
    parser.add_argument("--length", type=int, default=shape.length)
    parser.add_argument("--heads", type=int, default=shape.heads)
    args = parser.parse_args(argv)
    use_winners(args.tiles)
    shape = Shape(args.batch, args.length, args.heads)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float16  # what the interpreter can
    for kind, size in KERNELS:
        for title, run in calls(kind, size, shape, args.device, dtype).items():
            run()
            print(kind, size, title)
    if args.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
