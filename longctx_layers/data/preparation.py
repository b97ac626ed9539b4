"""Steps of preparing data: checks of options, the cache, and the tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

from longctx_layers.data.keys import content_key
from longctx_layers.data.sources import Source
from longctx_layers.data.split import training_texts
from longctx_layers.data.store import first_characters
from longctx_layers.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    bpe_vocab_size,
    load_tokenizer,
    train_bpe,
)
from longctx_layers.files import write_once

BPE_CHARACTERS = 100_000_000  # of the training documents that a BPE is trained on


def check_least(least: int, **options: int | None) -> None:
    """Raise ValueError for the first option below `least`; None is allowed.

    >>> check_least(1, batch_size=8, seq_len=None)
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def default_cache() -> Path:
    """The default of `cache_dir`: a folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "longctx-layers"


def make_tokenizer(
    name: str, source: Source, cache: Path, seed: int, validation_fraction: float
) -> Tokenizer:
    """Load the tokenizer of a name; `bpe` is trained on the training documents, once.

    Args:
        name: `bytes`, `bpe`, `bpe:SIZE`, or one of Hugging Face's.
        source: the documents.
        cache: the folder in which trained tokenizers are kept.
        seed, validation_fraction: of the split, since held-out documents are not trained on.
    """
    if name == "bytes":
        return ByteTokenizer()
    size = bpe_vocab_size(name)
    if size is None:
        return load_tokenizer(name)
    choices = f"{size} {BPE_CHARACTERS} {seed} {validation_fraction}"
    folder = cache / f"bpe-{content_key(source.fingerprint, choices)}"
    texts = training_texts(source, seed, validation_fraction)
    write_once(
        folder,
        lambda partial: train_bpe(first_characters(texts, BPE_CHARACTERS), size).save(partial),
    )
    return load_tokenizer(folder)
