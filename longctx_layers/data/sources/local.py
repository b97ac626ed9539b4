"""The user's own files: text, JSON, CSV, Parquet or Arrow, one file or a folder of them."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from longctx_layers.data.errors import DataError
from longctx_layers.data.files import check_no_records, failing_as, kind_of, lines, text_file
from longctx_layers.data.keys import content_key
from longctx_layers.data.sources.base import Request, Source, from_generator
from longctx_layers.data.sources.records import column_of, texts_of

READING = "3"  # to be raised when the same files give other documents: older caches are then unused
# Characters of the documents that a long text file is cut into.
LONGEST = 1 << 20
SHORTEST = 1 << 12
PIECES = 64  # of a lone text file, as far as these limits allow
SIDE_FILES = ("_SUCCESS", "_metadata", "_common_metadata")  # Spark and others write them
# Files that `save_to_disk` of `datasets` writes.
SAVED_DATASET = ("state.json", "dataset_info.json")
SAVED_SPLITS = "dataset_dict.json"


def check(config: str | None) -> None:
    """See `Reader`; the config is a path."""
    if config is None or not Path(config).expanduser().exists():
        raise ValueError(
            "dataset_config: for local expected the path of a file or folder, as in "
            f"--data.dataset_config=path/to/data, got {config!r}"
        )


def open_source(request: Request) -> Source:
    """See `Reader`."""
    text_column = request.text_column
    opened = {}
    keys = [text_column or ""]
    for name, part in parts(Path(str(request.config)).expanduser()).items():
        paths, kind = find(part)
        keys += [name, fingerprint(paths, part)]
        if kind == "text":
            opened[name] = from_generator(documents, paths, lone=len(paths) == 1)
        else:
            column = column_of(paths, kind, text_column)
            guessed = column not in (text_column, "text")
            opened[name] = from_generator(
                texts_of, paths, kind=kind, column=column, guessed=guessed
            )
    return Source(opened["train"], opened.get("validation"), content_key(*keys))


def parts(path: Path) -> dict[str, Path]:
    """The places of the documents: to train on, `train`, and to validate on, `validation`.

    All documents are to train on, unless `DatasetDict.save_to_disk` of `datasets` wrote the folder.

    Raises:
        DataError: if such a folder has no part `train`.
    """
    if not (path / SAVED_SPLITS).is_file():
        return {"train": path}
    splits = json.loads((path / SAVED_SPLITS).read_text())["splits"]
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
    """The files to read, and their common kind, see `files.kind_of`.

    Hidden files are not read. Text next to files of another kind (a README) is not read either; a
    warning names it.

    Raises:
        DataError: if there are no files, or files of several kinds, or one that cannot be read.
    """
    by_kind: dict[str, list[Path]] = {}
    for file in [path] if path.is_file() else sorted(_files_under(path)):
        by_kind.setdefault(kind_of(file), []).append(file)
    ignored = by_kind.pop("text", []) if len(by_kind) > 1 else []
    if len(by_kind) != 1:
        raise DataError(
            f"dataset_config: expected text, JSON, CSV, Parquet or Arrow files under {path}, found "
            + (f"both {' and '.join(sorted(by_kind))}; keep them apart" if by_kind else "none")
        )
    if ignored:
        names = ", ".join(str(file.relative_to(path)) for file in ignored[:5])
        warnings.warn(
            f"{path}: text next to the data is not read ({names}"
            + (", ...)" if len(ignored) > 5 else ")"),
            stacklevel=2,
        )
    ((kind, paths),) = by_kind.items()
    if kind == "text":
        for file in paths:
            check_no_records(file)
    return paths, kind


def _files_under(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders; symbolic links are followed."""
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
        if all(name in names for name in SAVED_DATASET):
            state = json.loads((here / SAVED_DATASET[0]).read_text())
            names = [file["filename"] for file in state["_data_files"]]
        for name in names:
            if name.startswith(".") or name in SIDE_FILES:
                continue
            if not (here / name).exists():
                raise DataError(f"{here / name}: expected a file, got a link to nothing; remove it")
            yield here / name


def documents(path: Path, lone: bool) -> Iterator[str]:
    """The documents of a text file: one, or several if it is long or `lone`, cut at ends of lines.

    A lone file is cut, because one document cannot be split into training and validation.

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
            deque(lines(path), maxlen=0)  # raises an error that names the line
            raise


def fingerprint(paths: list[Path], root: Path) -> str:
    """Equal for equal files with equal names under `root`."""
    all_files = hashlib.blake2b(READING.encode(), digest_size=16)
    for path in paths:
        all_files.update(os.fsencode(path.relative_to(root)) + b"\0")
        content = hashlib.blake2b()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                content.update(piece)
        all_files.update(content.digest())
    return all_files.hexdigest()
