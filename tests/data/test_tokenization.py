"""Tokenizers lose no text, and anybody's can be used."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, CanineTokenizer, PreTrainedTokenizerFast

from longctx_layers.data import hub
from longctx_layers.data.errors import DataError
from longctx_layers.data.store import prepare
from longctx_layers.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    bpe_vocab_size,
    check_tokenizer,
    load_tokenizer,
    train_bpe,
)


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


# ---- Special tokens that are written out in a text


def chat():
    fast = Tokenizer(models.BPE({one: i for i, one in enumerate("<|imstar>ned")}, merges=[]))
    fast.add_special_tokens(["<|im_start|>", "<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>")


def test_special_tokens_but_the_end_of_text_have_their_ids(tmp_path):
    theirs = chat()
    theirs.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    theirs.save_pretrained(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    start, end = theirs.convert_tokens_to_ids(["<|im_start|>", "<|end|>"])
    turns = [{"role": "user", "content": "start"}] * 2
    expected = theirs.apply_chat_template(turns, tokenize=True, return_dict=False)
    text = theirs.apply_chat_template(turns, tokenize=False)
    assert ours.encode(text) == ours.encode_batch([text])[0].tolist() == expected
    assert expected.count(start) == 2
    ids = ours.encode("start<|end|>")
    assert (ours.end_of_text, end in ids) == (end, False)
    assert ids[:5] == ours.encode("start")
    assert len(ids) == len("start<|end|>")


WRITTEN = {
    "a piece": (models.Unigram([("?", -9.0), ("</s>", 0.0), ("one", -1.0), ("<", -2.0)], 0), [2]),
    "a word": (models.WordLevel({"?": 0, "</s>": 1, "one": 2}, unk_token="?"), [2, 0]),
    "a piece of a word": (models.WordPiece({"?": 0, "</s>": 1, "one": 2}, unk_token="?"), [2, 0]),
    "a merge": (
        models.BPE({"<": 0, "/s": 1, "</s>": 2, "/": 3, "s": 4, ">": 5, "s>": 6, "</": 7},
                   [("<", "/"), ("s", ">"), ("</", "s>")]),
        [7, 6],
    ),
    "all of a word": (models.BPE({"<": 0, "/": 1, "s": 2, ">": 3, "</s>": 4}, [],
                                 ignore_merges=True), [0, 1, 2, 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_no_text_gives_the_end_of_text_whatever_the_model(name, tmp_path):
    """Nor where the model's own vocabulary spells it."""
    model, expected = WRITTEN[name]
    fast = Tokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_text == fast.token_to_id("</s>")
    text = "</s>" if name in ("a merge", "all of a word") else "one </s>"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text not in ids
    assert ids[: len(expected)] == expected
    assert tokenizer.encode_batch([text])[0].tolist() == ids


def test_an_end_of_text_that_is_the_unknown_token_is_refused(tmp_path):
    fast = Tokenizer(models.WordLevel({"one": 0, "</s>": 1}, unk_token="</s>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = HuggingFaceTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")
    )
    assert tokenizer.encode("one one") == [0, 0]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(DataError, match="'</s>' is also the unknown token; choose another"):
            encode("one two")


def test_tokens_that_were_stored_under_another_rule_are_not_used(bpe):
    """Their key has the fingerprint; where both rules give the same ids it is the former one."""

    def former(tokenizer):
        description = f"{tokenizer.tokenizer.backend_tokenizer.to_str()} {tokenizer.end_of_text}"
        return hashlib.blake2b(description.encode(), digest_size=16).hexdigest()

    assert bpe.fingerprint == former(bpe)
    other = HuggingFaceTokenizer(chat())
    assert other.fingerprint != former(other)
    one = Tokenizer(models.WordLevel({"one": 0, "</s>": 1}, unk_token="one"))
    other = HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=one, eos_token="</s>"))
    assert other.fingerprint != former(other)


# ---- Vocabularies with holes


def saved(folder, vocabulary, **special):
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="?", **special).save_pretrained(folder)
    return folder


HOLES = {
    "own end": ({"?": 0, "one": 1, "two": 12, "</s>": 3}, {"eos_token": "</s>"}),
    "none, and its id is another's": ({"?": 0, "one": 1, "x": 2, "two": 4, "y": 3}, {}),
    "none in a hole": ({"?": 0, "one": 1, "x": 2, "two": 4}, {}),
    "of no entry, and its id is another's": ({"?": 0, "one": 1, "two": 3}, {"eos_token": "</s>"}),
}


@pytest.mark.parametrize("name", HOLES)
def test_every_id_is_below_the_size_and_one_tokens_own(name, tmp_path):
    vocabulary, special = HOLES[name]
    tokenizer = load_tokenizer(saved(tmp_path / "first", vocabulary, **special))
    tokenizer.save(tmp_path / "again")
    for one in (tokenizer, load_tokenizer(tmp_path / "again")):
        assert one.encode("one two") == [vocabulary["one"], vocabulary["two"]]
        assert one.end_of_text not in one.encode("one two ?")
        assert one.decode([*one.encode("one two"), one.end_of_text]) == "one two"
        assert one.vocab_size == max(*vocabulary.values(), one.end_of_text) + 1
        assert one.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(("last", "end", "size"), [(264, 265, 266), (70_000, 264, 70_001)])
def test_a_bpe_with_holes(tmp_path, bpe, last, end, size):
    bpe.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    del vocabulary["<|endoftext|>"]  # the first, so that the last has the number of all
    content["added_tokens"] = []
    vocabulary[max(vocabulary, key=vocabulary.get)] = last
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    holes = load_tokenizer(tmp_path)
    text = "words and more words"
    assert holes.decode([*holes.encode(text), holes.end_of_text]) == text
    assert (holes.end_of_text, holes.vocab_size) == (end, size)


def test_two_other_tokens_must_not_share_an_id(tmp_path):
    folder = saved(tmp_path, {"?": 0, "one": 1, "two": 3}, pad_token="<pad>")
    with pytest.raises(DataError, match="one for both (<pad> and two|two and <pad>)"):
        load_tokenizer(folder)


def test_ids_above_the_range_of_16_bits_are_stored(tmp_path):
    vocabulary = {"?": 0, "one": 1, "two": 70_000, "</s>": 2}
    tokenizer = load_tokenizer(saved(tmp_path / "t", vocabulary, eos_token="</s>"))
    store = prepare(tmp_path / "store", ["one two one"], [], tokenizer)
    assert store.document(0).tolist() == [1, 70_000, 1, 2]


def test_a_folder_that_holds_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer: expected bytes, bpe, bpe:SIZE, a name"):
        load_tokenizer(tmp_path)
    CanineTokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(DataError, match=r"no tokenizer.json that the library tokenizers can run"):
        load_tokenizer(tmp_path / "slow")


# ---- As transformers reads them


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_transformers_reads_what_is_saved(kind, bpe, tmp_path):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.end_of_text
    assert len(theirs) == tokenizer.vocab_size
    text = "Don 't clean , this .\r\n\t\0é \N{EURO SIGN} \U0001f600" + "".join(map(chr, range(256)))
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_tokenizer_of_bytes_of_an_earlier_version(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "bytes"}')
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
