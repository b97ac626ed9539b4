"""Files of the user's: text, JSON lines or parquet, one or a folder of them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path

KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".ndjson": "json"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
LONGEST, SHORTEST = 1 << 20, 1 << 12  # characters of the documents that a text file is cut into
PIECES = 64  # that a lone text file is cut into, where these limits let it


def find(path: Path) -> tuple[list[Path], str]:
    """The files to read, and of which kind they are: `text`, `json` or `parquet`.

    Hidden files are not read. Beside parquet or JSON lines, text (a README) is not read either; a
    warning names it.

    Raises:
        ValueError: if there are no files, or both JSON lines and parquet.
    """
    if path.is_file():
        return [path], kind_of(path)
    found: dict[str, list[Path]] = {}
    for one in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in one.relative_to(path).parts)
        if one.is_file() and not hidden:
            found.setdefault(kind_of(one), []).append(one)
    beside = found.pop("text", []) if len(found) > 1 else []
    if len(found) != 1:
        raise ValueError(
            f"dataset_config: expected text, JSON lines or parquet files under {path}, found "
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
    return paths, kind


def kind_of(path: Path) -> str:
    """`text`, `json` or `parquet`, from the name."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return KINDS.get(suffixes[-1], "text") if suffixes else "text"


def documents(path: Path, lone: bool) -> Iterator[str]:
    """A text file: one document, or several where it is long or `lone`, cut at ends of lines.

    A lone file is cut because one document cannot be split into training and validation.

    Raises:
        ValueError: if it is not UTF-8.
    """
    longest = LONGEST
    if lone:
        longest = max(SHORTEST, min(LONGEST, path.stat().st_size // PIECES))
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while piece := file.read(longest):
                yield piece + file.readline(longest)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected text in UTF-8 ({error}); convert it, or keep it elsewhere"
        ) from error


def fingerprint(paths: list[Path], root: Path) -> str:
    """Equal for equal files with equal names under `root`."""
    whole = hashlib.blake2b(digest_size=16)
    for path in paths:
        whole.update(str(path.relative_to(root)).encode() + b"\0")
        one = hashlib.blake2b()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                one.update(piece)
        whole.update(one.digest())
    return whole.hexdigest()
