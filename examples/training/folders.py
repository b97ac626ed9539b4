"""Folders that are there whole or not at all, whatever happens to the process that fills them."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

# What a full or read-only disk, a quota, a limit or missing rights say.
UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
)


class StorageError(OSError):
    """Something could not be written; the message says what, why, and what is left."""


def check_writable(folder: Path, flag: str) -> None:
    """Check that files can be made in a folder, or in what is there of it; nothing stays behind.

    Raises:
        StorageError: if they cannot; it names the flag that chose the folder.
    """
    place = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise StorageError(
            f"{flag}: expected a folder to write into, got {folder} ({error.strerror}); allow "
            "writing there, or choose another"
        ) from error


def write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` by calling `write(partial)` on an empty one beside it, unless it is there.

    The finished folder is on the disk before it gets its name, in one step. Of several processes
    one writes and the others wait; what a killed one left behind is removed by the next.

    Raises:
        StorageError: if it cannot be written; nothing of it is left.
    """
    if folder.exists():
        return
    try:
        _write_locked(folder, write)
    except OSError as error:
        if error.errno not in UNWRITABLE:  # of what is read, not of what is written
            raise
        raise StorageError(
            f"cache: could not write {folder} ({error.strerror}); nothing of it is left: make room "
            "or allow writing there, or choose another --data.cache_dir"
        ) from error


def _write_locked(folder: Path, write: Callable[[Path], None]) -> None:
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
