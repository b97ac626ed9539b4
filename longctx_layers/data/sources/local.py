"""Files of the user's: text, JSON, CSV, Parquet or Arrow, one or a folder of them."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from longctx_layers.data.files import (
    DataError,
    check_no_records,
    failing_as,
    kind_of,
    lines,
    text_file,
)

READING = "3"  # raised when the same files give other documents, so that older ones are not used
LONGEST, SHORTEST = 1 << 20, 1 << 12  # characters of the documents that a text file is cut into
PIECES = 64  # that a lone text file is cut into, where these limits let it
SIDE_FILES = ("_SUCCESS", "_metadata", "_common_metadata")  # that others write beside Parquet
SAVED, SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"  # `save_to_disk`


def parts(path: Path) -> dict[str, Path]:
    """Where the documents to train on are, `train`, and where those to validate on, `validation`.

    All of them are to train on, but for a folder that the `DatasetDict.save_to_disk` of `datasets`
    wrote.

    Raises:
        DataError: if such a folder has no part `train`.
    """
    if not (path / SPLITS).is_file():
        return {"train": path}
    splits = json.loads((path / SPLITS).read_text())["splits"]
    used = {name: path / name for name in ("train", "validation") if name in splits}
    if "train" not in used:
        raise DataError(
            f"dataset_config: expected a saved dataset with a split train, {path} has "
            f"{', '.join(splits)}; pass the folder of one of them"
        )
    if unused := [name for name in splits if name not in used]:
        warnings.warn(f"{path}: not read is {', '.join(unused)}", stacklevel=2)
    return used


def find(path: Path) -> tuple[list[Path], str]:
    """The files to read, and of which kind all of them are, see `files.kind_of`.

    Hidden files are not read. Beside other kinds, text (a README) is not read either; a warning
    names it.

    Raises:
        DataError: if there are no files, or of several kinds, or some that cannot be read.
    """
    found: dict[str, list[Path]] = {}
    for one in [path] if path.is_file() else sorted(_files_under(path)):
        found.setdefault(kind_of(one), []).append(one)
    beside = found.pop("text", []) if len(found) > 1 else []
    if len(found) != 1:
        raise DataError(
            f"dataset_config: expected text, JSON, CSV, Parquet or Arrow files under {path}, found "
            + (f"both {' and '.join(sorted(found))}; keep them apart" if found else "none")
        )
    if beside:
        names = ", ".join(str(one.relative_to(path)) for one in beside[:5])
        warnings.warn(
            f"{path}: {len(beside)} files beside the data are not read ({names}"
            + (", ...)" if len(beside) > 5 else ")"),
            stacklevel=2,
        )
    ((kind, paths),) = found.items()
    if kind == "text":
        for one in paths:
            check_no_records(one)
    return paths, kind


def _files_under(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those in it, also of those that links lead to."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        real = here.resolve()
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        if "_delta_log" in folders:
            raise DataError(
                f"{here}: expected files, got a Delta table, some of whose files may be of older "
                "versions; export it to Parquet"
            )
        folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
        if all(name in names for name in SAVED):
            state = json.loads((here / SAVED[0]).read_text())
            names = [file["filename"] for file in state["_data_files"]]
        for name in names:
            if name.startswith(".") or name in SIDE_FILES:
                continue
            if not (here / name).exists():
                raise DataError(f"{here / name}: expected a file, got a link to nothing; remove it")
            yield here / name


def documents(path: Path, lone: bool) -> Iterator[str]:
    """A text file: one document, or several where it is long or `lone`, cut at ends of lines.

    A lone file is cut because one document cannot be split into training and validation.

    Raises:
        DataError: if it is not in UTF-8, or in what its byte-order mark says.
    """
    longest = LONGEST
    if lone:
        longest = max(SHORTEST, min(LONGEST, path.stat().st_size // PIECES))
    with failing_as(path, "a whole file"):
        try:
            with text_file(path) as file:
                while piece := file.read(longest):
                    yield piece + file.readline(longest)
        except UnicodeError:
            deque(lines(path), maxlen=0)  # raises, and knows the line
            raise


def fingerprint(paths: list[Path], root: Path) -> str:
    """Equal for equal files with equal names under `root`."""
    whole = hashlib.blake2b(READING.encode(), digest_size=16)
    for path in paths:
        whole.update(os.fsencode(path.relative_to(root)) + b"\0")
        one = hashlib.blake2b()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                one.update(piece)
        whole.update(one.digest())
    return whole.hexdigest()
