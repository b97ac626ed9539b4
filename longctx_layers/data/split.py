"""Which documents are held out for validation: a pure function of their content and a seed.

Equal documents are always on the same side of the split, wherever they are in the data.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import islice

import numpy as np

from longctx_layers.data.errors import DataError
from longctx_layers.data.keys import digest
from longctx_layers.data.sources import Source, texts
from longctx_layers.data.store import TokenStore
from longctx_layers.data.tokenizers import Tokenizer


def ranks(digests: np.ndarray, seed: int) -> np.ndarray:
    """Pseudo-random numbers in [0, 1), `[n]`, for the digests of documents, `[n]` uint64.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied to digest plus seed.
    """
    with np.errstate(over="ignore"):
        x = digests.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / (1 << 53)


def is_held_out(text: str, seed: int, fraction: float) -> bool:
    """Whether a document belongs to the validation split, by its content alone."""
    return bool(ranks(np.array([digest(text)], np.uint64), seed)[0] < fraction)


def split(store: TokenStore, seed: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the training and of the validation documents.

    If the source has a validation split, it is used, and training documents equal to one in it are
    left out. Otherwise about `fraction` of the documents are held out, at least one unless it is 0.

    Raises:
        DataError: if no document is left to train on.
    """
    numbers = np.arange(len(store))
    if store.n_train < len(store):
        in_validation = numbers >= store.n_train
        leaked = np.isin(store.digests, store.digests[in_validation])
        training, validation = numbers[~leaked], numbers[in_validation]
    else:
        rank = ranks(store.digests, seed)
        threshold = max(fraction, np.nextafter(rank.min(), 1)) if fraction else 0
        training, validation = numbers[rank >= threshold], numbers[rank < threshold]
    if not len(training):
        raise nothing_to_train_on(f"none of the {len(store):,} documents")
    return training, validation


def nothing_to_train_on(what: str) -> DataError:
    """The error about a validation split that takes everything."""
    return DataError(
        f"validation_fraction: {what} is left to train on; pass more than one document (equal ones "
        "fall on the same side), or validation_fraction=0"
    )


def training_texts(source: Source, seed: int, fraction: float) -> Iterator[str]:
    """The documents of a source that are not held out by their content."""
    has_own_split = source.validation is not None
    for text in texts(source.training):
        if has_own_split or not is_held_out(text, seed, fraction):
            yield text


def held_out_of_stream(source: Source, seed: int, fraction: float, count: int) -> list[str]:
    """The first `count` documents of the validation split; its other documents are trained on.

    Raises:
        DataError: if no document is in the split, although `fraction` is above 0.
    """
    if source.validation is not None:
        candidates = texts(source.validation)
    elif fraction:
        candidates = (t for t in texts(source.training) if is_held_out(t, seed, fraction))
    else:
        return []
    documents = list(islice(candidates, count))
    if not documents:
        raise DataError(
            "validation_fraction: no document of the stream falls into the validation split; pass "
            f"more than {fraction}, or 0"
        )
    return documents


def check_stored(store: TokenStore, **parts: np.ndarray) -> None:
    """Raise DataError if a part of a store has documents, but no token to predict."""
    for name, documents in parts.items():
        if len(documents) and store.lengths(documents).max() < 2:  # only ends of text
            raise _nothing_to_predict(name)


def check_stream(source: Source, held_out: Container[int], tokenizer: Tokenizer) -> None:
    """Check that a stream has something to train on; it is read up to the first such document.

    Raises:
        DataError: if everything is held out, or the rest has no tokens.
    """
    nothing = True
    for text in texts(source.training):
        if digest(text) not in held_out:
            nothing = False
            if tokenizer.encode(text):
                return
    raise nothing_to_train_on("no document") if nothing else _nothing_to_predict("training")


def _nothing_to_predict(name: str) -> DataError:
    return DataError(
        f"tokenizer: it gives no tokens for any of the {name} documents, so that there is nothing "
        "to predict; check the documents, or take another tokenizer"
    )
