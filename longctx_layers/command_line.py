"""What the command-line programs share: their spelling of flags, and hints in errors about them."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Collection, Sequence
from typing import NoReturn

_FLAG = re.compile(r"(--[\w.-]+)(.*)", re.DOTALL)


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


def program_name() -> str:
    """How the running program was started, as usage texts and errors name it.

    `longctx train`, `python -m longctx_layers.training.train`, or a script's name.
    """
    if sys.argv[0].startswith("longctx "):  # from longctx_layers/cli.py
        return sys.argv[0]
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is None or not module.name:
        return os.path.basename(sys.argv[0])
    return f"python -m {module.name.removesuffix('.__main__')}"


def closest(name: str, valid: Collection[str]) -> str:
    """A hint such as `"; did you mean 'dpassm'?"`, empty if nothing is close to `name`."""
    matches = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose flags have underscores and may be typed with hyphens.

    Errors are one line, and the error about an unknown flag names the closest one.
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
        self.exit(2, f"{self.prog}: error: {message}{hints} (--help lists all flags)\n")
