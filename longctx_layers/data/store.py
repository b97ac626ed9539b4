"""Tokenised documents: one run of ids, in memory or in a file that is mapped into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from longctx_layers.data.errors import DataError
from longctx_layers.data.tokenizers import Tokenizer
from longctx_layers.files import write_once

LAYOUT = 2  # raised when the files below change, so that older ones are not read
CHARACTERS_AT_ONCE = 1 << 20  # that are tokenised together


def content_key(*parts: str) -> str:
    """A short name for what these strings describe."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def digest(text: str) -> int:
    """64 bits that stand for a document's content; equal documents have equal ones."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class DamagedCacheError(ValueError):
    """A folder of the cache is not as it was written."""


class TokenStore:
    """Documents one after another, each with the end of text behind it.

    Attributes:
        tokens: `[n]` unsigned ids of all documents.
        ends: `[documents]` int64; document i is `tokens[ends[i - 1] : ends[i]]`.
        digests: `[documents]` uint64, see `digest`.
        n_train: documents from here on are of the source's own validation split.
    """

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, digests: np.ndarray, n_train: int):
        self.tokens, self.ends, self.digests, self.n_train = tokens, ends, digests, n_train
        self._folder: Path | None = None

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """A store that `prepare` wrote, mapped into memory.

        Raises:
            ValueError: if a file is missing or damaged, or they are not as long as each other says.
        """
        try:
            facts = json.loads((folder / "store.json").read_text())
            store = cls(
                np.memmap(folder / "tokens.bin", facts["dtype"], mode="r"),
                np.load(folder / "ends.npy"),
                np.load(folder / "digests.npy"),
                facts["n_train"],
            )
        except (FileNotFoundError, ValueError, EOFError, KeyError, TypeError) as error:
            raise _damaged(folder, str(error)) from error
        expected, found = len(store), len(store.digests)
        if (
            not 0 <= store.n_train <= expected
            or found != expected
            or np.any(np.diff(store.ends) < 1)
        ):
            raise _damaged(folder, f"an index of {expected} documents that contradicts itself")
        if len(store.tokens) != store.ends[-1]:
            raise _damaged(
                folder, f"{len(store.tokens)} tokens where its index says {store.ends[-1]}"
            )
        store._folder = folder
        return store

    def __reduce__(self) -> tuple:
        # A pickled map would be a copy of the whole file.
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
        """`[n]` ids of one document, the end of text last."""
        start = self.ends[number - 1] if number else 0
        return self.tokens[start : self.ends[number]]


def _damaged(folder: Path, what: str) -> DamagedCacheError:
    return DamagedCacheError(
        f"cache: expected whole tokenised data in {folder}, got {what}; remove that folder, and "
        "the next run tokenises again"
    )


def prepare(
    folder: Path, training: Iterable[str], validation: Iterable[str], tokenizer: Tokenizer
) -> TokenStore:
    """The store in `folder`; made from the documents, in bounded memory, if it is not there yet."""

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
        facts = {"dtype": np.dtype(dtype).name, "n_train": n_train}
        (partial / "store.json").write_text(json.dumps(facts) + "\n")

    write_once(folder, write)
    return TokenStore.open(folder)


def in_memory(texts: Iterable[str], tokenizer: Tokenizer) -> TokenStore:
    """A store of a few documents, without files."""
    documents = list(texts)
    encoded = [[*ids, tokenizer.end_of_text] for ids in tokenizer.encode_batch(documents)]
    return TokenStore(
        np.array(list(chain.from_iterable(encoded)), np.uint32),
        np.cumsum([len(ids) for ids in encoded], dtype=np.int64),
        np.array([digest(text) for text in documents], np.uint64),
        len(documents),
    )


def batches_of_text(texts: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of about `CHARACTERS_AT_ONCE`; those without text are left out."""
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
    """Documents up to a number of characters; the last one may be cut there."""
    for text in texts:
        if count <= 0:
            return
        yield text[:count]
        count -= len(text)
