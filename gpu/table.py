"""The table of `benchmarks/speed/gpu_table.py` with the tiles that a sweep found fastest.

python gpu/table.py --tiles sweep.json --lengths 8192 --output results

Takes that program's flags; the package `benchmarks` must be importable (run.sh sees to it).
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from candidates import use_winners

from benchmarks.speed import gpu_table

AUTOTUNED = ("ssd_bmm", "ssd_chunk_scan", "ssd_chunk_state", "ssd_combined", "ssd_state_passing")
AT_MOST = 3
# Rows and columns of a block of mamba-ssm's kernels that a cycle model of the compiled code liked.
KEPT = ((128, 64), (64, 64), (128, 128))


def limit_autotuning() -> None:
    """Leave each of mamba-ssm's kernels three configurations of up to eleven.

    Compiling and timing all would take minutes. What is left may be slower than what it would
    choose itself, which a page with these numbers has to say.
    """
    for name in AUTOTUNED:
        try:
            module = import_module(f"mamba_ssm.ops.triton.{name}")
        except Exception as error:  # absent, or it does not import here: the table says so as well
            print(f"mamba-ssm: {type(error).__name__}: {error}")
            return
        _keep_few(module)


def _keep_few(module: ModuleType) -> None:
    for kernel in vars(module).values():
        configs = getattr(kernel, "configs", None)
        if isinstance(configs, list):
            blocks = [(c.kwargs.get("BLOCK_SIZE_M"), c.kwargs.get("BLOCK_SIZE_N")) for c in configs]
            kept = [c for c, block in zip(configs, blocks, strict=True) if block in KEPT]
            kernel.configs = (kept or configs)[:AT_MOST]


def main(argv: list[str] | None = None) -> None:
    """Choose tiles, then measure with what is left of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--tiles", type=Path, help="what sweep.py wrote")
    args, others = parser.parse_known_args(argv)
    use_winners(args.tiles)
    limit_autotuning()
    sys.argv = [sys.argv[0], *others]  # which gpu_table reads, and repeats in its page
    gpu_table.main()


if __name__ == "__main__":
    main()
