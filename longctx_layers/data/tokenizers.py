"""Tokenizers: bytes, a BPE trained on the corpus, or any of Hugging Face's.

All of them know an end-of-text id, encode without special tokens and without truncation, and can be
saved into a folder from which `load_tokenizer` brings them back with nothing else.
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

from longctx_layers.data.errors import DataError
from longctx_layers.data.hub import from_hub

END_OF_TEXT = "<|endoftext|>"
MARK = "longctx_tokenizer"  # in the config of a tokenizer that is not Hugging Face's
# The end of text as the tokenizer that encodes spells it: Unicode's noncharacters are in no text.
UNWRITTEN = "\ufdd0\ufdd1\ufdd2\ufdd1\ufdd0"
BPE_VOCAB_SIZE = 4096
SMALLEST_BPE = 257  # 256 bytes and the end of text


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        vocab_size: ids are below it.
        end_of_text: the id between documents.
        fingerprint: equal for tokenizers that encode everything equally.
    """

    vocab_size: int
    end_of_text: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end of text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, `[n]`, without ends of text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; ends of text are left out."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what `load_tokenizer` needs into a folder."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 for the end of text. Needs no files and loses nothing."""

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
        """Write the same tokenizer as transformers reads it, and a mark that it is this one."""
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
    """One of transformers' tokenizers. Without an end of text of its own it is given one.

    Special tokens that are written out in a text, such as `<|im_start|>`, become their own ids, as
    they do in transformers. The end of text alone does not: only the end of a document gives it.
    """

    def __init__(self, tokenizer: Any):
        if tokenizer.eos_token_id is None:
            tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
        _separate_end_of_text(tokenizer)
        self.tokenizer = tokenizer
        # Not its length: the ids may have holes.
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        self.end_of_text: int = tokenizer.eos_token_id
        # The tokenizer's file may ask for truncation or padding.
        self._fast = tokenizer.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()
        content = self._fast.to_str()
        self._encoder, as_before = _without_end_of_text(content, tokenizer.eos_token)
        description = f"{content} {self.end_of_text}"
        if not as_before:
            description += " special tokens as ids"
        self.fingerprint = hashlib.blake2b(description.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        self._check(ids)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        batch = [one.ids for one in encoded]
        for ids in batch:
            self._check(ids)
        return [np.array(ids, np.int64) for ids in batch]

    def _check(self, ids: list[int]) -> None:
        if self.end_of_text in ids:
            raise DataError(
                "tokenizer: expected no end of text within a document, got it for text that the "
                f"vocabulary lacks, since {self.tokenizer.eos_token!r} is the unknown token too; "
                "choose another unknown token, or another tokenizer"
            )

    def decode(self, ids: Iterable[int]) -> str:
        kept = [i for i in map(int, ids) if i != self.end_of_text]
        text: str = self._fast.decode(kept, skip_special_tokens=False)
        return text

    def save(self, folder: str | os.PathLike[str]) -> None:
        self.tokenizer.save_pretrained(folder)


def _without_end_of_text(content: str, end: str) -> tuple[Any, bool]:
    """A tokenizer, from its JSON, that no text gives the end of text.

    Its spelling is replaced wherever text could match it: among the added tokens, and in the
    model's vocabulary, where a word, a piece or a merge may spell it. Ids stay as they are.

    Returns:
        The tokenizer, and whether it gives the same ids as one of which every special token is
        text like any other: that was the rule of earlier versions, whose stored tokens are then
        still right.
    """
    from tokenizers import Tokenizer as Fast

    changed = json.loads(content)
    model, as_before = changed["model"], True
    for token in changed["added_tokens"]:
        if token["content"] == end:
            token.update(content=UNWRITTEN, normalized=False)
        elif token["special"]:
            as_before = False
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {UNWRITTEN if one == end else one: i for one, i in vocabulary.items()}
    else:
        model["vocab"] = [[UNWRITTEN if one == end else one, p] for one, p in vocabulary]
    if model.get("unk_token") == end:
        model["unk_token"] = UNWRITTEN
    if model["type"] == "BPE":
        pairs = [one.split(" ") if isinstance(one, str) else one for one in model["merges"]]
        kept = [one for one in pairs if end not in (*one, "".join(one))]
        as_before &= len(kept) == len(pairs) and not model.get("ignore_merges")
        model["merges"] = kept
    elif end in dict(vocabulary):
        as_before = False
    return Fast.from_str(json.dumps(changed)), as_before


def _separate_end_of_text(tokenizer: Any) -> None:
    """Give the end of text an id of its own, where it shares that of another token.

    The library tokenizers numbers added tokens by the size of the vocabulary, which is the id of
    another token where the ids have holes. An id can be chosen in the model's own vocabulary only.

    Raises:
        DataError: if it cannot be chosen there, or if two other tokens share one.
    """
    from tokenizers import Tokenizer as Fast

    end, ids = tokenizer.eos_token, tokenizer.get_vocab()
    of_id: dict[int, list[str]] = {}
    for token, number in ids.items():
        of_id.setdefault(number, []).append(token)
    if clash := next((one for one in of_id.values() if len(one) > 1 and end not in one), None):
        raise DataError(
            f"tokenizer: expected an id for each token, got one for both {' and '.join(clash)}; "
            "add tokens under ids that are free"
        )
    if len(of_id[ids[end]]) == 1:
        return
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if not isinstance(content["model"].get("vocab"), dict):
        raise DataError(
            f"tokenizer: expected an id of its own for the end of text {end!r}, got that of "
            f"{' and '.join(one for one in of_id[ids[end]] if one != end)}; add it under another id"
        )
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] != end]
    content["model"]["vocab"][end] = max(of_id) + 1
    tokenizer._tokenizer = Fast.from_str(json.dumps(content))
    tokenizer.add_special_tokens({"eos_token": end})


def load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer by its name on the hub, or from a folder that `save` wrote.

    Raises:
        ConnectionError: for a name, if the hub is out of reach and its cache does not hold it.
        DataError: if there is no such tokenizer, or not one that `tokenizers` runs.
    """
    config = Path(name, "tokenizer_config.json")
    if config.is_file():
        known = json.loads(config.read_text())
        # Until version 0.1 the class said it.
        if "bytes" in (known.get(MARK), known.get("tokenizer_class")):
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
    except Exception as error:  # a folder may hold anything, and tokenizers raises bare ones
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
    """A byte-level BPE learnt from texts; any text can be encoded, and decodes to itself."""
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
    """Whether there can be such a tokenizer, before any data is touched.

    Raises:
        ValueError: for a misspelt `bytes` or `bpe`, or a BPE of an impossible size.
    """
    if Path(name).exists() and name:
        return
    kind, colon, size = name.partition(":")
    near = difflib.get_close_matches(kind, ("bytes", "bpe"), n=1)
    if kind == "bpe":
        fits = not colon or (size.isdecimal() and int(size) >= SMALLEST_BPE)
    else:
        fits = bool(name) and (name == "bytes" or not near)
    if not fits:
        raise ValueError(
            f"tokenizer: expected bytes, bpe, bpe:SIZE with a size of at least {SMALLEST_BPE}, or "
            f"the name or folder of one of Hugging Face's, got {name!r}"
        )


def bpe_vocab_size(name: str) -> int | None:
    """The size that `bpe` or `bpe:SIZE` asks for, None for another tokenizer."""
    kind, _, size = name.partition(":")
    return None if kind != "bpe" else int(size or BPE_VOCAB_SIZE)
