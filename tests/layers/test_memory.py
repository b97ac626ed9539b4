"""Memory is linear in the length, and the state is as large as `state_size` says."""

from itertools import pairwise

import pytest
import torch

from longctx_layers.testing import LAYER_CASES, MemoryMeter, small_layer

GROWING = ("vanilla", "bigbird")  # their states hold every key
LENGTHS = (256, 512, 1024, 2048)
CASES = pytest.mark.parametrize("case", LAYER_CASES)


def state_bytes(state):
    """What the state keeps alive: the whole of the memory that its tensors are views of."""
    return sum(tensor.untyped_storage().nbytes() for tensor in state)


@CASES
@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_linear_in_the_length(case, packed):
    chunk = {"chunk_size": 32} if "blade" in case else {}
    layer = small_layer(case, d_model=8, n_heads=2, dtype=torch.float32, **chunk)
    peaks, largest = [], []
    for length in LENGTHS:
        x = torch.randn(1, length, 8, requires_grad=True)
        ids = torch.arange(length)[None] // 100 if packed else None
        with MemoryMeter() as meter:
            y, _ = layer(x, segment_ids=ids)
            y.sum().backward()
        peaks.append(meter.peak)
        largest.append(meter.largest)
    assert largest[-1] < LENGTHS[-1] ** 2 / 4
    for shorter, longer in (*pairwise(peaks), *pairwise(largest)):
        assert longer < 2.3 * shorter


@CASES
def test_a_long_prefill_leaves_a_state_of_its_own_size(case):
    layer = small_layer(case, dtype=torch.float32)
    sizes = []
    for length in (1, 7, 64, 300):
        _, state = layer(torch.randn(1, length, 16))
        assert state_bytes(state) == layer.state_size(length)
        sizes.append(layer.state_size(length))
    if case.startswith(GROWING):
        assert sizes == sorted(set(sizes))
    else:
        assert len(set(sizes)) == 1
    assert state_bytes(layer.init_state(1)) == layer.state_size(0)


@CASES
def test_state_size_counts_the_parameters_dtype(case):
    layer = small_layer(case, dtype=torch.bfloat16, n_kv_heads=2)
    state = None
    for _ in range(9):
        _, state = layer(torch.randn(1, 3, 16, dtype=torch.bfloat16), state)
    assert state_bytes(state) == layer.state_size(27)


@CASES
@torch.no_grad()
def test_decoding_uses_constant_memory(case):
    layer = small_layer(case, dtype=torch.float32)
    peaks = []
    for length in (100, 200, 400):
        _, state = layer(torch.randn(1, length, 16))
        layer(torch.randn(1, 1, 16), state)  # keeps its rotary table
        with MemoryMeter() as meter:
            layer(torch.randn(1, 1, 16), state)
        peaks.append(meter.peak)
    if case.startswith(GROWING):
        assert peaks[2] < 2.3 * peaks[1]
    else:
        assert len(set(peaks)) == 1
