"""Parquet and Arrow files: their columns, and the values of one of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longctx_layers.data.errors import DataError
from longctx_layers.data.files import compression, failing_as, kind_of, opened
from longctx_layers.data.sources.columns import READABLE, missing

ROWS_AT_ONCE = 128


def table_columns(path: Path) -> dict[str, str]:
    """The columns of a table with their types; any of Arrow's types for text is `string`.

    Empty for a table without rows: its types say nothing about the other files.
    """
    schema, batches = _opened_table(path, None)
    with failing_as(path, "a whole file"):
        if not any(batch.num_rows for batch in batches):
            return {}
    return {field.name: _type_name(field.type) for field in schema}


def _opened_table(path: Path, column: str | None) -> tuple[Any, Iterator[Any]]:
    """A file's schema and its batches; batches of Parquet have only that column, or none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = kind_of(path)
    with failing_as(path, f"a {kind} file"):
        if compression(path):
            with opened(path) as file:
                source = pa.BufferReader(file.read())
        else:
            source = pa.memory_map(str(path))
        if kind == "parquet":
            parquet = pq.ParquetFile(source)
            columns = [] if column is None else [column]
            return parquet.schema_arrow, parquet.iter_batches(ROWS_AT_ONCE, columns=columns)
        try:
            stored = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            stream = pa.ipc.open_stream(source)
            return stream.schema, iter(stream)
        batches = (stored.get_batch(number) for number in range(stored.num_record_batches))
        return stored.schema, batches


def _type_name(kind: Any) -> str:
    from pyarrow import BaseExtensionType, types

    if isinstance(kind, BaseExtensionType):
        if kind.extension_name == "arrow.json":
            return "JSON"
        kind = kind.storage_type
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        kind = kind.value_type
    for name, tests in _TYPES.items():
        if any(getattr(types, f"is_{test}")(kind) for test in tests):
            return name
    return str(kind)


_TYPES = {
    "string": ("string", "large_string", "string_view"),
    "bytes": ("binary", "large_binary", "binary_view", "fixed_size_binary"),
    "null": ("null",),
    "a list": ("list", "large_list", "fixed_size_list", "list_view", "large_list_view"),
    "an object": ("struct", "map", "union"),
}


def table_values(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """`(place, value)` of a column, value by value.

    Raises:
        DataError: if there is no such column of text, or the file is damaged.
    """
    schema, batches = _opened_table(path, column)
    kinds = [_type_name(field.type) for field in schema if field.name == column]
    row = 0
    while True:
        with failing_as(path, "a whole file"):
            batch = next(batches, None)
        if batch is None:
            return
        if batch.num_rows and len(kinds) != 1:
            raise missing(path, column, schema.names)
        if batch.num_rows and kinds[0] not in READABLE:
            raise DataError(
                f"{path}: expected strings under {column!r}, got {kinds[0]}; write the documents "
                "as text, or name another column with --data.text_column"
            )
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            with failing_as(path, "text in UTF-8"):
                values = batch.column(column).slice(start, ROWS_AT_ONCE).to_pylist()
            for value in values:
                row += 1
                yield f"{path}, row {row}", value
