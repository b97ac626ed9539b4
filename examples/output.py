"""What the example programs leave behind, and how losses by position are summed up in it."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from training.folders import check_writable

from longctx_layers.files import NotRestoredError, replace_all


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


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, with its folder.

    Raises:
        OSError: if it cannot be written; an earlier file is as it was, and nothing else is left.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(partial, path)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        if os.path.lexists(partial):
            partial.unlink()


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Fill an empty folder; at the end its files are moved to `folder`, whole and all or none.

    Files of folders within it go to the folders of their names. A folder that is there keeps its
    other files. One that is not appears in one step.

    Raises:
        OSError: if it cannot be written. After this and any other error it is as it was; so are
            its parents.
    """
    made = [p for p in folder.absolute().parents if not p.exists()]  # the deepest first
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Inside a folder that is there: the one around it may be read-only, or of another disk.
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


def check_targets(folder: Path, names: Iterable[str]) -> None:
    """Check that files of these names can be written under a folder; nothing stays behind there.

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


def buckets(losses: list[float]) -> list[tuple[int, int, float]]:
    """Mean loss over positions 1-16, 17-32, 33-64, ...: `(first, last, mean)`."""
    found, low, high = [], 0, 16
    while low < len(losses):
        part = losses[low:high]
        found.append((low + 1, low + len(part), sum(part) / len(part)))
        low, high = high, 2 * high
    return found
