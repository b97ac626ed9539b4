"""Any text dataset of the Hugging Face hub, by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from longctx_layers.data.hub import from_hub
from longctx_layers.data.keys import content_key
from longctx_layers.data.sources.base import Request, Source, from_generator
from longctx_layers.data.sources.records import choose_column

OFFLINE = (
    "--data.dataset_name=synthetic, stdlib, or local with --data.dataset_config=path/to/data "
    "(a local folder wikitext/ or one of the dataset's name is read too)"
)


def open_hub_dataset(
    request: Request, documents: Callable[[Iterable[dict[str, str]]], Iterator[str]] | None = None
) -> Source:
    """A dataset of the hub, or a local folder of the same name.

    Args:
        request: the dataset's name on the hub, its configuration and its column.
        documents: makes documents of the rows; by default each row is one.

    Raises:
        ConnectionError: if the hub is out of reach and its cache does not hold the dataset.
        ValueError: if the dataset has no split `train`, or no such column.
    """
    from datasets import load_dataset_builder

    name, config, text_column, streaming = request

    def load() -> tuple[Any, str]:
        builder = load_dataset_builder(name, config)
        if streaming:
            return builder.as_streaming_dataset(), builder.cache_dir
        builder.download_and_prepare()
        return builder.as_dataset(), builder.cache_dir  # named after the files' versions

    if Path(name).is_dir():
        splits, version = load()
    else:
        what = f"dataset {name!r}" + (f" ({config})" if config else "")
        splits, version = from_hub(load, what, OFFLINE)
    if "train" not in splits:
        raise ValueError(
            f"dataset_name: expected a dataset with a split train, {name!r} has {', '.join(splits)}"
        )

    def part(split: str) -> Any:
        rows = only_text(splits[split], text_column)
        return rows if documents is None else from_generator(documents, lines=rows)

    return Source(
        part("train"),
        part("validation") if "validation" in splits else None,
        content_key(version, text_column or ""),
    )


def only_text(dataset: Any, column: str | None) -> Any:
    """An iterable dataset with the documents of `dataset` in its only column, `text`."""
    from datasets import Dataset

    features = dataset.features
    if features is None:
        dataset = dataset._resolve_features()
        features = dataset.features
    columns = {name: _type_of(feature) for name, feature in features.items()}
    column = choose_column(columns, column, "the dataset")
    dataset = dataset.select_columns([column])
    if column != "text":
        dataset = dataset.rename_column(column, "text")
    return dataset.to_iterable_dataset() if isinstance(dataset, Dataset) else dataset


def _type_of(feature: Any) -> str:
    dtype = getattr(feature, "dtype", "")
    if dtype in ("string", "large_string", "string_view"):
        return "string"
    if dtype in ("binary", "large_binary", "binary_view"):
        return "binary"
    if isinstance(feature, dict) or dtype == "dict":
        return "an object"
    return "a list" if isinstance(feature, list) or dtype == "list" else str(dtype)
