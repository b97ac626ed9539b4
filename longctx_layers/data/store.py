"""Tokenised documents: a contiguous array of ids, in memory or in a memory-mapped file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from longctx_layers.data.errors import DataError
from longctx_layers.data.keys import digest
from longctx_layers.data.tokenizers import Tokenizer
from longctx_layers.files import write_once

LAYOUT = 2  # to be raised when the format of these files changes: older ones are then unused
CHARACTERS_AT_ONCE = 1 << 20  # that are tokenised together


class DamagedCacheError(ValueError):
    """A folder of the cache is not as it was written."""


class TokenStore:
    """Tokenised documents, one after another, each followed by the end of text.

    Attributes:
        tokens: `[n]` unsigned ids of all documents.
        ends: `[documents]` int64; document i is `tokens[ends[i - 1] : ends[i]]`.
        digests: `[documents]` uint64, see `keys.digest`.
        n_train: the number of training documents; the rest are the source's own validation split.
    """

    def __init__(
        self, tokens: np.ndarray, ends: np.ndarray, digests: np.ndarray, n_train: int
    ) -> None:
        self.tokens = tokens
        self.ends = ends
        self.digests = digests
        self.n_train = n_train
        self._folder: Path | None = None

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Map a store that `prepare` wrote into memory.

        Raises:
            DamagedCacheError: if a file is missing or damaged, or their lengths do not fit.
        """
        try:
            description = json.loads((folder / "store.json").read_text())
            store = cls(
                np.memmap(folder / "tokens.bin", description["dtype"], mode="r"),
                np.load(folder / "ends.npy"),
                np.load(folder / "digests.npy"),
                description["n_train"],
            )
        except (FileNotFoundError, ValueError, EOFError, KeyError, TypeError) as error:
            raise _damaged(folder, str(error)) from error
        if (
            not 0 <= store.n_train <= len(store)
            or len(store.digests) != len(store)
            or np.any(np.diff(store.ends) < 1)
        ):
            raise _damaged(folder, f"an index of {len(store)} documents that contradicts itself")
        if len(store.tokens) != store.ends[-1]:
            raise _damaged(
                folder, f"{len(store.tokens)} tokens where its index says {store.ends[-1]}"
            )
        store._folder = folder
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map would be a copy of the whole file.
        if self._folder is not None:
            return TokenStore.open, (self._folder,)
        return TokenStore, (self.tokens, self.ends, self.digests, self.n_train)

    def __len__(self) -> int:
        return len(self.ends)

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each of these documents, ends of text included."""
        starts = np.where(documents > 0, self.ends[documents - 1], 0)
        lengths: np.ndarray = self.ends[documents] - starts
        return lengths

    def document(self, number: int) -> np.ndarray:
        """`[n]` ids of one document, the last one the end of text."""
        start = self.ends[number - 1] if number else 0
        return self.tokens[start : self.ends[number]]


def _damaged(folder: Path, what: str) -> DamagedCacheError:
    return DamagedCacheError(
        f"cache: expected complete tokenised data in {folder}, got {what}; remove that folder, and "
        "the next run tokenises again"
    )


def prepare(
    folder: Path, training: Iterable[str], validation: Iterable[str], tokenizer: Tokenizer
) -> TokenStore:
    """Open the store in `folder`; if it is not there yet, write it first, in bounded memory.

    Raises:
        DataError: if no document has text.
        StorageError: if it cannot be written; nothing of it is left.
        DamagedCacheError: if it is there, but damaged.
    """

    def write(partial: Path) -> None:
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        lengths: list[int] = []
        digests: list[int] = []
        with (
            open(partial / "tokens.bin", "wb") as file,
            tqdm(desc="tokenising", unit="B", unit_scale=True, disable=None) as bar,
        ):
            n_train = 0
            for held_out, texts in enumerate((training, validation)):
                for batch in batches_of_text(texts):
                    for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                        file.write(ids.astype(dtype).tobytes())
                        file.write(dtype(tokenizer.end_of_text).tobytes())
                        lengths.append(len(ids) + 1)
                        digests.append(digest(text))
                        bar.update(len(text))
                if not held_out:
                    n_train = len(lengths)
        if not lengths:
            raise DataError("expected documents with text in them, found none; check the dataset")
        np.save(partial / "ends.npy", np.cumsum(lengths, dtype=np.int64))
        np.save(partial / "digests.npy", np.array(digests, np.uint64))
        description = {"dtype": np.dtype(dtype).name, "n_train": n_train}
        (partial / "store.json").write_text(json.dumps(description) + "\n")

    write_once(folder, write)
    return TokenStore.open(folder)


def in_memory(texts: Iterable[str], tokenizer: Tokenizer) -> TokenStore:
    """A store of a few documents, without files.

    >>> from longctx_layers.data.tokenizers import ByteTokenizer
    >>> store = in_memory(["one", "another"], ByteTokenizer())
    >>> len(store), store.document(0).tolist()
    (2, [111, 110, 101, 256])
    """
    documents = list(texts)
    encoded = [[*ids, tokenizer.end_of_text] for ids in tokenizer.encode_batch(documents)]
    return TokenStore(
        np.array(list(chain.from_iterable(encoded)), np.uint32),
        np.cumsum([len(ids) for ids in encoded], dtype=np.int64),
        np.array([digest(text) for text in documents], np.uint64),
        len(documents),
    )


def batches_of_text(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group documents into lists of about `CHARACTERS_AT_ONCE`; empty ones are left out."""
    batch: list[str] = []
    size = 0
    for text in filter(None, texts):
        batch.append(text)
        size += len(text)
        if size >= CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def first_characters(texts: Iterable[str], count: int) -> Iterator[str]:
    """The first documents, with `count` characters in all; the last one may be cut."""
    for text in texts:
        if count <= 0:
            return
        yield text[:count]
        count -= len(text)
