"""Where documents come from: wikitext, the hub, local files, the standard library, made up.

Each source is an iterable dataset of Hugging Face's `datasets` with one column `text`, one document
a row, read piece by piece and never whole.
"""

from __future__ import annotations

import difflib
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx_layers.data.hub import from_hub
from longctx_layers.data.sources import local, records, synthetic, wikitext
from longctx_layers.data.store import content_key

SOURCES = ("wikitext", "synthetic", "local", "stdlib")
OFFLINE = (
    "--data.dataset_name=synthetic, stdlib, or local with --data.dataset_config=path/to/data "
    "(a local folder wikitext/ or one of the dataset's name is read too)"
)
SYNTHETIC_DOCUMENTS = 1000
NOT_SOURCES = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@dataclass
class Source:
    """Documents to train on, the source's own validation split if it has one, and their name.

    Attributes:
        training, validation: `datasets.IterableDataset` with a column `text`.
        fingerprint: equal for equal content.
    """

    training: Any
    validation: Any | None
    fingerprint: str

    def __post_init__(self) -> None:
        """A validation split without text is none."""
        if self.validation is not None and next(texts(self.validation), None) is None:
            warnings.warn(
                "the dataset's validation split has no text; documents of the training split are "
                "held out instead",
                stacklevel=2,
            )
            self.validation = None


def texts(dataset: Any | None) -> Iterator[str]:
    """The documents of one of a source's parts; null or empty texts are none."""
    for example in dataset or ():
        if example["text"]:
            yield example["text"]


def check(name: str, config: str | None) -> None:
    """Whether there can be such a source, before anything is read.

    Raises:
        ValueError: for a misspelt name or a config that the source does not have.
    """
    if name == "wikitext":
        if config is not None and config not in wikitext.CONFIGS:
            raise ValueError(
                f"dataset_config: wikitext has {', '.join(wikitext.CONFIGS)}, got {config!r}"
            )
    elif name == "synthetic":
        if config is not None and not (config.isdecimal() and int(config) > 1):
            raise ValueError(
                "dataset_config: for synthetic expected a number of documents above 1, or nothing "
                f"for {SYNTHETIC_DOCUMENTS}, got {config!r}"
            )
    elif name == "stdlib":
        if config is not None:
            raise ValueError(f"dataset_config: stdlib has none, got {config!r}; leave it out")
    elif name == "local":
        if config is None or not Path(config).expanduser().exists():
            raise ValueError(
                "dataset_config: for local expected the path of a file or folder, as in "
                f"--data.dataset_config=path/to/data, got {config!r}"
            )
    else:
        near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.7)
        if not name or (near and not Path(name).exists()):
            raise ValueError(
                f"dataset_name: expected {', '.join(SOURCES)} or the name of a dataset on the "
                f"Hugging Face hub, got {name!r}" + (f"; did you mean {near[0]}?" if near else "")
            )


def open_source(
    name: str, config: str | None, text_column: str | None = None, *, streaming: bool = False
) -> Source:
    """The source of a name that `check` let pass.

    Args:
        text_column: of a hub's or local dataset; None for `text`, or the only column of strings.
        streaming: whether a hub's dataset is read over the network each time, instead of being
            downloaded into the cache of `datasets` once.

    Raises:
        ConnectionError: if the hub is needed and out of reach.
        ValueError: if the dataset is not there, or has no such split or column.
    """
    if name == "synthetic":
        count = int(config or SYNTHETIC_DOCUMENTS)
        code = hashlib.blake2b(Path(synthetic.__file__).read_bytes()).hexdigest()
        return Source(
            from_generator(_synthetic, count=count), None, content_key(name, str(count), code)
        )
    if name == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        paths = [
            path
            for path in sorted(root.rglob("*.py"))
            if not NOT_SOURCES & set(path.relative_to(root).parts)
        ]
        documents = from_generator(local.documents, paths, lone=False)
        return Source(documents, None, local.fingerprint(paths, root))
    if name == "local":
        return _local(Path(str(config)).expanduser(), text_column)
    return _hub(name, config, text_column, streaming)


def from_generator(function: Any, paths: list[Path] | None = None, **arguments: Any) -> Any:
    """An iterable dataset of the documents that a generator yields; if given, of each path.

    A resumption skips whole paths.
    """
    from datasets import Features, IterableDataset, Value

    given = {"function": function, "arguments": arguments}
    return IterableDataset.from_generator(
        _examples,
        features=Features({"text": Value("large_string")}),
        gen_kwargs=given if paths is None else {**given, "paths": paths},
    )


def _examples(
    function: Any, arguments: dict[str, Any], paths: list[Path] | None = None
) -> Iterator[dict[str, str]]:
    for place in [()] if paths is None else [(path,) for path in paths]:
        for text in function(*place, **arguments):
            yield {"text": text}


def _synthetic(count: int) -> Iterator[str]:
    return synthetic.documents(count)


def _local(path: Path, text_column: str | None) -> Source:
    opened, keys = {}, [text_column or ""]
    for name, part in local.parts(path).items():
        paths, kind = local.find(part)
        keys += [name, local.fingerprint(paths, part)]
        if kind == "text":
            lone = len(paths) == 1
            opened[name] = from_generator(local.documents, paths, lone=lone)
        else:
            column = records.column_of(paths, kind, text_column)
            guessed = column not in (text_column, "text")
            opened[name] = from_generator(
                records.texts_of, paths, kind=kind, column=column, guessed=guessed
            )
    return Source(opened["train"], opened.get("validation"), content_key(*keys))


def _hub(name: str, config: str | None, text_column: str | None, streaming: bool) -> Source:
    from datasets import load_dataset_builder

    is_wikitext = name in ("wikitext", wikitext.HUB_NAME)
    if is_wikitext:
        config = config or wikitext.CONFIGS[0]
    place = name
    if name == "wikitext" and not Path(name).is_dir():
        place = wikitext.HUB_NAME

    def load() -> tuple[Any, str]:
        builder = load_dataset_builder(place, config)
        if streaming:
            return builder.as_streaming_dataset(), builder.cache_dir
        builder.download_and_prepare()
        return builder.as_dataset(), builder.cache_dir  # named after the files' versions

    if Path(place).is_dir():
        splits, version = load()
    else:
        what = f"dataset {place!r}" + (f" ({config})" if config else "")
        splits, version = from_hub(load, what, OFFLINE)
    if "train" not in splits:
        raise ValueError(
            f"dataset_name: expected a dataset with a split train, {name!r} has {', '.join(splits)}"
        )

    def part(split: str) -> Any:
        dataset = only_text(splits[split], text_column)
        if is_wikitext:
            return from_generator(wikitext.articles, lines=dataset)
        return dataset

    return Source(
        part("train"),
        part("validation") if "validation" in splits else None,
        content_key(version, text_column or ""),
    )


def only_text(dataset: Any, column: str | None) -> Any:
    """An iterable dataset with the documents of `dataset` as its column `text`."""
    from datasets import Dataset

    features = dataset.features
    if features is None:
        dataset = dataset._resolve_features()
        features = dataset.features
    columns = {name: _type_of(feature) for name, feature in features.items()}
    column = records.choose_column(columns, column, "the dataset")
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
