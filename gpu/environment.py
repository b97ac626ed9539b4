"""What this machine has, and whether the kernels would run: `python gpu/environment.py`.

Ends with an error, and one line that says why, where the library would refuse its Triton kernels:
everything after it would measure something else.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import longctx_layers
from longctx_layers import explain, ops

PACKAGES = ("torch", "triton", "numpy", "transformers", "lightning", "pytest", "hypothesis")
PEERS = ("fla", "mamba_ssm", "flash_attn")


def version(name: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def gpu() -> list[str]:
    """The GPU as torch and its driver name it, and the clocks it may reach."""
    if not torch.cuda.is_available():
        return ["none that torch can use"]
    fields = "name,driver_version,clocks.sm,clocks.max.sm,temperature.gpu,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        listed = f"nvidia-smi: {error}"
    return [f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}", f"{fields}: {listed}"]


def refusal(device: str) -> str | None:
    """Why the library would not run attention's Triton kernel here, or None."""
    q = torch.randn(1, 2, 64, 64, device=device, dtype=torch.bfloat16)
    rows = explain(ops.sparse_attention, q, q, q, window_size=16, backend="triton")
    (row,) = [row for row in rows if row.backend == "triton"]
    return None if row.chosen else row.reason


def main(argv: list[str] | None = None) -> None:
    """Print versions, then run one kernel, or stop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="go on without a GPU")
    args = parser.parse_args(argv)
    print("python", platform.python_version(), *(f"{name} {version(name)}" for name in PACKAGES))
    print("library:", Path(longctx_layers.__file__).parent, longctx_layers.__version__)
    print("peers:", *(name for name in PEERS if importlib.util.find_spec(name)))
    print("gpu:", *gpu(), sep="\n  ")
    print("assembler:", os.environ.get("TRITON_PTXAS_PATH", "the one in Triton's wheel"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = refusal(device)
    if reason is None:
        q = torch.randn(1, 2, 64, 64, device=device, dtype=torch.bfloat16)
        ops.sparse_attention(q, q, q, window_size=16, backend="triton").sum().item()
        print("the Triton kernels run here")
    elif args.dry:
        print("the Triton kernels would be refused:", reason)
    else:
        raise SystemExit(f"the library refuses its Triton kernels here: {reason}")


if __name__ == "__main__":
    main()
