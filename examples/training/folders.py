"""Folders that are there whole or not at all, whatever happens to the process that fills them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` by calling `write(partial)` on an empty one beside it, unless it is there.

    The finished folder is on the disk before it gets its name, in one step. Of several processes
    one writes and the others wait; what a killed one left behind is removed by the next.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            return
        prefix = f".{folder.name}.partial-"
        for left_behind in folder.parent.glob(prefix + "*"):
            shutil.rmtree(left_behind)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            write(partial)
            for path in [*partial.rglob("*"), partial]:
                _flush(path)
            partial.chmod(0o755)
            os.rename(partial, folder)
            _flush(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
