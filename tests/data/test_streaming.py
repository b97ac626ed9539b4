"""Streams: the batches of the store's kind, without a store, and the same from any place on."""

import copy
import itertools
import multiprocessing
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from longctx_layers.data.keys import digest
from longctx_layers.data.loader import Position, Progress
from longctx_layers.data.packing import IGNORED_LABEL, Shape
from longctx_layers.data.sources import from_generator
from longctx_layers.data.streaming import StreamedLoader, StreamedRows, merged, of_all_processes
from longctx_layers.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


def _given(documents):
    return iter(documents)


def loader(documents, shape, progress=None, num_workers=0, held_out=()):
    source = from_generator(_given, documents=documents)
    rows = StreamedRows(source, set(held_out), TOKENIZER, shape, seed=0)
    data = SimpleNamespace(progress=progress or Progress(), trainer=None)
    return StreamedLoader(data, rows, num_workers=num_workers)


def numbered(lengths):
    return [chr(200 + number) * length for number, length in enumerate(lengths)]


def same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("longctx_layers.data.lanes.BLOCK_DOCUMENTS", 4)


lengths_of_documents = st.lists(st.integers(1, 12), min_size=1, max_size=14)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9)).map(lambda pair: Shape(*pair))


@given(lengths_of_documents, shapes)
def test_every_token_once_in_lanes_that_go_on(lengths, shape):
    documents = numbered(lengths)
    batches = list(loader(documents, shape))
    found = Counter()
    for row in range(shape.rows):
        ids, labels, segments = (
            torch.cat([batch[name][row] for batch in batches])
            for name in ("ids", "labels", "segment_ids")
        )
        real = segments >= 0
        assert not (real[1:] & ~real[:-1]).any()
        for segment in segments[real].unique_consecutive().tolist():
            inside = segments == segment
            document = ids[inside].tolist()
            assert document[-1] == TOKENIZER.end_of_text
            assert labels[inside].tolist() == [*document[1:], IGNORED_LABEL]
            found[TOKENIZER.decode(document)] += 1
        assert (labels[~real] == IGNORED_LABEL).all()
    assert found == Counter(documents)


@given(lengths_of_documents, shapes, st.data())
def test_goes_on_from_any_batch(lengths, shape, data):
    documents = numbered(lengths)
    progress = Progress()
    stream = loader(documents, shape, progress)
    batches, positions = [], [progress.position]
    for _ in range(2):  # epochs
        for batch in stream:
            batches.append(batch)
            positions.append(progress.position)
    place = data.draw(st.integers(0, len(batches)))
    resumed = loader(documents, shape, Progress(copy.deepcopy(positions[place])))
    rest = [batch for _ in range(2) for batch in resumed]
    same(batches[place:], rest[: len(batches) - place])


def test_epochs_differ_and_never_go_on_with_each_other():
    stream = loader(numbered([5, 3, 8, 2, 9, 4]), Shape(2, 4))
    first, second = list(stream), list(stream)
    ids = [torch.cat([batch["segment_ids"] for batch in epoch]) for epoch in (first, second)]
    assert not set(ids[0][ids[0] >= 0].tolist()) & set(ids[1][ids[1] >= 0].tolist())
    assert not all(torch.equal(a["ids"], b["ids"]) for a, b in zip(first, second, strict=False))


def test_workers_change_nothing():
    documents = numbered([5, 3, 8, 2, 9, 4, 7, 7, 1, 12])
    alone = list(loader(documents, Shape(3, 4)))
    same(alone, list(loader(documents, Shape(3, 4), num_workers=2)))
    progress = Progress()
    same(alone[:2], list(itertools.islice(loader(documents, Shape(3, 4), progress, 2), 2)))
    resumed = loader(documents, Shape(3, 4), Progress(progress.position))
    same(alone[2:], list(resumed))


def test_ranks_share_the_batches_of_one_process():
    documents = numbered([5, 3, 8, 2, 9, 4, 7, 7, 1, 12])
    alone = list(loader(documents, Shape(4, 4)))
    shares = []
    for rank in range(2):
        rows = StreamedRows(
            from_generator(_given, documents=documents), set(), TOKENIZER, Shape(2, 4, rank, 2), 0
        )
        shares.append(list(itertools.islice(rows, len(alone))))
    for batch, *pieces in zip(alone, *shares, strict=True):
        for name, values in batch.items():
            assert torch.equal(values, torch.cat([piece.rows[name] for piece in pieces]))
    # What one process saves of both leads both to the same place.
    state = merged([share[1]._asdict() for share in shares])
    assert state["lanes"].keys() == {0, 1, 2, 3}
    resumed = loader(documents, Shape(4, 4))
    resumed.data.progress.position = resumed.data.progress.position._replace(
        batch=2, stream={name: state[name] for name in ("anchor", "lanes")}
    )
    same(alone[2:], list(resumed))


def _share(rank, place, documents, folder):
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    progress = Progress()
    positions, batches = [], []
    for batch in loader(documents, Shape(2, 4, rank, 2), progress):
        batches.append(batch)
        positions.append(of_all_processes(progress.position, 2)._asdict())
    torch.save((batches, positions), folder / f"{rank}")
    dist.destroy_process_group()


def test_two_processes_end_together_and_save_the_same(tmp_path):
    documents = numbered([5, 3, 40, 2, 9, 4, 7, 7, 1, 12])  # one lane is far longer
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_share, args=(rank, tmp_path / "place", documents, tmp_path))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    shares = [torch.load(tmp_path / f"{rank}", weights_only=True) for rank in range(2)]
    batches = [
        {name: torch.cat([one[name], other[name]]) for name in one}
        for one, other in zip(shares[0][0], shares[1][0], strict=True)
    ]
    same(list(loader(documents, Shape(4, 4))), batches)
    assert shares[0][1] == shares[1][1]
    resumed = loader(documents, Shape(4, 4), Progress(Position(**shares[0][1][3])))
    same(batches[4:], list(resumed))


def test_held_out_documents_do_not_come():
    documents = numbered([3, 4, 5])
    batches = list(loader(documents, Shape(1, 4), held_out=[digest(documents[1])]))
    text = TOKENIZER.decode(
        token for b in batches for token in b["ids"][b["segment_ids"] >= 0].tolist()
    )
    assert documents[1][0] not in text
    assert len(text) == 8


def test_a_far_place_is_found_without_reading_all(monkeypatch):
    """The anchor moves along, so that a resumption begins near its place."""
    progress = Progress()
    stream = loader(numbered([6] * 60), Shape(2, 7), progress)
    for _ in itertools.islice(stream, 40):
        pass
    anchor = progress.position.stream["anchor"]
    assert sum(anchor["documents"]) >= 40
    assert anchor["source"] is not None
