"""Token ids that memory tasks are written in: a vocabulary of their own, or a tokenizer's."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TOLD, OTHER, ASKED, FILLER = "\nThe pass key is ", "\nAnother key is ", "\nThe pass key is ", "\n"
MOST_SYMBOLS = 128
FEWEST_SYMBOLS = 8


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a task's symbols and marks.

    Attributes:
        size: ids are below it: the model's vocab_size, or less.
        symbols: ids that noise, keys and values are drawn from.
        told: what stands before the value to remember.
        other: what stands before a value that is not asked for.
        asked: what stands before the answer.
        filler: the id of a place without meaning.
    """

    size: int
    symbols: tuple[int, ...]
    told: tuple[int, ...]
    other: tuple[int, ...]
    asked: tuple[int, ...]
    filler: int

    def __post_init__(self) -> None:
        used = {*self.symbols, *self.told, *self.other, *self.asked, self.filler}
        if min(used) < 0 or max(used) >= self.size:
            raise ValueError(
                f"Vocabulary: expected ids in [0, {self.size}), got ids from {min(used)} to "
                f"{max(used)}; give the model's vocab_size as size"
            )
        if not (self.told and self.other and self.asked):
            raise ValueError("Vocabulary: expected marks of at least one id, got an empty one")
        if len(set(self.symbols)) < len(self.symbols):
            raise ValueError("Vocabulary: expected distinct symbols, got one of them twice")


SYNTHETIC = Vocabulary(132, tuple(range(128)), (128,), (129,), (130,), 131)


def text_vocabulary(
    encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str], size: int
) -> Vocabulary:
    """The tasks in the ids of a text tokenizer, so that they are text a model may have met.

    Marks are sentences (`The pass key is `, and the same again to ask for it). Symbols are tokens
    that are words of lower-case letters, with the space before them; a tokenizer that has fewer
    than 32 such words (one of bytes) gives its letters and digits instead.

    Args:
        encode, decode: the tokenizer's, without special tokens.
        size: the model's vocab_size.

    Raises:
        ValueError: if the tokenizer has neither.
    """
    texts = {i: decode([i]) for i in range(size)}
    words = [i for i, text in texts.items() if re.fullmatch(" [a-z]{2,}", text)]
    letters = [i for i, text in texts.items() if re.fullmatch("[a-zA-Z0-9]", text)]
    symbols = [i for i in (words if len(words) >= 32 else letters) if list(encode(texts[i])) == [i]]
    if len(symbols) < FEWEST_SYMBOLS:
        raise ValueError(
            f"tokenizer: expected at least {FEWEST_SYMBOLS} tokens that are one word or one "
            f"letter, got {len(symbols)}; these tasks need a tokenizer of text"
        )
    told, other, asked, filler = (tuple(encode(text)) for text in (TOLD, OTHER, ASKED, FILLER))
    return Vocabulary(size, tuple(symbols[:MOST_SYMBOLS]), told, other, asked, filler[-1])
