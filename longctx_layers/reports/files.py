"""All files of a report, or none."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longctx_layers.files import check_targets, replace_all


def add_output(parser: argparse.ArgumentParser, flag: str, name: str) -> None:
    """Where a program writes: `runs/NAME` unless told otherwise, `reports/NAME` with `--publish`.

    Git ignores `runs/` and tracks `reports/`, so no run changes a committed page by accident.
    """
    dest = flag.strip("-").replace("-", "_")
    ignored, tracked = Path("runs", name), Path("reports", name)
    parser.add_argument(flag, dest=dest, type=Path, default=ignored, help=f"default: {ignored}")
    parser.add_argument(
        "--publish",
        dest=dest,
        action="store_const",
        const=tracked,
        help=f"the same as {flag} {tracked}: renew the committed page",
    )


def write_all(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write files by their names under a folder.

    Raises:
        OSError: if they cannot be written; the files of an earlier report are as they were.
    """
    check_targets(folder, contents)
    partials = {}
    try:
        for name, content in contents.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            partials[partial] = target
            partial.write_bytes(content if isinstance(content, bytes) else content.encode())
        replace_all(partials)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: None in their place, however deep."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
