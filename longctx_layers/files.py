"""Files and folders that are written whole or not at all, whatever happens to the process."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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
    """Check that files can be created in a folder, or in its first parent that exists.

    Nothing is left there.

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
    """Create `folder` by calling `write(partial)` on an empty folder next to it, unless it exists.

    Everything is on the disk before the folder gets its name, in one step. If several processes
    call this, one writes and the others wait; what a killed process left is removed by the next.

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
    from filelock import FileLock  # torch brings it; only caches need it

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
            _flush_all(partial)
            partial.chmod(0o755)
            os.rename(partial, folder)
            _flush(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: open a file next to it, which takes its name at the end.

    The content is on the disk before the file gets its name. After an error the earlier file, if
    there was one, is as it was, and nothing else is left.

    >>> folder = Path(tempfile.mkdtemp())
    >>> with replacing(folder / "notes.txt") as file:
    ...     _ = file.write(b"all of it")
    >>> [(path.name, path.read_text()) for path in folder.iterdir()]
    [('notes.txt', 'all of it')]
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if os.path.lexists(partial):
            partial.unlink()


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, with its folder.

    Raises:
        OSError: if it cannot be written; an earlier file is as it was, and nothing else is left.
    """
    try:
        with replacing(path) as file:
            file.write(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise _unwritten(path, error) from error


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Fill an empty folder, whose files are moved to `folder` at the end: all of them, or none.

    Files in subfolders go to subfolders of the same names. An existing folder keeps its other
    files; a new one appears in one step.

    Raises:
        OSError: if it cannot be written. After this and any other error it is as it was; so are
            its parents.
    """
    made = [p for p in folder.absolute().parents if not p.exists()]  # the deepest first
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Inside an existing folder: its parent may be read-only, or on another disk.
        place = folder if folder.exists() else folder.parent
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=place))
        yield partial
        if folder.exists():
            places = {path: folder / path.relative_to(partial) for path in partial.rglob("*")}
            for path, place in sorted(places.items()):
                if path.is_dir() and not place.exists():
                    place.mkdir()
                    made.insert(0, place)
            replace_all({path: place for path, place in places.items() if path.is_file()})
        else:
            _flush_all(partial)
            partial.chmod(0o777 & ~_umask())
            os.rename(partial, folder)
        made = []
    except NotRestoredError:
        made = []  # there may be files in them
        raise
    except OSError as error:
        raise _unwritten(folder, error) from error
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial)
        for parent in made:
            if parent.exists():
                parent.rmdir()


def _umask() -> int:
    now = os.umask(0)  # which can only be read by setting it
    os.umask(now)
    return now


def _unwritten(path: Path, error: OSError) -> OSError:
    return OSError(
        f"could not write {path} ({error.strerror or error}), which is as it was before; make room "
        "or allow writing there, or choose another place"
    )


def write_all(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write files by their names under a folder, all or none.

    Raises:
        OSError: if one cannot be written; files that existed before are unchanged.

    >>> folder = Path(tempfile.mkdtemp())
    >>> write_all(folder, {"page.md": "# A page", "pictures/a.png": b"..."})
    >>> sorted(path.name for path in folder.iterdir())
    ['page.md', 'pictures']
    """
    check_targets(folder, contents)
    with write_folder(folder) as partial:
        for name, content in contents.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def check_targets(folder: Path, names: Iterable[str]) -> None:
    """Check that files of these names can be written under a folder; nothing is left there.

    Raises:
        OSError: if a folder has the name of a file, or no file can be made in one of the folders.
    """
    targets = [folder / name for name in names]
    if taken := [str(target) for target in targets if target.is_dir()]:
        raise IsADirectoryError(
            f"--output_dir: expected files or nothing at {', '.join(taken)}, got a folder; move it "
            "away, or choose another --output_dir"
        )
    for parent in dict.fromkeys([folder, *(target.parent for target in targets)]):
        check_writable(parent, "--output_dir")


class NotRestoredError(OSError):
    """Files could be neither replaced nor put back; the message names the copies that are kept."""


def replace_all(moves: Mapping[Path, Path]) -> None:
    """Move files, all or none; each destination is on the same file system as its file.

    Replaced files are kept next to their places until all moves are done, and are restored if one
    fails. Only a process that is killed between two moves leaves some done and others not.

    Args:
        moves: `{file: destination}`.

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


def _flush_all(folder: Path) -> None:
    """Bring everything in a folder to the disk, before the folder gets its name."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)  # of a file or a folder
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
