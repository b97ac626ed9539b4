"""Files of records (JSON, CSV, Parquet, Arrow): one column of each, as text."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from longctx_layers.data.errors import DataError
from longctx_layers.data.files import lines, plain_suffix
from longctx_layers.data.sources.columns import NESTED, READABLE, STRINGS, missing, short
from longctx_layers.data.sources.json_records import json_column, json_records, json_type
from longctx_layers.data.sources.tables import table_columns, table_values

LOOKED_AT = 1000  # records of each JSON file that tell which columns there are
UNSURE = "perhaps a text, in a file without a header"
csv.field_size_limit(2**31 - 1)


# ---- Columns


def choose_column(columns: Mapping[str, str], asked: str | None, where: str) -> str:
    """Choose the column to read.

    Args:
        columns: their types by name; text is `string`.
        asked: what the user named; None for `text`, or for the only column of strings or bytes if
            no other column is nested.
        where: the columns are, for the error.

    Raises:
        DataError: if there is no such column, it holds no text, or several could be meant.

    >>> choose_column({"id": "the int 1", "body": "string"}, None, "here")
    'body'
    """
    strings = [name for name, kind in columns.items() if kind in STRINGS]
    column = asked
    if column is None and "text" in columns:
        column = "text"
    elif column is None and len(strings) == 1 and not set(columns.values()) & set(NESTED):
        column = strings[0]
    readable = READABLE if asked is None else (*READABLE, UNSURE)
    if column is not None and columns.get(column) in readable:
        return column
    others = {name: kind for name, kind in columns.items() if kind != "string"}
    kinds = "; ".join(f"{short(name)} is {kind}" for name, kind in islice(others.items(), 8))
    raise DataError(
        f"text_column: expected one of the columns of strings "
        f"({', '.join(map(short, strings[:20])) or 'none'}), got {column!r} in {where}"
        + (f", where {kinds}" if kinds else "")
        + "; name one with --data.text_column, or write the documents into one"
    )


def columns_of(path: Path, kind: str) -> dict[str, str]:
    """The columns of a file with their types; empty for a file without records."""
    if kind == "csv":
        header, *rows = [row for _, row in islice(_csv_rows(path), 2)] or [[]]
        sure = len(header) > 1 or re.fullmatch(r"[\w.-]{1,40}", "".join(header))
        return dict.fromkeys(header, "string" if sure else UNSURE) if rows or not sure else {}
    if kind == "json":
        columns: dict[str, str] = {}
        for _, record in islice(json_records(path), LOOKED_AT):
            _add_columns(columns, {name: json_type(value) for name, value in record.items()})
        return columns
    return table_columns(path)


def column_of(paths: Sequence[Path], kind: str, asked: str | None) -> str:
    """Choose the column to read in all of these files.

    A column that the user named, or `text`, is looked for in the first file with records. Without
    either, the columns of all files decide.

    Raises:
        DataError: see `choose_column`.
    """
    all_columns: dict[str, str] = {}
    read: list[Path] = []
    for path in paths:
        if columns := columns_of(path, kind):
            read.append(path)
            _add_columns(all_columns, columns)
            if asked is not None or "text" in all_columns:
                break
    if not read:
        return asked or "text"
    more = f" and {len(read) - 1} more files" if len(read) > 1 else ""
    return choose_column(all_columns, asked, f"{read[0]}{more}")


def _add_columns(all_columns: dict[str, str], columns: Mapping[str, str]) -> None:
    """Add columns to those of other records; a type with text replaces one without."""
    for name, kind in columns.items():
        before = all_columns.get(name, "null")
        if before == "null" or (kind in STRINGS and before not in (*STRINGS, *NESTED)):
            all_columns[name] = kind


def texts_of(path: Path, kind: str, column: str, guessed: bool = False) -> Iterator[str]:
    """The texts of a column, without those that are null, empty or missing.

    Args:
        guessed: whether the column was chosen as the only one with text, rather than by its name.

    Raises:
        DataError: with file and line, for records that cannot be read, values that are not text,
            and, if the column was guessed, JSON records with another column of text; with the
            file, if none of its records has the column.
    """
    values: Iterator[tuple[str, Any]]
    if kind == "json":
        values = json_column(path, column, guessed)
    elif kind == "csv":
        values = _csv_column(path, column)
    else:
        values = table_values(path, column)
    for place, value in values:
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place}: expected text in UTF-8 under {column!r} ({error}); convert it"
                ) from error
        if value is None or value != value:
            continue
        if not isinstance(value, str):
            raise DataError(
                f"{place}: expected a string under {column!r}, got {json_type(value)}; write the "
                "documents as text, or name another column with --data.text_column"
            )
        if value:
            yield _without_surrogates(value, place)


def _without_surrogates(text: str, place: str) -> str:
    """Replace lone surrogates by U+FFFD: JSON can express them, but no encoding can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        warnings.warn(
            f"{place}: U+FFFD is read in place of a lone surrogate, which is not a character",
            stacklevel=2,
        )
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ---- CSV


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """`(line, row)` of the header and of every row that is not blank; `line` is where it ends."""
    numbered = lines(path)
    first = next(numbered, (0, ""))[1]
    delimiter = max(",;\t|", key=first.count) if plain_suffix(path) == ".csv" else "\t"
    text = chain([first], (line for _, line in numbered))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: expected CSV, with quotes doubled inside of quotes "
            f"({error}); correct it, or write it again"
        ) from error


def _csv_column(path: Path, column: str) -> Iterator[tuple[str, str]]:
    rows = _csv_rows(path)
    _, header = next(rows, (0, []))
    for number, row in rows:
        if header.count(column) != 1:
            raise missing(path, column, header)
        if len(row) != len(header):
            raise DataError(
                f"{path}:{number}: expected {len(header)} fields as in the first line, got "
                f"{len(row)}; quote texts that hold the separator"
            )
        yield f"{path}:{number}", row[header.index(column)]
