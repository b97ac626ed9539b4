"""Several files that change together or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path


class NotRestoredError(OSError):
    """Files could be neither replaced nor put back; the message names the copies that are kept."""


def replace_all(moves: Mapping[Path, Path]) -> None:
    """Move files to their places, all or none; each place is on the file system of its file.

    What they replace is kept beside it until all are in place, and is put back if one is not. Only
    a process that is killed between two moves leaves some moved and others not.

    Args:
        moves: `{file: its place}`.

    Raises:
        OSError: if one cannot be moved; every place is as it was.
        NotRestoredError: if a place could not be given back what it had.
    """
    kept: dict[Path, Path] = {}
    try:
        for place in moves.values():
            if os.path.lexists(place):
                kept[place] = place.with_name(f".{place.name}.{uuid.uuid4().hex}.old")
                _copy(place, kept[place])
        for path in moves:
            _flush(path)
        for path, place in moves.items():
            os.replace(path, place)
    except BaseException:
        _restore([place for path, place in moves.items() if not os.path.lexists(path)], kept)
        raise
    finally:
        for copy in kept.values():
            copy.unlink(missing_ok=True)


def _restore(moved: list[Path], kept: dict[Path, Path]) -> None:
    lost = {}
    for place in moved:
        try:
            if place in kept:
                os.replace(kept[place], place)
            else:
                place.unlink()
        except OSError:
            lost[place] = kept.pop(place, None)  # so that the copy is not removed
    if lost:
        raise NotRestoredError(
            "files were replaced in part, and these could not be put back: "
            + ", ".join(f"{place} (kept as {copy})" for place, copy in lost.items())
        )


def _copy(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy, follow_symlinks=False)
    except OSError:  # file systems without links
        shutil.copy2(path, copy, follow_symlinks=False)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
