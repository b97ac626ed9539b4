"""`python -m longctx_layers.info`: what is installed, and which backend runs what, and why."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from longctx_layers.command_line import Parser, program_name
from longctx_layers.layers import LAYERS, build_layer
from longctx_layers.ops import Choice, explain

PACKAGES = (
    "longctx-layers",
    "torch",
    "triton",
    "flash-attn",
    "flash-attn-4",
    "einops",
    "safetensors",
)


def installed() -> dict[str, str]:
    """Versions of the packages that matter, found without importing them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def machine(device: torch.device | str = "cpu") -> str:
    """What measurements depend on, in one line: processor, threads and torch's version.

    >>> "torch" in machine()
    True
    """
    threads = torch.get_num_threads()
    parts = [
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        f"{threads} thread{'s' * (threads > 1)}",
        f"torch {torch.__version__}",
    ]
    if torch.device(device).type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    return ", ".join(parts)


def choices(device: torch.device | str) -> list[Choice]:
    """Every operation's backends for a small call of each layer on the device."""
    rows: dict[Choice, None] = {}
    for name in LAYERS:
        layer = build_layer(name, 32, 2, device=device)
        rows |= dict.fromkeys(explain(layer, torch.zeros(1, 300, 32, device=device)))
    return sorted(rows, key=lambda row: row.operation)


def main() -> None:
    """Print versions, devices and backends."""
    Parser(
        prog=program_name("longctx_layers.info", "info"),
        description="Print versions, devices, and which backend runs what.",
    ).parse_args()
    print(f"python {platform.python_version()} on {platform.machine()}")
    for name, version in installed().items():
        print(f"{name:<16} {version}")
    cpu = torch.backends.cpu.get_cpu_capability()
    print(f"{'cpu':<16} {cpu}, {torch.get_num_threads()} threads")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none that torch can use"
    print(f"{'gpu':<16} {gpu}")
    print(f"\nBackends on {device} (-> runs; otherwise why not):")
    for row in choices(device):
        print(row)


if __name__ == "__main__":
    main()
