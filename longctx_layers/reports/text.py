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

SHORTEST = 64  # tokens: below, a loss by position says nothing
CHARACTERS = 16  # of a token, more than most have
FEWEST, LOOKED_AT = 2, 256  # documents


class Text(NamedTuple):
    """Documents, and where they come from, in words."""

    documents: list[str]
    source: str


def held_out(options: Mapping[str, Any], **given: Any) -> Text:
    """The documents that a training with these options of the data held out.

    Args:
        options: of `LongContextData`, as config.yaml has them; those it does not know are left out.
        given: take precedence, None apart.

    Raises:
        ConnectionError, ValueError: if the data cannot be had, or none was held out.
    """
    known = inspect.signature(LongContextData).parameters
    chosen = {name: value for name, value in options.items() if name in known}
    chosen |= {name: value for name, value in given.items() if value is not None}
    if not chosen.get("dataset_name"):
        raise ValueError("the data of its training are not known; name some with --dataset_name")
    for name in ("num_workers", "persistent_workers"):
        chosen.pop(name, None)
    data = LongContextData(**chosen)
    data.setup("fit")
    documents = [
        data.tokenizer.decode(data.store.document(number))
        for number in islice(data.validation, LOOKED_AT)
    ]
    if not documents:
        raise ValueError(f"no document of {data.dataset_name} is held out")
    name = " ".join(filter(None, [data.dataset_name, data.dataset_config]))
    return Text(documents, f"held-out documents of {name}")


def encoded(documents: Sequence[str], tokenizer: Tokenizer, longest: int, count: int) -> Tensor:
    """The beginnings of the first documents that are long enough, all of one length.

    The length is the largest power of two up to `longest` that `count` documents have, or half of
    them where there are not so many.

    Returns:
        `[n, T + 1]` int64 ids, n <= count.

    Raises:
        ValueError: if fewer than two documents have so many as 64 tokens.
    """
    ids = [_beginning(text, tokenizer, longest) for text in documents]
    length = 1 << (longest.bit_length() - 1)
    while length >= SHORTEST:
        long_enough = [one for one in ids if len(one) > length]
        wanted = min(count, max(FEWEST, len(ids) // 2))
        if len(long_enough) >= wanted:
            return torch.tensor([one[: length + 1] for one in long_enough[:count]])
        length //= 2
    raise ValueError(
        f"expected at least {FEWEST} held-out documents of {SHORTEST} tokens, got "
        f"{len(ids)} documents, the longest of {max(map(len, ids))}; take other data"
    )


def _beginning(text: str, tokenizer: Tokenizer, longest: int) -> list[int]:
    """The ids of a text, without most of what goes beyond `longest` tokens."""
    part = text[: CHARACTERS * (longest + 1)]
    ids = tokenizer.encode(part)
    return ids if len(part) < len(text) else [*ids, tokenizer.end_of_text]
