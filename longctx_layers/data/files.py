"""Files as bytes and lines, whatever their compression and encoding.

The content decides before the suffix, which is often wrong or missing. The error about a format
that is not supported names it.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from longctx_layers.data.errors import DataError

HEAD = 1024  # bytes that show what a file is
JSON_HEAD = 1 << 16  # characters that show whether a text file is JSON
SUFFIXES = {
    "json": (".json", ".jsonl", ".ndjson", ".jsonlines", ".jl"),
    "csv": (".csv", ".tsv", ".tab"),
    "parquet": (".parquet", ".parq", ".pq"),
    "arrow": (".arrow", ".arrows", ".feather", ".ipc"),
}
COMPRESSED = (".gz", ".gzip", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4")

# How files begin.
COMPRESSIONS = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "lz4": re.compile(rb"\x04\x22\x4d\x18"),
}
TABLES = {
    "parquet": re.compile(rb"PAR1[^ -~\s]"),
    "arrow": re.compile(rb"ARROW1\x00\x00|\xff\xff\xff\xff"),  # as a file, as a stream
}
UNREAD = {
    "a zip archive or Excel workbook": re.compile(rb"PK\x03\x04"),
    "a tar archive": re.compile(rb"(?s).{257}ustar[ \x00]"),
    "a 7z archive": re.compile(rb"7z\xbc\xaf\x27\x1c"),
    "a rar archive": re.compile(rb"Rar!\x1a\x07"),
    "version 1 of Feather": re.compile(rb"FEA1[^ -~\s]"),
    "Avro": re.compile(rb"Obj\x01"),
    "a SQLite database": re.compile(rb"SQLite format 3\x00"),
    "a DuckDB database": re.compile(rb"(?s).{8}DUCK..\x00\x00"),
    "HDF5": re.compile(rb"\x89HDF"),
    "a pickle": re.compile(rb"\x80[\x02-\x05]"),
    "a PDF": re.compile(rb"%PDF-"),
}
UNREAD_SUFFIXES = {".orc": "ORC", ".avro": "Avro", ".pkl": "a pickle", ".dta": "a Stata file"}
BLANK = " \t\r\n\ufeff"  # also byte-order marks, which joined files can have anywhere
# An object of JSON, or arrays around one: a text file that begins like this holds records.
JSON_RECORD = re.compile(r'\s*(\[\s*)*\{\s*"(?:[^"\\]|\\.)*"\s*:')


@contextmanager
def failing_as(path: Path, what: str) -> Iterator[None]:
    """Turn the errors of the libraries that read files into one that names the file.

    Args:
        path: of the file that is read.
        what: the file was expected to be.

    Raises:
        DataError: for a file that is damaged, cut short, or something else.
    """
    try:
        yield
    except DataError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        NotImplementedError,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk, which names the file
        raise DataError(
            f"{path}: expected {what}, got one that cannot be read ({error}); write it again, or "
            "remove it"
        ) from error


def compression(path: Path) -> str | None:
    """What a file is compressed with, by its content."""
    with path.open("rb") as file:
        head = file.read(16)
    return next((name for name, mark in COMPRESSIONS.items() if mark.match(head)), None)


def opened(path: Path) -> BinaryIO:
    """Open a file for reading bytes; a compressed one is decompressed."""
    codec = compression(path)
    if codec is None:
        return path.open("rb")
    if codec in ("zstd", "lz4"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression=codec))
    openers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    return cast("BinaryIO", openers[codec](path))


def kind_of(path: Path) -> str:
    """The kind of a file: `text`, `json`, `csv`, `parquet` or `arrow`.

    Raises:
        DataError: for a format that is not supported, and for content that is not what the suffix
            says.
    """
    with failing_as(path, "a whole file"), opened(path) as file:
        head = file.read(HEAD)
    suffix = plain_suffix(path)
    unread = next((name for name, mark in UNREAD.items() if mark.match(head)), None)
    if unread := unread or UNREAD_SUFFIXES.get(suffix):
        raise DataError(
            f"{path}: expected text, JSON, CSV, Parquet or Arrow files, got {unread}; unpack or "
            "convert it, or keep it elsewhere"
        )
    for table, mark in TABLES.items():
        if mark.match(head):
            return table
    kind = next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), "text")
    if kind in ("parquet", "arrow"):
        raise DataError(
            f"{path}: expected {kind} by its name, got {'something else' if head else 'no bytes'}; "
            "write it again, or give it the suffix of what it is"
        )
    if encoding_of(head) == "utf-8-sig" and 8 * head.count(0) > len(head):
        raise DataError(
            f"{path}: expected text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark, got "
            "bytes with many zeros; convert it, or keep it elsewhere"
        )
    return kind


def plain_suffix(path: Path) -> str:
    """The suffix in lower case, without that of a compression.

    >>> plain_suffix(Path("notes.JSONL.gz"))
    '.jsonl'
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def check_no_records(path: Path) -> None:
    """Raise DataError for JSON under the name of a text file: a model would learn its syntax."""
    with opened(path) as file:
        encoding = encoding_of(file.read(4))
    start = ""
    with (
        failing_as(path, "a whole file"),
        io.TextIOWrapper(opened(path), encoding=encoding, errors="ignore") as text,
    ):
        while not start and (piece := text.read(JSON_HEAD)):
            start = piece.lstrip(BLANK)
        start += text.read(JSON_HEAD)
    if JSON_RECORD.match(start) or _is_json(start, cut=len(start) >= JSON_HEAD):
        raise DataError(
            f"{path}: expected text, got JSON under the suffix {path.suffix or '(none)'}; name it "
            ".json or .jsonl, or keep it elsewhere"
        )


