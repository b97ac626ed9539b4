"""Where documents come from: wikitext, the hub, local files, the standard library, synthetic text.

Each source is an iterable dataset of Hugging Face's `datasets` with one column `text`, one document
a row, read piece by piece and never as a whole. To add a source, write its module with the two
functions of `Reader` and add it to `SOURCES`; from outside of this library, call `register_source`.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from longctx_layers.data.sources import local, stdlib, synthetic, wikitext
from longctx_layers.data.sources.base import Reader, Request, Source, from_generator, texts
from longctx_layers.data.sources.hub_datasets import OFFLINE, open_hub_dataset

__all__ = [
    "SOURCES",
    "OFFLINE",
    "Reader",
    "Request",
    "Source",
    "register_source",
    "check",
    "open_source",
    "from_generator",
    "texts",
]

SOURCES: dict[str, Reader] = {
    "wikitext": wikitext,
    "synthetic": synthetic,
    "local": local,
    "stdlib": stdlib,
}


def register_source(name: str, reader: Reader) -> None:
    """Make a source of your own available as `dataset_name=name`.

    Args:
        name: as in `LongContextData(dataset_name=name)` and `--data.dataset_name=name`.
        reader: a module or an object with the functions of `Reader`.

    Raises:
        ValueError: if the name is taken.

    >>> class Poems:
    ...     def check(self, config):
    ...         pass
    ...
    ...     def open_source(self, request):
    ...         return Source(from_generator(lambda: ["a poem", "another"]), None, "poems 1")
    >>> register_source("poems", Poems())
    >>> list(texts(open_source("poems", None).training))
    ['a poem', 'another']
    >>> del SOURCES["poems"]
    """
    if name in SOURCES:
        raise ValueError(f"register_source: the name {name!r} is taken; choose another one")
    SOURCES[name] = reader


def _reader(name: str) -> Reader | None:
    """The built-in or registered source of this name; None for a dataset of the hub."""
    return SOURCES.get("wikitext" if name == wikitext.HUB_NAME else name)


def check(name: str, config: str | None) -> None:
    """Check that there can be such a source, before anything is read.

    Raises:
        ValueError: for a misspelt name, or a config that the source does not have.

    >>> check("synthetic", "500")
    >>> check("sinthetic", None)
    Traceback (most recent call last):
    ValueError: dataset_name: expected ... got 'sinthetic'; did you mean synthetic?
    """
    reader = _reader(name)
    if reader is not None:
        reader.check(config)
        return
    near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.7)
    if not name or (near and not Path(name).exists()):
        raise ValueError(
            f"dataset_name: expected {', '.join(SOURCES)} or the name of a dataset on the "
            f"Hugging Face hub, got {name!r}" + (f"; did you mean {near[0]}?" if near else "")
        )


def open_source(
    name: str, config: str | None, text_column: str | None = None, *, streaming: bool = False
) -> Source:
    """Open the documents of a name that `check` accepts.

    Args:
        name: of a built-in or registered source, or of a dataset on the hub.
        config: what the source makes of it: a configuration, a path, a number of documents.
        text_column: of a hub's or local dataset; None for `text`, or the only column of strings.
        streaming: whether a hub's dataset is read over the network each time, instead of being
            downloaded into the cache of `datasets` once.

    Raises:
        ConnectionError: if the hub is needed and out of reach.
        ValueError: if the dataset is not there, or has no such split or column.

    >>> len(list(texts(open_source("synthetic", "3").training)))
    3
    """
    request = Request(name, config, text_column, streaming)
    reader = _reader(name)
    return open_hub_dataset(request) if reader is None else reader.open_source(request)
