"""Records in JSON files: lines of objects, one list of objects, or columns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from longctx_layers.data.errors import DataError
from longctx_layers.data.files import lines, plain_suffix
from longctx_layers.data.sources.columns import NESTED, STRINGS, missing, short


def json_type(value: Any) -> str:
    """What a value is, in the words that describe columns."""
    if value is None or value != value:  # NaN: pandas writes it for a missing text
        return "null"
    if isinstance(value, str):
        return "string"
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else f"the {type(value).__name__} {value!r:.40}"


def json_column(path: Path, column: str, guessed: bool) -> Iterator[tuple[str, Any]]:
    """`(place, value)` of a column, record by record.

    Args:
        guessed: whether to refuse records with text in another column.

    Raises:
        DataError: for a damaged file, one without the column, or text in another column.
    """
    has_column = False
    names: dict[str, None] = {}
    for place, record in json_records(path):
        if guessed:
            _check_only_text(place, record, column)
        if column in record:
            has_column = True
            yield place, record[column]
        elif not has_column:
            names |= dict.fromkeys(islice(record, 8))
    if names and not has_column:
        raise missing(path, column, names)


def _check_only_text(place: str, record: dict[str, Any], column: str) -> None:
    """Raise for a record with text in another column, which earlier records did not have."""
    for name, value in record.items():
        kind = json_type(value)
        if name != column and kind in (*STRINGS, *NESTED):
            raise DataError(
                f"{place}: expected text under {column!r} alone, as in the records looked at "
                f"to choose it, got {kind} under {short(name)!r}; name the column to read with "
                "--data.text_column"
            )


def json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(place, record)` of JSON lines, or of one value: a list of records, or columns.

    Raises:
        DataError: for what is not JSON, or not made of records.
    """
    numbered = ((number, line) for number, line in lines(path) if line.strip())
    begin = list(islice(numbered, 2))
    objects = [_json_object(line) is not None for _, line in begin]
    one_object = objects == [True] and plain_suffix(path) == ".json"
    in_lines = objects[:1] == [True] or (
        objects == [False, True] and begin[0][1].strip() != "["  # the first line is damaged
    )
    if in_lines and not one_object:
        for number, line in chain(begin, numbered):
            yield _json_line(path, number, line)
    elif begin:
        try:
            content = json.loads("".join(line for _, line in lines(path)))
        except (ValueError, RecursionError) as error:
            lone_line = begin[0][0] if len(begin) == 1 else None
            error_line = getattr(error, "lineno", lone_line)
            place = f"{path}:{error_line}" if error_line else str(path)
            raise DataError(f"{place}: expected JSON ({error}); correct it") from error
        yield from _records_of(path, content)


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # ValueError also for integers with too many digits
        return None
    return value if isinstance(value, dict) else None


def _json_line(path: Path, number: int, line: str) -> tuple[str, dict[str, Any]]:
    place = f"{path}:{number}"
    try:
        value = json.loads(line.strip())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: expected a JSON object on the line ({error}); correct or remove it"
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: expected a JSON object on the line, got {json_type(value)}; write records "
            'such as {"text": "..."}'
        )
    return place, value


def _records_of(path: Path, content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(content, dict) and content:
        if _is_by_index(content):
            content = {name: list(values.values()) for name, values in content.items()}
        lengths = {len(v) if isinstance(v, list) else -1 for v in content.values()}
        if len(lengths) == 1 and -1 not in lengths:  # columns, as pandas and `datasets` write them
            names = list(content)
            content = [
                dict(zip(names, row, strict=True)) for row in zip(*content.values(), strict=True)
            ]
        else:
            content = [content]
    for number, record in enumerate(content if isinstance(content, list) else [content], 1):
        place = f"{path}, record {number}"
        if not isinstance(record, dict):
            raise DataError(
                f"{place}: expected a JSON object, got {json_type(record)}; write records such as "
                '{"text": "..."}'
            )
        yield place, record


def _is_by_index(content: dict[str, Any]) -> bool:
    """Whether these are columns of values by row number, as pandas writes them by default.

    Objects in one record, or records by row number (`orient="index"`), look alike but are not.
    """
    columns = list(content.values())
    return (
        not all(name.isdecimal() for name in content)
        and all(isinstance(values, dict) for values in columns)
        and all(number.isdecimal() for number in columns[0])
        and all(values.keys() == columns[0].keys() for values in columns)
    )