def _is_json(start: str, cut: bool) -> bool:
    """Whether a text begins with a record, or consists of arrays, objects or several strings.

    Only numbers, and one quoted line, count as text.

    Args:
        cut: whether it is the beginning of a longer text.
    """
    decoder = json.JSONDecoder(parse_int=len)  # `int` refuses numbers with thousands of digits
    kinds: list[type] = []
    position = 0
    while position < len(start):
        try:
            value, position = decoder.raw_decode(start, position)
        except RecursionError:
            kinds.append(list)
            break
        except json.JSONDecodeError as error:
            at_end = error.pos > len(start) - 8 or error.msg.startswith("Unterminated string")
            if not (cut and at_end):
                return False
            openings: dict[str, type] = {"[": list, "{": dict}
            kinds.append(openings.get(start[position], type(None)))
            break
        if value and isinstance(value, dict):
            return True
        kinds.append(type(value))
        rest = start[position:].lstrip(BLANK)
        if rest and start[position] not in BLANK:
            return False
        position = len(start) - len(rest)
    strings = kinds.count(str) > 1 and set(kinds) <= {str, type(None)}
    return strings or list in kinds or dict in kinds


def encoding_of(head: bytes) -> str:
    """The encoding that a byte-order mark shows, UTF-8 without one; it is not part of the text."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"


def text_file(path: Path) -> io.TextIOWrapper:
    """Open a file for reading text, with line endings as they are."""
    with opened(path) as file:
        encoding = encoding_of(file.read(4))
    return io.TextIOWrapper(opened(path), encoding=encoding, newline="")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file as `(number, line)`, numbered from 1.

    Only a line feed ends a line; it stays part of the line.

    Raises:
        DataError: if the file is not in UTF-8, or in the encoding that its byte-order mark shows.
    """
    with opened(path) as file:
        encoding = encoding_of(file.read(4))
    if encoding != "utf-8-sig":
        with io.TextIOWrapper(opened(path), encoding=encoding, newline="\n") as text:
            number = 0
            try:
                for number, line in enumerate(text, 1):
                    yield number, line
            except UnicodeError as error:
                raise not_text(path, number + 1, error) from error
        return
    with failing_as(path, "a whole file"), opened(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise not_text(path, number, error) from error


def not_text(path: Path, number: int, error: Exception) -> DataError:
    """The error about a line that is not in UTF-8."""
    return DataError(
        f"{path}:{number}: expected text in UTF-8 ({error}); convert it, or keep it elsewhere"
    )
