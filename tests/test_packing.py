"""Every description of packed documents converts exactly, and layers keep documents separate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longctx_layers.packing import (
    cu_seqlens_from_segment_ids,
    position_ids_from_segment_ids,
    segment_ids_from_attention_mask,
    segment_ids_from_cu_seqlens,
    segment_ids_from_position_ids,
)
from longctx_layers.testing import LAYER_CASES, small_layer

lengths = st.lists(st.integers(0, 7), max_size=6)


def cumulative(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@given(counts=lengths, spare=st.integers(0, 4))
def test_cu_seqlens_there_and_back(counts: list[int], spare: int) -> None:
    total = sum(counts)
    ids = segment_ids_from_cu_seqlens(cumulative(counts), total + spare)
    by_hand = [i for i, n in enumerate(counts) for _ in range(n)] + [-1] * spare
    assert ids.dtype == torch.int64
    assert ids.tolist() == [by_hand]
    back = cu_seqlens_from_segment_ids(ids)
    nonempty = [n for n in counts if n]  # an empty document leaves no trace among the ids
    assert back.cu_seqlens.dtype == torch.int32
    assert torch.equal(back.cu_seqlens, cumulative(nonempty))
    assert back.max_seqlen == max(nonempty, default=0)
    assert back.indices.tolist() == list(range(total))
    if not spare:
        assert torch.equal(segment_ids_from_cu_seqlens(cumulative(counts)), ids)


rows = st.lists(
    st.lists(st.sampled_from([-1, -1, 0, 0, 1, 7]), min_size=9, max_size=9), min_size=1, max_size=3
)


def documents(row: list[int]) -> list[list[int]]:
    """The columns of each document in a row of segment ids, by a plain loop."""
    columns: list[list[int]] = []
    last = None
    for column, segment in enumerate(row):
        if segment < 0:
            continue
        if segment != last:
            columns.append([])
        columns[-1].append(column)
        last = segment
    return columns


@given(rows=rows)
def test_rows_with_pads_anywhere(rows: list[list[int]]) -> None:
    expected = [(i, document) for i, row in enumerate(rows) for document in documents(row)]
    packed = cu_seqlens_from_segment_ids(torch.tensor(rows))
    bounds = packed.cu_seqlens.tolist()
    assert len(bounds) == len(expected) + 1
    for (i, columns), first, last in zip(expected, bounds, bounds[1:], strict=False):
        assert packed.indices[first:last].tolist() == [9 * i + column for column in columns]
    assert packed.max_seqlen == max((len(columns) for _, columns in expected), default=0)

    positions = position_ids_from_segment_ids(torch.tensor(rows)).tolist()
    by_hand = [[0] * 9 for _ in rows]
    for i, columns in expected:
        for position, column in enumerate(columns):
            by_hand[i][column] = position
    assert positions == by_hand


def test_no_tokens_have_no_positions() -> None:
    assert position_ids_from_segment_ids(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)


@given(counts=st.lists(st.integers(1, 7), min_size=1, max_size=6), first=st.integers(0, 3))
def test_positions_there_and_back(counts: list[int], first: int) -> None:
    ids = segment_ids_from_cu_seqlens(cumulative(counts))
    positions = position_ids_from_segment_ids(ids)
    assert positions.tolist() == [[i for n in counts for i in range(n)]]
    # Positions may start anywhere (RoBERTa's start with 2). Documents of one token stay separate.
    assert torch.equal(segment_ids_from_position_ids(positions + first), ids)


def test_positions_continue_the_held_segment() -> None:
    positions = torch.tensor([[4, 5, 0, 1], [0, 1, 2, 0], [0, 1, 2, 3]])
    ids = segment_ids_from_position_ids(positions, torch.tensor([2, 2, -1]))
    assert ids.tolist() == [[2, 2, 3, 3], [3, 3, 3, 4], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64], ids=str)
def test_attention_mask(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0]]).to(dtype)
    assert segment_ids_from_attention_mask(mask).tolist() == [[-1, -1, 0, 0], [0, -1, 0, -1]]
    held = segment_ids_from_attention_mask(mask, torch.tensor([-1, 5]))
    assert held.tolist() == [[-1, -1, 0, 0], [5, -1, 5, -1]]


@pytest.mark.parametrize("case", ["vanilla", "dpassm", "blade", "longformer", "bigbird"])
def test_a_row_of_documents_equals_each_alone(case: str) -> None:
    assert case in LAYER_CASES
    layer, counts = small_layer(case), [6, 1, 0, 13, 2]
    x = torch.randn(sum(counts), 16, dtype=torch.float64)
    y, _ = layer(x[None], segment_ids=segment_ids_from_cu_seqlens(cumulative(counts), len(x)))
    for part, alone in zip(y[0].split(counts), x.split(counts), strict=True):
        torch.testing.assert_close(part, layer(alone[None])[0][0])


def test_packing_a_batch_into_one_row_and_back() -> None:
    """The use of `indices` with a variable-length kernel."""
    layer = small_layer("dpassm")
    ids = torch.tensor([[-1, -1, 0, 0, 0], [0, 0, 1, 1, -1]])
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    packed = cu_seqlens_from_segment_ids(ids)
    flat = x.flatten(0, 1)[packed.indices]
    y, _ = layer(flat[None], segment_ids=segment_ids_from_cu_seqlens(packed.cu_seqlens))
    back = torch.zeros(10, 16, dtype=torch.float64).index_copy(0, packed.indices, y[0])
    torch.testing.assert_close(back.view(2, 5, 16), layer(x, segment_ids=ids)[0])


def test_compiles_without_a_break() -> None:
    ids = torch.compile(segment_ids_from_cu_seqlens, fullgraph=True, backend="eager")(
        cumulative([2, 3]), 7
    )
    assert ids.tolist() == [[0, 0, 1, 1, 1, -1, -1]]


@pytest.mark.parametrize(
    ("cu_seqlens", "length", "message"),
    [
        ([], None, "expected at least one element, 0, got an empty tensor"),
        ([1, 3], None, r"non-decreasing integers starting with 0, got \[1, 3\]"),
        ([0, 3, 2], None, r"starting with 0, got \[0, 3, 2\].*cumulative sum of the document"),
        ([0, 3], 2, "at most the row's length, 2"),
        ([[0, 3]], None, r"expected \[n \+ 1\]"),
    ],
)
def test_wrong_cu_seqlens(cu_seqlens: list[int], length: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_ids_from_cu_seqlens(torch.tensor(cu_seqlens, dtype=torch.int32), length)


def test_wrong_dtypes_and_shapes() -> None:
    with pytest.raises(TypeError, match=r"cu_seqlens: expected integers, got torch.float32"):
        segment_ids_from_cu_seqlens(torch.tensor([0.0, 2.0]))
    with pytest.raises(TypeError, match="segment_ids: expected integers, got torch.bool"):
        cu_seqlens_from_segment_ids(torch.tensor([[True]]))
    with pytest.raises(ValueError, match=r"position_ids: expected \[B, T\]"):
        segment_ids_from_position_ids(torch.arange(3))
    with pytest.raises(ValueError, match=r"attention_mask: expected \[B, T\]"):
        segment_ids_from_attention_mask(torch.ones(1, 1, 3, 3))
