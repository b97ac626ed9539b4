"""Text that a model has not seen: the documents that its training held out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx_layers.data.module import LongContextData
from longctx_layers.data.tokenizers import Tokenizer

SHORTEST = 64  # tokens: a loss by position is meaningless for less
CHARACTERS = 16  # more characters than most tokens have
FEWEST_DOCUMENTS = 2
MOST_DOCUMENTS = 256


class Text(NamedTuple):
    """Documents, and where they come from, in words."""

    documents: list[str]
    source: str


def held_out(options: Mapping[str, Any], **overrides: Any) -> Text:
    """The documents that a training with these options of the data held out.

    Args:
        options: of `LongContextData`, as in config.yaml; unknown ones are ignored.
        overrides: options that take precedence unless they are None.

    Raises:
        ConnectionError, ValueError: if the data are not available, or none was held out.
    """
    known = inspect.signature(LongContextData).parameters
    chosen = {name: value for name, value in options.items() if name in known}
    chosen |= {name: value for name, value in overrides.items() if value is not None}
    if not chosen.get("dataset_name"):
        raise ValueError("the data of its training are not known; name some with --dataset_name")
    for name in ("num_workers", "persistent_workers"):
        chosen.pop(name, None)
    data = LongContextData(**chosen)
    data.setup("fit")
    documents = [
        data.tokenizer.decode(data.store.document(int(number)))
        for number in islice(data.validation, MOST_DOCUMENTS)
    ]
    if not documents:
        raise ValueError(f"{data.dataset_name} has no held-out document")
    name = " ".join(filter(None, [data.dataset_name, data.dataset_config]))
    return Text(documents, f"held-out documents of {name}")


def encoded(documents: Sequence[str], tokenizer: Tokenizer, longest: int, count: int) -> Tensor:
    """The beginnings of the first documents that are long enough, all of the same length.

    The length is the largest power of two up to `longest` that `count` documents have, or half of
    the documents if there are fewer.

    Returns:
        `[n, T + 1]` int64 ids, n <= count.

    Raises:
        ValueError: if fewer than two documents have 64 tokens.
    """
    ids = [_beginning(text, tokenizer, longest) for text in documents]
    needed = min(count, max(FEWEST_DOCUMENTS, len(ids) // 2))
    length = 1 << (longest.bit_length() - 1)
    while length >= SHORTEST:
        long_enough = [document for document in ids if len(document) > length]
        if len(long_enough) >= needed:
            return torch.tensor([document[: length + 1] for document in long_enough[:count]])
        length //= 2
    raise ValueError(
        f"expected at least {FEWEST_DOCUMENTS} held-out documents of {SHORTEST} tokens, got "
        f"{len(ids)} documents, the longest of {max(map(len, ids))}; use other data"
    )


def _beginning(text: str, tokenizer: Tokenizer, longest: int) -> list[int]:
    """The ids of a text, without most of those after the first `longest`."""
    part = text[: CHARACTERS * (longest + 1)]
    ids = tokenizer.encode(part)
    return ids if len(part) < len(text) else [*ids, tokenizer.end_of_text]
