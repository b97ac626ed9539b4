"""Data for language models: documents in, packed batches of tokens out.

`LongContextData` is the whole pipeline: a source of documents, a tokenizer, a store of tokens on
disk (or a stream), and loaders of packed batches that resume at any batch. Its parts can be used by
themselves: `open_source` and `texts` for documents, `load_tokenizer` and `ByteTokenizer`, `prepare`
for a store, `Epoch` for batches.

>>> from longctx_layers.data import ByteTokenizer, open_source, texts
>>> document = next(texts(open_source("synthetic", "10").training))
>>> len(ByteTokenizer().encode(document)) == len(document)
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longctx_layers.data.errors import DataError, ResumptionError
    from longctx_layers.data.module import LongContextData
    from longctx_layers.data.packing import Epoch, Shape
    from longctx_layers.data.sources import Source, open_source, register_source, texts
    from longctx_layers.data.store import DamagedCacheError, TokenStore, prepare
    from longctx_layers.data.tokenizers import (
        ByteTokenizer,
        HuggingFaceTokenizer,
        Tokenizer,
        load_tokenizer,
        train_bpe,
    )

__all__ = [
    "LongContextData",
    "Source",
    "open_source",
    "register_source",
    "texts",
    "Tokenizer",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "load_tokenizer",
    "train_bpe",
    "TokenStore",
    "prepare",
    "Epoch",
    "Shape",
    "DataError",
    "ResumptionError",
    "DamagedCacheError",
]

# Imported on first use: the data module needs Lightning, the other parts do not.
_MODULES = {
    "module": ("LongContextData",),
    "sources": ("Source", "open_source", "register_source", "texts"),
    "tokenizers": (
        "Tokenizer",
        "ByteTokenizer",
        "HuggingFaceTokenizer",
        "load_tokenizer",
        "train_bpe",
    ),
    "store": ("TokenStore", "prepare", "DamagedCacheError"),
    "packing": ("Epoch", "Shape"),
    "errors": ("DataError", "ResumptionError"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
