"""Files of records, JSON, CSV, Parquet and Arrow: one column of each, as text."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from longctx_layers.data.errors import DataError
from longctx_layers.data.files import lines, plain_suffix
from longctx_layers.data.sources.tables import READABLE, missing, short, table_columns, table_values

LOOKED_AT = 1000  # records of each JSON file that tell which columns there are
STRINGS = ("string", "bytes", "binary")  # `binary` is what `datasets` calls bytes
NESTED = ("a list", "an object")
UNSURE = "perhaps a text, in a file without a header"
csv.field_size_limit(2**31 - 1)


# ---- Columns


def choose_column(columns: Mapping[str, str], asked: str | None, where: str) -> str:
    """The column to read.

    Args:
        columns: their types by name; text is `string`.
        asked: what the user named; None for `text`, or the only column of strings or bytes where
            no other is nested.

    Raises:
        DataError: if it is not there or holds no text, or cannot be told.
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
    found = "; ".join(f"{short(name)} is {kind}" for name, kind in islice(others.items(), 8))
    raise DataError(
        f"text_column: expected one of the columns of strings "
        f"({', '.join(map(short, strings[:20])) or 'none'}), got {column!r} in {where}"
        + (f", where {found}" if found else "")
        + "; name one with --data.text_column, or write the documents into one"
    )


def columns_of(path: Path, kind: str) -> dict[str, str]:
    """The columns of a file with their types; none for a file without records."""
    if kind == "csv":
        header, *rows = [row for _, row in islice(_csv_rows(path), 2)] or [[]]
        sure = len(header) > 1 or re.fullmatch(r"[\w.-]{1,40}", "".join(header))
        return dict.fromkeys(header, "string" if sure else UNSURE) if rows or not sure else {}
    if kind == "json":
        found: dict[str, str] = {}
        for _, record in islice(_json_records(path), LOOKED_AT):
            _add_columns(found, {name: _json_type(value) for name, value in record.items()})
        return found
    return table_columns(path)


def column_of(paths: Sequence[Path], kind: str, asked: str | None) -> str:
    """The column to read in all of these files.

    A column that is named, or `text`, is looked for in the first file that has records; without
    either, the columns of all files decide.

    Raises:
        DataError: see `choose_column`.
    """
    found: dict[str, str] = {}
    seen: list[Path] = []
    for path in paths:
        if columns := columns_of(path, kind):
            seen.append(path)
            _add_columns(found, columns)
            if asked is not None or "text" in found:
                break
    if not seen:
        return asked or "text"
    more = f" and {len(seen) - 1} more files" if len(seen) > 1 else ""
    return choose_column(found, asked, f"{seen[0]}{more}")


def _add_columns(found: dict[str, str], columns: Mapping[str, str]) -> None:
    """Add columns to those found before; a type with text replaces one without."""
    for name, kind in columns.items():
        before = found.get(name, "null")
        if before == "null" or (kind in STRINGS and before not in (*STRINGS, *NESTED)):
            found[name] = kind


def texts_of(path: Path, kind: str, column: str, guessed: bool = False) -> Iterator[str]:
    """The texts of a column, without those that are null, empty or missing.

    Args:
        guessed: whether the column was chosen as the only one with text, rather than by its name.

    Raises:
        DataError: with file and line, for records that cannot be read, values that are no text,
            and, if the column is guessed, JSON records with another that it could have been; with
            the file, if none of its records has the column.
    """
    if kind == "json":
        values = _json_column(path, column, guessed)
    else:
        values = (_csv_column if kind == "csv" else table_values)(path, column)
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
                f"{place}: expected a string under {column!r}, got {_json_type(value)}; write the "
                "documents as text, or name another column with --data.text_column"
            )
        if value:
            yield _without_surrogates(value, place)


