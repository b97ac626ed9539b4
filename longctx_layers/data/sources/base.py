"""What every source of documents has in common."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Request(NamedTuple):
    """Which documents are asked for; see the arguments of `LongContextData`.

    Attributes:
        name: of the dataset.
        config: what the source makes of it: a configuration, a path, a number.
        text_column: of a dataset with columns; None for `text`, or the only column of strings.
        streaming: whether a dataset of the hub is read over the network each time, instead of
            being downloaded once.
    """

    name: str
    config: str | None = None
    text_column: str | None = None
    streaming: bool = False


@dataclass
class Source:
    """Documents to train on, and the source's own validation split if it has one.

    Attributes:
        training, validation: `datasets.IterableDataset` with one column `text`, a document a row;
            `from_generator` makes one.
        fingerprint: a name of the content; equal for equal content.
    """

    training: Any
    validation: Any | None
    fingerprint: str

    def __post_init__(self) -> None:
        """Ignore a validation split without text."""
        if self.validation is not None and next(texts(self.validation), None) is None:
            warnings.warn(
                "the dataset's validation split has no text; documents of the training split are "
                "held out instead",
                stacklevel=2,
            )
            self.validation = None


class Reader(Protocol):
    """A source that has a name of its own: a module or an object with these two functions."""

    def check(self, config: str | None) -> None:
        """Raise ValueError for a `dataset_config` that cannot be; nothing is read yet."""
        ...

    def open_source(self, request: Request) -> Source:
        """Open the documents; they are read piece by piece, when they are asked for."""
        ...


def texts(dataset: Any | None) -> Iterator[str]:
    """The documents of one part of a source, without those that are null or empty."""
    for example in dataset or ():
        if example["text"]:
            yield example["text"]


def from_generator(function: Any, paths: list[Path] | None = None, **arguments: Any) -> Any:
    """An iterable dataset, with a column `text`, of the documents that a generator yields.

    Args:
        function: called with the arguments, it yields strings.
        paths: if they are passed, the function is called with each of them, and a resumed run
            skips whole paths.
        arguments: by name, for the function.

    >>> def numbers(count):
    ...     yield from map(str, range(count))
    >>> list(texts(from_generator(numbers, count=3)))
    ['0', '1', '2']
    """
    from datasets import Features, IterableDataset, Value

    options = {"function": function, "arguments": arguments}
    return IterableDataset.from_generator(
        _examples,
        features=Features({"text": Value("large_string")}),
        gen_kwargs=options if paths is None else {**options, "paths": paths},
    )


def _examples(
    function: Any, arguments: dict[str, Any], paths: list[Path] | None = None
) -> Iterator[dict[str, str]]:
    for place in [()] if paths is None else [(path,) for path in paths]:
        for text in function(*place, **arguments):
            yield {"text": text}
