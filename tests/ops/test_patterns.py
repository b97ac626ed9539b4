"""Range and far lists together admit exactly the keys of the pattern, each of them once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx_layers.ops import Segments, sparse_attention
from longctx_layers.ops.attention.far import RANDOM_BLOCK, far_cached_keys, random_positions


def random_set(block: int, head: int, window: int, n_global: int, n_random: int) -> set[int]:
    positions, exists = random_positions(
        torch.tensor([block]), n_random, 2, window_size=window, n_global_tokens=n_global, seed=3
    )
    return set(positions[head, 0][exists[head, 0]].tolist())


@pytest.mark.parametrize("continued", [0, 70])
@given(
    window=st.sampled_from([1, 5, 64, 70]),
    n_global=st.integers(0, 3),
    n_random=st.integers(0, 4),
    cuts=st.sets(st.integers(1, 199), max_size=2),
)
def test_bigbird_sees_its_definition(continued, window, n_global, n_random, cuts):
    length = 200
    total = continued + length
    starts = torch.zeros(length, dtype=torch.int64) - continued
    for cut in cuts:
        starts[cut:] = starts[cut:].clamp(min=cut)
    segments = None
    if cuts or continued:
        segments = Segments(starts[None], torch.tensor([length]))
    # All scores are equal and values are one-hot: an output row is what the query sees.
    q, k = torch.zeros(1, 2, length, total), torch.zeros(1, 2, total, total)
    v = torch.eye(total).expand(1, 2, -1, -1)
    far = far_cached_keys(
        q, k, v, window_size=window, n_global_tokens=n_global, n_random_tokens=n_random, seed=3,
        segments=segments,
    )  # fmt: skip
    y = sparse_attention(q, k, v, window_size=window, segments=segments, far=far)
    for head in range(2):
        for i in range(0, length, 7):
            start = int(starts[i]) if segments is not None else 0
            position = i - start
            chosen = random_set(position // RANDOM_BLOCK, head, window, n_global, n_random)
            seen = {
                j
                for j in range(position + 1)
                if position - window < j or j < n_global or (n_random and j in chosen)
            }
            expected = torch.zeros(total)
            expected[[j + start + continued for j in seen]] = 1 / len(seen)
            torch.testing.assert_close(y[0, head, i], expected)


@given(st.integers(0, 400), st.integers(1, 130), st.integers(0, 4), st.integers(1, 16))
def test_random_keys_are_distinct_and_in_range(block, window, n_global, n_random):
    last = RANDOM_BLOCK * block - window
    found, exists = random_positions(
        torch.tensor([block]), n_random, 2, window_size=window, n_global_tokens=n_global, seed=0
    )
    for row, valid in zip(found[:, 0], exists[:, 0], strict=True):
        chosen = row[valid].tolist()
        assert len(set(chosen)) == len(chosen) == min(n_random, max(0, last - n_global + 1))
        assert all(n_global <= j <= last for j in chosen)


def test_random_keys_stay_what_they_are():
    found, _ = random_positions(
        torch.tensor([40]), 4, 2, window_size=128, n_global_tokens=2, seed=5
    )
    assert found[:, 0].tolist() == PINNED
    other, _ = random_positions(
        torch.tensor([40]), 4, 2, window_size=128, n_global_tokens=2, seed=6
    )
    assert not torch.equal(found, other)


PINNED = [[443, 677, 1789, 2166], [132, 1135, 1767, 2093]]