def _without_surrogates(text: str, place: str) -> str:
    """The text with U+FFFD for each half of a pair, which JSON can write and no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        warnings.warn(
            f"{place}: U+FFFD is read in place of a lone surrogate, which is no character",
            stacklevel=2,
        )
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ---- JSON


def _json_type(value: Any) -> str:
    if value is None or value != value:  # NaN, as pandas has it for a text that is missing
        return "null"
    if isinstance(value, str):
        return "string"
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else f"the {type(value).__name__} {value!r:.40}"


def _json_column(path: Path, column: str, guessed: bool) -> Iterator[tuple[str, Any]]:
    found, names = False, dict[str, None]()
    for place, record in _json_records(path):
        if guessed:
            _check_only_text(place, record, column)
        if column in record:
            found = True
            yield place, record[column]
        elif not found:
            names |= dict.fromkeys(islice(record, 8))
    if names and not found:
        raise missing(path, column, names)


def _check_only_text(place: str, record: dict[str, Any], column: str) -> None:
    """Raise for a record with text in another column: the first `LOOKED_AT` did not show it."""
    for name, value in record.items():
        kind = _json_type(value)
        if name != column and kind in (*STRINGS, *NESTED):
            raise DataError(
                f"{place}: expected text under {column!r} alone, as in the records looked at "
                f"to choose it, got {kind} under {short(name)!r}; name the column to read with "
                "--data.text_column"
            )


def _json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(place, record)` of JSON lines, or of one value: a list of records, or columns."""
    filled = ((number, line) for number, line in lines(path) if line.strip())
    begin = list(islice(filled, 2))
    objects = [_json_object(line) is not None for _, line in begin]
    lone = objects == [True] and plain_suffix(path) == ".json"
    in_lines = objects[:1] == [True] or (
        objects == [False, True] and begin[0][1].strip() != "["  # one line among them is damaged
    )
    if in_lines and not lone:
        for number, line in chain(begin, filled):
            yield _json_line(path, number, line)
    elif begin:
        try:
            whole = json.loads("".join(line for _, line in lines(path)))
        except (ValueError, RecursionError) as error:
            number = getattr(error, "lineno", None if len(begin) > 1 else begin[0][0])
            place = f"{path}:{number}" if number else str(path)
            raise DataError(f"{place}: expected JSON ({error}); mend it") from error
        yield from _records_of(path, whole)


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # also of integers with too many digits
        return None
    return value if isinstance(value, dict) else None


def _json_line(path: Path, number: int, line: str) -> tuple[str, dict[str, Any]]:
    place = f"{path}:{number}"
    try:
        value = json.loads(line.strip())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: expected a JSON object on the line ({error}); mend or remove it"
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: expected a JSON object on the line, got {_json_type(value)}; write records "
            'such as {"text": "..."}'
        )
    return place, value


def _records_of(path: Path, whole: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(whole, dict) and whole:
        if _is_by_index(whole):
            whole = {name: list(values.values()) for name, values in whole.items()}
        lengths = {len(v) if isinstance(v, list) else -1 for v in whole.values()}
        if len(lengths) == 1 and -1 not in lengths:  # columns, as pandas and `datasets` have them
            names = list(whole)
            whole = [
                dict(zip(names, row, strict=True)) for row in zip(*whole.values(), strict=True)
            ]
        else:
            whole = [whole]
    for number, record in enumerate(whole if isinstance(whole, list) else [whole], 1):
        place = f"{path}, record {number}"
        if not isinstance(record, dict):
            raise DataError(
                f"{place}: expected a JSON object, got {_json_type(record)}; write records such as "
                '{"text": "..."}'
            )
        yield place, record


def _is_by_index(whole: dict[str, Any]) -> bool:
    """Whether these are columns of values by row number, as pandas writes them by default.

    Objects in one record, or records by row number (`orient="index"`), look alike but are not.
    """
    columns = list(whole.values())
    return (
        not all(name.isdecimal() for name in whole)
        and all(isinstance(values, dict) for values in columns)
        and all(number.isdecimal() for number in columns[0])
        and all(values.keys() == columns[0].keys() for values in columns)
    )


# ---- CSV


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """`(line, row)` of the header and of every row that is not blank; lines are where rows end."""
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
            f"({error}); mend it, or write it again"
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
