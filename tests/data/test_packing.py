"""Packing: every token of every document once, labels within documents, lanes that go on."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx_layers.data.packing import IGNORED_LABEL, Epoch, Shape
from longctx_layers.data.store import TokenStore

END = 7
shapes = st.tuples(st.integers(1, 4), st.integers(1, 9)).map(lambda pair: Shape(*pair))
lengths_of_documents = st.lists(st.integers(1, 20), min_size=1, max_size=12)


def store_of(lengths: list[int]) -> TokenStore:
    """Documents without equal tokens, but for the ends of text: a token tells its place."""
    tokens, next_token = [], 100
    for length in lengths:
        tokens += [*range(next_token, next_token + length - 1), END]
        next_token += length
    ends = np.cumsum(lengths).astype(np.int64)
    return TokenStore(np.array(tokens, np.uint32), ends, np.arange(len(lengths)), len(lengths))


def batches(store: TokenStore, shape: Shape, documents=None, **options) -> list:
    documents = np.arange(len(store)) if documents is None else documents
    epoch = Epoch(store, documents, shape, **options)
    return [epoch.batch(number) for number in range(len(epoch))]


def pairs(store: TokenStore, documents) -> Counter:
    """Each token with the next one of its document, which the last one does not have."""
    found: Counter = Counter()
    for number in documents:
        ids = store.document(number).tolist()
        found.update(zip(ids, [*ids[1:], IGNORED_LABEL], strict=True))
    return found


def found_pairs(batch_list: list) -> Counter:
    found: Counter = Counter()
    for batch in batch_list:
        real = batch["segment_ids"] >= 0
        found.update(zip(batch["ids"][real].tolist(), batch["labels"][real].tolist(), strict=True))
        assert (batch["labels"][~real] == IGNORED_LABEL).all()
    return found


@given(lengths_of_documents, shapes, st.booleans(), st.integers(0, 3), st.sampled_from([None, 5]))
def test_every_token_and_every_label_once(lengths, shape, carry_state, number, seed):
    store = store_of(lengths)
    options = {"number": number, "seed": seed, "carry_state": carry_state}
    result = batches(store, shape, **options)
    assert found_pairs(result) == pairs(store, range(len(store)))
    for batch in result:
        for values in batch.values():
            assert values.shape == (shape.rows, shape.length)
            assert values.dtype == torch.int64


@given(lengths_of_documents, shapes, st.booleans())
def test_one_segment_id_is_one_document(lengths, shape, carry_state):
    store = store_of(lengths)
    segment_of, document_of = {}, {}
    for number in (0, 1):
        for batch in batches(store, shape, number=number, seed=0, carry_state=carry_state):
            real = batch["segment_ids"] >= 0
            for token, segment in zip(
                batch["ids"][real].tolist(), batch["segment_ids"][real].tolist(), strict=True
            ):
                if token != END:
                    document = int(np.searchsorted(store.ends, token - 100, side="right"))
                    assert segment_of.setdefault((number, document), segment) == segment
                    assert document_of.setdefault(segment, (number, document)) == (number, document)


@given(lengths_of_documents, shapes)
def test_pads_only_at_the_end(lengths, shape):
    """Rows are full but for one, and the rows of nothing but pads fill only the last batch."""
    result = batches(store_of(lengths), shape, seed=0)
    sizes = torch.cat([(batch["segment_ids"] >= 0).sum(1) for batch in result])
    total = sum(lengths)
    assert (sizes == shape.length).sum() == total // shape.length
    assert (sizes[: -shape.rows] > 0).all()
    assert len(result) == -(-total // (shape.length * shape.rows))


@given(lengths_of_documents, shapes)
def test_lanes_go_on_in_the_next_batch(lengths, shape):
    store = store_of(lengths)
    result = batches(store, shape, seed=3, carry_state=True)
    rows = torch.cat([batch["ids"] for batch in result], 1)
    segments = torch.cat([batch["segment_ids"] for batch in result], 1)
    labels = torch.cat([batch["labels"] for batch in result], 1)
    for ids, segment, label in zip(rows, segments, labels, strict=True):
        real = segment >= 0
        assert not (real[1:] & ~real[:-1]).any()  # pads come last
        inside = real[1:] & (segment[1:] == segment[:-1])
        assert (label[:-1][inside] == ids[1:][inside]).all()
        steps = segment[1:][real[1:]] - segment[:-1][real[1:]]
        assert ((steps == 0) | (steps == 1)).all()  # no document comes back


@given(lengths_of_documents, shapes, st.booleans(), st.integers(2, 3))
def test_ranks_share_the_batches_of_one_process(lengths, shape, carry_state, world_size):
    store = store_of(lengths)
    whole = batches(
        store, shape._replace(rows=shape.rows * world_size), seed=1, carry_state=carry_state
    )
    parts = [
        batches(
            store, shape._replace(rank=r, world_size=world_size), seed=1, carry_state=carry_state
        )
        for r in range(world_size)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name, values in batch.items():
            assert torch.equal(values, torch.cat([share[name] for share in shares]))


def test_the_order_is_of_seed_and_epoch_alone():
    store, shape = store_of([9, 4, 13, 6, 8, 5]), Shape(rows=2, length=4)

    def ids(**options):
        return torch.stack([batch["ids"] for batch in batches(store, shape, **options)])

    first = ids(seed=0)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first, ids(seed=0))
    assert not torch.equal(first, ids(seed=1))
    assert not torch.equal(first, ids(seed=0, number=1))


@pytest.mark.parametrize("carry_state", [False, True])
def test_a_part_of_the_documents(carry_state):
    store, chosen = store_of([9, 4, 13, 6, 8, 5]), np.array([4, 1, 2])
    result = batches(store, Shape(2, 5), documents=chosen, seed=0, carry_state=carry_state)
    assert found_pairs(result) == pairs(store, chosen)
