"""The token store: whole or absent, made once, mapped; and the split of its documents."""

import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx_layers.data.split import is_held_out, split
from longctx_layers.data.store import in_memory, prepare
from longctx_layers.data.tokenizers import ByteTokenizer, train_bpe
from longctx_layers.files import StorageError, write_once

texts = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["some words that are learnt, some words"] * 3, 300)


@given(texts=texts)
def test_documents_come_back(texts, tmp_path_factory, bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        folder = tmp_path_factory.mktemp("store") / "tokens"
        store = prepare(folder, texts, [], tokenizer)
        assert [tokenizer.decode(store.document(i)) for i in range(len(store))] == texts
        assert store.ends[-1] == len(store.tokens)
        assert store.lengths(np.arange(len(store))).sum() == len(store.tokens)
        for number in range(len(store)):
            assert store.document(number)[-1] == tokenizer.end_of_text
        memory = in_memory(texts, tokenizer)
        assert (memory.tokens == store.tokens).all()
        assert (memory.digests == store.digests).all()


def test_a_large_vocabulary_needs_more_bytes(tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = (1 << 16) + 1
    assert prepare(tmp_path / "wide", ["a"], [], tokenizer).tokens.dtype == np.uint32
    assert prepare(tmp_path / "narrow", ["a"], [], ByteTokenizer()).tokens.dtype == np.uint16


def test_made_once_and_mapped(tmp_path):
    made = prepare(tmp_path / "tokens", ["one", "two"], ["three"], ByteTokenizer())

    def never():
        raise AssertionError("tokenised again")
        yield

    again = prepare(tmp_path / "tokens", never(), never(), ByteTokenizer())
    assert isinstance(again.tokens, np.memmap)
    assert (again.tokens == made.tokens).all()
    assert again.n_train == 2
    sent = pickle.dumps(again)
    assert len(sent) < 500  # its place, not its tokens
    assert isinstance(pickle.loads(sent).tokens, np.memmap)


@pytest.mark.parametrize("damaged", ["tokens.bin", "ends.npy", "digests.npy", "store.json"])
@pytest.mark.parametrize("left", ["one less", "half", "none", "no file"])
def test_damaged_files_are_noticed(damaged, left, tmp_path):
    prepare(tmp_path / "tokens", ["one", "two"], ["three"], ByteTokenizer())
    path = tmp_path / "tokens" / damaged
    size = path.stat().st_size
    if left == "no file":
        path.unlink()
    else:
        # The last byte of the facts is the end of a line.
        less = 2 if damaged == "store.json" else 1
        os.truncate(path, {"one less": size - less, "half": size // 2, "none": 0}[left])
    with pytest.raises(ValueError, match="expected complete tokenised data .*remove that folder"):
        prepare(tmp_path / "tokens", [], [], ByteTokenizer())


def test_longer_tokens_and_another_index_are_noticed(tmp_path):
    for name, text in (("one", "one"), ("other", "quite another")):
        prepare(tmp_path / name, [text], [], ByteTokenizer())
    shutil.copy(tmp_path / "other/tokens.bin", tmp_path / "one/tokens.bin")
    with pytest.raises(ValueError, match="14 tokens where its index says 4"):
        prepare(tmp_path / "one", [], [], ByteTokenizer())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_unwritable_cache_is_named(code, tmp_path, monkeypatch):
    def fail(partial):
        (partial / "half").touch()
        raise OSError(code, os.strerror(code))

    folder = tmp_path / "new/tokens"
    with pytest.raises(StorageError, match=f"could not write {folder} .*{os.strerror(code)}"):
        write_once(folder, fail)
    assert [path.name for path in folder.parent.iterdir()] == [".tokens.lock"]


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        prepare(tmp_path / "tokens", ["", ""], [], ByteTokenizer())
    assert not (tmp_path / "tokens").exists()


PREPARATION = """
import sys, time
from pathlib import Path
from longctx_layers.data.store import prepare
from longctx_layers.data.tokenizers import ByteTokenizer

def documents():
    for number in range(40):
        yield f"{{number}} " * 300_000  # more than is tokenised together
        if number == {stop_at}:
            print("half", flush=True)
            time.sleep(60)

prepare(Path({folder!r}), documents(), [], ByteTokenizer())
"""


def test_killed_in_the_middle(tmp_path):
    """Nothing that looks finished is left, and the next preparation is complete and tidies up."""
    folder = tmp_path / "tokens"
    code = PREPARATION.format(folder=str(folder), stop_at=20)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not folder.exists()
    (partial,) = tmp_path.glob(".tokens.partial-*")
    assert (partial / "tokens.bin").stat().st_size > 1 << 20
    store = prepare(folder, ["whole"], [], ByteTokenizer())
    assert ByteTokenizer().decode(store.document(0)) == "whole"
    assert not list(tmp_path.glob("*partial*"))


def test_a_failed_preparation_leaves_nothing(tmp_path):
    def broken():
        yield "a" * 3_000_000
        raise OSError("the disk has gone")

    with pytest.raises(OSError, match="gone"):
        prepare(tmp_path / "tokens", broken(), [], ByteTokenizer())
    assert [path.name for path in tmp_path.iterdir()] == [".tokens.lock"]


def _write_slowly(folder: Path, name: str, log: Path) -> None:
    def write(partial: Path) -> None:
        with log.open("a") as file:
            file.write(name + "\n")
        for number in range(20):
            (partial / f"{number}").write_text(name)
            time.sleep(0.01)

    write_once(folder, write)
    assert {path.read_text() for path in folder.iterdir()} <= {"first", "second"}


def test_two_at_once(tmp_path):
    """One writes, the other waits and finds the whole folder."""
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_write_slowly, args=(tmp_path / "folder", name, log))
        for name in ("first", "second")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    (writer,) = log.read_text().split()
    files = list((tmp_path / "folder").iterdir())
    assert len(files) == 20
    assert {path.read_text() for path in files} == {writer}


# ---- The split


def split_texts(documents: list[str], seed: int, fraction: float):
    store = in_memory(documents, ByteTokenizer())
    training, validation = split(store, seed, fraction)
    return [documents[i] for i in training], [documents[i] for i in validation]


@given(texts, st.integers(0, 5), st.sampled_from([0.01, 0.3, 0.6]))
def test_split_is_by_content(documents, seed, fraction):
    documents = documents + documents[:3]  # duplicates
    if len(set(documents)) < 2:
        return
    try:
        training, validation = split_texts(documents, seed, fraction)
    except ValueError:  # all of a few were drawn
        assert all(is_held_out(text, seed, fraction) for text in documents)
        return
    assert sorted(training + validation) == sorted(documents)
    assert not set(training) & set(validation)
    assert validation
    # Neither order nor company matters, but that there is at least one.
    assert set(split_texts(documents[::-1], seed, fraction)[1]) == set(validation)
    drawn = {text for text in documents if is_held_out(text, seed, fraction)}
    assert drawn <= set(validation)
    assert len(set(validation) - drawn) <= (0 if drawn else 1)


def test_split_has_its_size_and_its_seed():
    documents = [f"document {number}" for number in range(4000)]
    _, first = split_texts(documents, 0, 0.1)
    _, second = split_texts(documents, 1, 0.1)
    for validation in (first, second):
        assert abs(len(validation) - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5  # five deviations
    assert set(first) != set(second)
    assert split_texts(documents, 0, 0.0)[1] == []


def test_a_split_of_the_source_is_kept():
    documents = ["one", "two", "three", "two", "four"]
    store = in_memory(documents, ByteTokenizer())
    store.n_train = 3
    training, validation = split(store, 0, 0.3)
    assert validation.tolist() == [3, 4]
    assert training.tolist() == [0, 2]  # "two" would be learnt by heart


def test_nothing_left_to_train_on():
    with pytest.raises(ValueError, match="validation_fraction: none of the 2 documents is left"):
        split_texts(["same", "same"], 0, 0.1)
