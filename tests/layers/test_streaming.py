"""The first promise: any split of a sequence gives the outputs, state and gradients of one pass."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longctx_layers.testing import LAYER_CASES, assert_streams, small_layer, state_gradients

FEWER = settings(max_examples=max(settings.default.max_examples * 2 // 5, 1))

# Short pieces (none, too) behind one that may reach past a tile of 64 and BigBird's random keys.
SPLITS = st.tuples(
    st.sampled_from([1, 5, 64, 131]), st.lists(st.integers(0, 9), min_size=1, max_size=5)
).map(lambda drawn: [drawn[0], *drawn[1]])


def sized(case, size):
    """The case's options with another window or chunk size; None keeps its own."""
    own = LAYER_CASES[case][1]
    if size is None:
        return {}
    changed = {"window_size": size, "chunk_size": size, "chunk_shift": size // 2}
    return {name: value for name, value in changed.items() if name in own}


def packed_ids(batch, length, seed):
    """Random runs of three ids, with pads anywhere; odd seeds give long runs."""
    generator = torch.Generator().manual_seed(seed)
    change, pad = torch.rand(2, batch, length, generator=generator)
    ids = (change < (0.01 if seed % 2 else 0.3)).cumsum(1) % 3
    return torch.where(pad < 0.2, -1 - seed % 2, ids)


@pytest.mark.parametrize("case", LAYER_CASES)
@given(
    pieces=SPLITS,
    batch=st.integers(1, 3),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    size=st.none() | st.integers(1, 20),
    seed=st.integers(0, 999),
    packed=st.booleans(),
)
@FEWER
def test_any_split_streams_like_one_pass(case, pieces, batch, n_kv_heads, size, seed, packed):
    layer = small_layer(case, n_kv_heads=n_kv_heads, **sized(case, size))
    torch.manual_seed(seed)
    x = torch.randn(batch, sum(pieces), 16, dtype=torch.float64)
    assert_streams(layer, x, pieces, packed_ids(batch, sum(pieces), seed) if packed else None)


@pytest.mark.parametrize("case", LAYER_CASES)
def test_a_saved_state_goes_on(case):
    torch.manual_seed(0)
    layer = small_layer(case)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    _, state = layer(x[:, :7])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is layer.state_type
    assert_close(layer(x[:, 7:], loaded), layer(x[:, 7:], state), rtol=0, atol=0)


@pytest.mark.parametrize("case", LAYER_CASES)
@given(
    length=st.integers(1, 60),
    at_once=st.sampled_from([8, 20]),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
    packed=st.booleans(),
)
@FEWER
def test_a_long_call_in_pieces_is_the_same(case, length, at_once, batch, seed, packed):
    layer = small_layer(case)
    torch.manual_seed(seed)
    x = torch.randn(batch, length, 16, dtype=torch.float64, requires_grad=True)
    ids = packed_ids(batch, length, seed) if packed else None
    whole = layer(x, segment_ids=ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longctx_layers.layers.splitting.TOKENS_AT_ONCE", at_once)
        pieces = layer(x, segment_ids=ids)
    assert_close(pieces, whole, rtol=1e-9, atol=1e-9)
    expected = state_gradients(layer, x, *whole)
    assert_close(state_gradients(layer, x, *pieces), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["bigbird", "bigbird-random"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cached", [0, 3, 200])
def test_a_growing_state_is_read_in_pieces(monkeypatch, case, packed, cached):
    """BigBird's pieces are multiples of 64 queries, which the test above is too short for."""
    layer = small_layer(case)
    torch.manual_seed(0)
    x = torch.randn(1, cached + 330, 16, dtype=torch.float64)
    ids = packed_ids(1, cached + 330, 0) if packed else None
    with torch.no_grad():
        _, state = layer(x[:, :cached], segment_ids=None if ids is None else ids[:, :cached])
    ids = None if ids is None else ids[:, cached:]
    x = x[:, cached:].requires_grad_()
    whole = layer(x, state, segment_ids=ids)
    pieces = []
    attend = layer.attend
    monkeypatch.setattr(layer, "attend", lambda *a, **k: pieces.append(1) or attend(*a, **k))
    monkeypatch.setattr("longctx_layers.layers.splitting.TOKENS_AT_ONCE", 64)
    found = layer(x, state, segment_ids=ids)
    assert len(pieces) >= 2
    assert_close(found, whole, rtol=1e-9, atol=1e-9)
    assert_close(
        state_gradients(layer, x, *found), state_gradients(layer, x, *whole), rtol=1e-9, atol=1e-9
    )
