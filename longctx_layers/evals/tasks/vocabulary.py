"""The token ids that memory tasks are written in: ids of their own, or a tokenizer's."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The marks as text. The question repeats the sentence that states the value.
TOLD = "\nThe pass key is "
OTHER = "\nAnother key is "
ASKED = "\nThe pass key is "
FILLER = "\n"
MOST_SYMBOLS = 128
FEWEST_SYMBOLS = 8
FEWEST_WORDS = 32  # with fewer, a tokenizer's letters and digits are used


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a task's symbols and marks.

    Attributes:
        size: all ids are below it; at most the model's vocab_size.
        symbols: ids that noise, keys and values are drawn from.
        told: the mark before the value to remember.
        other: the mark before a value that is not asked for.
        asked: the mark before the answer.
        filler: the id for positions without meaning.

    >>> Vocabulary(size=8, symbols=(0, 1, 2, 3), told=(4,), other=(5,), asked=(6,), filler=7).size
    8
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
                f"{max(used)}; pass the model's vocab_size as size"
            )
        if not (self.told and self.other and self.asked):
            raise ValueError("Vocabulary: expected marks of at least one id, got an empty mark")
        if len(set(self.symbols)) < len(self.symbols):
            raise ValueError("Vocabulary: expected distinct symbols, got a symbol twice")


SYNTHETIC = Vocabulary(132, tuple(range(128)), (128,), (129,), (130,), 131)


def text_vocabulary(
    encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str], size: int
) -> Vocabulary:
    """A vocabulary from a text tokenizer, so that a pretrained model meets familiar text.

    Marks are sentences (`The pass key is `, repeated to ask for the value). Symbols are tokens that
    are words of lower-case letters with the space before them; a tokenizer with fewer than 32 of
    those, such as one of bytes, contributes its letters and digits instead.

    Args:
        encode, decode: the tokenizer's, without special tokens.
        size: the model's vocab_size.

    Raises:
        ValueError: if the tokenizer has neither words nor letters.

    >>> vocabulary = text_vocabulary(lambda text: list(text.encode()), lambda i: chr(i[0]), 256)
    >>> len(vocabulary.symbols)
    62
    """
    texts = {i: decode([i]) for i in range(size)}
    words = [i for i, text in texts.items() if re.fullmatch(" [a-z]{2,}", text)]
    letters = [i for i, text in texts.items() if re.fullmatch("[a-zA-Z0-9]", text)]
    candidates = words if len(words) >= FEWEST_WORDS else letters
    symbols = [i for i in candidates if list(encode(texts[i])) == [i]]
    if len(symbols) < FEWEST_SYMBOLS:
        raise ValueError(
            f"tokenizer: expected at least {FEWEST_SYMBOLS} tokens that are one word or one "
            f"letter, got {len(symbols)}; memory tasks need a tokenizer of text"
        )
    told, other, asked, filler = (tuple(encode(text)) for text in (TOLD, OTHER, ASKED, FILLER))
    return Vocabulary(size, tuple(symbols[:MOST_SYMBOLS]), told, other, asked, filler[-1])
