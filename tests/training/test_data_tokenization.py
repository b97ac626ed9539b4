"""Tokenizers lose no text, and anybody's can be used."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from training import hub
from training.tokenization import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    bpe_vocab_size,
    check_tokenizer,
    load_tokenizer,
    train_bpe,
)
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["a text with words, and more words\n"] * 3, 265)


@given(text=st.text(max_size=40))
def test_any_text_comes_back(text, bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        (batch,) = tokenizer.encode_batch([text])
        assert batch.tolist() == ids
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.end_of_text for i in ids)
        assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text


def test_bpe_is_shorter_and_has_its_size(bpe):
    assert bpe.vocab_size == 265
    assert len(bpe.encode("words and words")) < len("words and words")


def words() -> Tokenizer:
    fast = Tokenizer(models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast


def test_a_tokenizers_own_truncation_and_padding_are_off(tmp_path):
    fast = words()
    fast.enable_truncation(4)
    fast.enable_padding(length=8)
    PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="?").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is not None
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("one two " * 5) == [0, 1] * 5
    assert np.concatenate(tokenizer.encode_batch(["one", "two " * 9])).tolist() == [0] + [1] * 9


def test_a_missing_end_of_text_is_added(tmp_path):
    tokenizer = HuggingFaceTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=words(), unk_token="?")
    )
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (4, 3)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_fingerprints_tell_tokenizers_apart(bpe):
    other = train_bpe(["a text with other words"] * 3, 265)
    assert len({bpe.fingerprint, other.fingerprint, ByteTokenizer().fingerprint}) == 3


def test_names():
    assert [bpe_vocab_size(name) for name in ("bpe", "bpe:300", "gpt2")] == [4096, 300, None]
    for name in ("bytes", "bpe", "bpe:257", "gpt2", "openai-community/gpt2"):
        check_tokenizer(name)


def test_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(ConnectionError, match="'no/such' is not on this machine.*bytes, bpe or"):
        load_tokenizer("no/such")
    with pytest.raises(ValueError, match="tokenizer: expected bytes, bpe, bpe:SIZE, a name"):
        load_tokenizer(tmp_path)
