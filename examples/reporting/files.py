"""All files of a report, or none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def write_all(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write files by their names under a folder.

    All are on the disk beside their places before the first is moved there: a full disk or an
    interruption while they are written leaves the files of an earlier report as they were.
    """
    partials = {}
    try:
        for name, content in contents.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            partials[partial] = target
            partial.write_bytes(content if isinstance(content, bytes) else content.encode())
        for partial, target in partials.items():
            os.replace(partial, target)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
