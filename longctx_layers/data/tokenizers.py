"""Tokenizers: bytes, a BPE trained on the corpus, or any of Hugging Face's.

All of them have an end-of-text id, encode without special tokens and without truncation, and can be
saved into a folder, from which `load_tokenizer` loads them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from longctx_layers.data.end_of_text import separate_end_of_text, without_end_of_text
from longctx_layers.data.errors import DataError
from longctx_layers.data.hub import from_hub

END_OF_TEXT = "<|endoftext|>"
MARK = "longctx_tokenizer"  # a key in the config of a tokenizer that is not Hugging Face's
BPE_VOCAB_SIZE = 4096
SMALLEST_BPE = 257  # 256 bytes and the end of text


class Tokenizer(Protocol):
    """What a tokenizer must have to be used here: text to ids and back.

    Attributes:
        vocab_size: all ids are below it.
        end_of_text: the id between documents.
        fingerprint: equal for tokenizers that encode everything equally.
    """

    vocab_size: int
    end_of_text: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without the end of text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, `[n]`, without the end of text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; ends of text are left out."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what `load_tokenizer` needs into a folder."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 for the end of text. It needs no files and loses nothing.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né"), tokenizer.decode([110, 195, 169, 256])
    ([110, 195, 169], 'né')
    """

    vocab_size = 257
    end_of_text = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write an equal tokenizer that transformers can read, marked as this one."""
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers

        # Byte-level models write each byte as a printable character.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        vocabulary = {chr(byte): byte for byte in printable}
        vocabulary |= {chr(256 + place): byte for place, byte in enumerate(others)}
        fast = Fast(models.BPE(vocab=vocabulary, merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
        fast.add_special_tokens([END_OF_TEXT])
        Path(folder).mkdir(parents=True, exist_ok=True)
        fast.save(str(Path(folder, "tokenizer.json")))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            MARK: "bytes",
        }
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class HuggingFaceTokenizer:
    """One of transformers' tokenizers; if it has no end of text, one is added.

    Special tokens that are written out in a text, such as `<|im_start|>`, become their ids, as in
    transformers. The end of text is the exception: only the end of a document becomes its id.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Raises:
        DataError: if the end of text cannot have an id of its own.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
        separate_end_of_text(tokenizer)
        self.tokenizer = tokenizer
        # Not the number of ids, which may have gaps.
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        self.end_of_text: int = tokenizer.eos_token_id
        # The tokenizer's file may ask for truncation or padding.
        self._fast = tokenizer.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()
        content = self._fast.to_str()
        self._encoder, encodes_as_text = without_end_of_text(content, tokenizer.eos_token)
        description = f"{content} {self.end_of_text}"
        if not encodes_as_text:
            description += " special tokens as ids"
        self.fingerprint = hashlib.blake2b(description.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        self._check(ids)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        batch = [encoding.ids for encoding in encoded]
        for ids in batch:
            self._check(ids)
        return [np.array(ids, np.int64) for ids in batch]

    def _check(self, ids: list[int]) -> None:
        if self.end_of_text in ids:
            raise DataError(
                "tokenizer: expected no end of text within a document, got it for text that the "
                f"vocabulary lacks, since {self.tokenizer.eos_token!r} is also the unknown token; "
                "choose another unknown token, or another tokenizer"
            )

    def decode(self, ids: Iterable[int]) -> str:
        without_ends = [i for i in map(int, ids) if i != self.end_of_text]
        text: str = self._fast.decode(without_ends, skip_special_tokens=False)
        return text

    def save(self, folder: str | os.PathLike[str]) -> None:
        self.tokenizer.save_pretrained(folder)


def load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer by its name on the hub, or from a folder that `save` wrote.

    Raises:
        ConnectionError: for a name, if the hub is out of reach and its cache does not hold it.
        DataError: if there is no such tokenizer, or it is not a fast one.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> ByteTokenizer().save(folder)
    >>> load_tokenizer(folder).vocab_size
    257
    """
    config = Path(name, "tokenizer_config.json")
    if config.is_file():
        content = json.loads(config.read_text())
        # Before version 0.1 the class was the mark.
        if "bytes" in (content.get(MARK), content.get("tokenizer_class")):
            return ByteTokenizer()
    from transformers import AutoTokenizer

    def load() -> Any:
        return AutoTokenizer.from_pretrained(name)

    try:
        if Path(name).exists():
            tokenizer = load()
        else:
            tokenizer = from_hub(load, f"tokenizer {str(name)!r}", "bytes, bpe or a local folder")
    except ConnectionError:
        raise
    except Exception as error:  # a folder may hold anything, and tokenizers raises plain ones
        raise DataError(
            f"tokenizer: expected bytes, bpe, bpe:SIZE, a name on the Hugging Face hub or a folder "
            f"with a saved tokenizer, got {str(name)!r}: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer: {str(name)!r} has no tokenizer.json that the library tokenizers can run; "
            "convert it, or use bytes, bpe or another one"
        )
    return HuggingFaceTokenizer(tokenizer)


def train_bpe(texts: Iterable[str], vocab_size: int = BPE_VOCAB_SIZE) -> HuggingFaceTokenizer:
    """Train a byte-level BPE on texts; it encodes any text, which decodes to itself.

    >>> tokenizer = train_bpe(["the cat and the dog"] * 9, vocab_size=270)
    >>> len(tokenizer.encode("the cat")) < 7, tokenizer.decode(tokenizer.encode("the cat"))
    (True, 'the cat')
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=fast, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
        )
    )


def check_tokenizer(name: str) -> None:
    """Check that there can be such a tokenizer, before any data is read.

    Raises:
        ValueError: for a misspelt `bytes` or `bpe`, or a BPE of an impossible size.

    >>> check_tokenizer("bpe:8000")
    """
    if Path(name).exists() and name:
        return
    kind, colon, size = name.partition(":")
    near = difflib.get_close_matches(kind, ("bytes", "bpe"), n=1)
    if kind == "bpe":
        valid = not colon or (size.isdecimal() and int(size) >= SMALLEST_BPE)
        near = []
    else:
        valid = bool(name) and (name == "bytes" or not near)
    if not valid:
        raise ValueError(
            f"tokenizer: expected bytes, bpe, bpe:SIZE with a size of at least {SMALLEST_BPE}, or "
            f"the name or folder of one of Hugging Face's, got {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )


def bpe_vocab_size(name: str) -> int | None:
    """The vocabulary size for `bpe` or `bpe:SIZE`; None for other tokenizers.

    >>> bpe_vocab_size("bpe:8000"), bpe_vocab_size("bytes")
    (8000, None)
    """
    kind, _, size = name.partition(":")
    return None if kind != "bpe" else int(size or BPE_VOCAB_SIZE)
