"""What the command-line programs share: their spelling of flags, and hints in errors about them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from longctx_layers.ops.checks import closest as closest  # for the programs

_FLAG = re.compile(r"(--[\w.-]+)(.*)", re.DOTALL)
_INVALID_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)")


def underscored(arguments: Sequence[str]) -> list[str]:
    """Replace hyphens in the names of flags, so that both spellings are understood.

    >>> underscored(["--seq-len=8", "--output-dir", "my-runs"])
    ['--seq_len=8', '--output_dir', 'my-runs']
    """
    result = []
    for argument in arguments:
        match = _FLAG.fullmatch(argument)
        if match is not None:
            name, rest = match.groups()
            argument = "--" + name[2:].replace("-", "_") + rest
        result.append(argument)
    return result


def program_name(module: str, command: str) -> str:
    """How this process was started, for usage texts and errors.

    Args:
        module: the program's module, which `python -m` runs.
        command: the program's name as a command of `longctx`.

    Returns:
        `longctx COMMAND`, `python -m MODULE`, or `python SCRIPT`.
    """
    script = sys.argv[0]
    if Path(script).stem == "longctx":
        return f"longctx {command}"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.removesuffix(".__main__") == module:
        return f"python -m {module}"
    return f"python {script}"


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose flags have underscores and may be typed with hyphens.

    Errors are one line, and those about unknown flags and values name the closest one.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As `ArgumentParser` does, with hyphens in the names of flags replaced."""
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args(underscored(arguments), namespace)

    def error(self, message: str) -> NoReturn:
        """End the program with one line."""
        flags = re.findall(r"--[\w.]+", message) if "unrecognized arguments" in message else []
        hints = "".join(closest(flag, self._option_string_actions) for flag in flags)
        if match := _INVALID_CHOICE.search(message):
            hints += closest(match[1], re.findall(r"[^\s,']+", match[2]))
        self.exit(2, f"{self.prog}: error: {message}{hints} (--help lists all flags)\n")


def device(name: str) -> torch.device:
    """The device that a flag `--device` names; `auto` is a GPU if there is one.

    Raises:
        ValueError: for a GPU that this machine does not have, or an unknown name.

    >>> device("cpu")
    device(type='cpu')
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if available else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise ValueError(
            f"--device={name}: torch {torch.__version__} finds {count or 'no'} GPU on this "
            "machine; use --device cpu, or auto"
        )
    return torch.device(name)


def add_output(parser: argparse.ArgumentParser, flag: str, name: str) -> None:
    """Add a flag for where a program writes, and `--publish` to replace the committed page.

    The default is `runs/NAME`, and `--publish` means `reports/NAME`.
    Git ignores `runs/` and tracks `reports/`, so that no run changes a committed page by accident.
    """
    dest = flag.strip("-").replace("-", "_")
    ignored = Path("runs", name)
    tracked = Path("reports", name)
    parser.add_argument(flag, dest=dest, type=Path, default=ignored, help=f"default: {ignored}")
    parser.add_argument(
        "--publish",
        dest=dest,
        action="store_const",
        const=tracked,
        help=f"the same as {flag} {tracked}: replace the committed page",
    )
