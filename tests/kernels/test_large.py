"""Batches of more rows than CUDA's y and z take, in tensors of more than 2^31 elements.

Memory is virtual: only the last row is written, and only the programs of that row run. It must be,
bit for bit, what the same row is alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.interpreter import interpreted, last_programs
from longctx_layers.kernels import (
    attention_backward,
    attention_forward,
    conv_silu,
    diagonal,
    gated_norms,
    ssd_backward,
    ssd_configs,
    ssd_forward,
)
from longctx_layers.kernels.grid import MOST_PROGRAMS, grid

pytestmark = pytest.mark.usefixtures("small")

ROWS = 70_001
Make = Callable[..., Tensor]


def rows(count: int) -> Make:
    """A maker of tensors `[count, ...]` or `[states, count, ...]` whose last row is random."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int, dtype: torch.dtype = torch.float16, states: int | None = None) -> Tensor:
        lead = (count,) if states is None else (states, count)
        size = math.prod((*lead, *shape))
        memory = torch.UntypedStorage(size * dtype.itemsize)
        x = torch.empty(0, dtype=dtype).set_(memory).view(*lead, *shape)
        one = torch.randn(*lead[:-1], *shape, generator=generator)
        x[(..., -1, *[slice(None)] * len(shape))] = one.to(dtype)
        return x

    return new


def attention(new: Make) -> list[Tensor]:
    q, far_q = (new(64, 2, 256).transpose(1, 2) for _ in range(2))
    k, v = (new(64, 1, 256).transpose(1, 2) for _ in range(2))
    far_k, far_v = new(1, 2, 2, 256), new(1, 2, 2, 256)
    first = (torch.arange(64, dtype=torch.int32)[None] - 7).clamp(min=0)
    mask = torch.ones(1, 1, 64, 2, dtype=torch.bool)
    call = q, k, v, first, far_q, far_k, far_v, mask, 32, 0.1
    o, lse = attention_forward.forward(*call)
    dlse = new(2, 64, dtype=torch.float32)
    return [o, lse, *attention_backward.backward(q, dlse, o, lse, *call)]


def convolution(new: Make) -> list[Tensor]:
    x, before = new(65, 500), new(3, 500)
    weight = torch.linspace(-1, 1, 2000).view(500, 4)
    start = torch.zeros(len(x), 65, dtype=torch.int64)
    y = conv_silu.forward(x, weight, before, start)
    dx, _, dbefore = conv_silu.backward(x, x, weight, before, start)
    return [y, dx, dbefore]


def diagonal_scan(new: Make) -> list[Tensor]:
    u, state = new(32, 1000), new(1000, dtype=torch.float32)
    decay = torch.linspace(0.1, 0.9, 1000)
    h, final = diagonal.forward(u, decay, state)
    du, _, dstate = diagonal.backward(h, final, h, decay, state, None, None)
    return [h, final, du, dstate]


def norms(new: Make) -> list[Tensor]:
    z, o, s = (new(128, 4, 64) for _ in range(3))
    weights = torch.ones(4, 64), torch.ones(4, 64)
    y = gated_norms.forward(z, o, s, *weights, 1e-5)
    return [y, *gated_norms.backward(z, z, o, s, *weights, 1e-5)[:3]]


def state_space(
    new: Make, length: int, dim: int, directions: int, pending: bool = False
) -> list[Tensor]:
    x, B, C = new(length, 2, dim), new(length, directions), new(length, directions)
    dt, states = new(length, 2, dtype=torch.float32), 2 if pending else 1
    state = new(2, dim, directions, dtype=torch.float32, states=states)
    until = torch.arange(length + 1)[None] // 12 * 12 if pending else None
    call = x, dt, -dt.double().abs(), B, C, state, None, until
    y, final = ssd_forward.forward(*call)
    if length == 1:
        return [y, *final]
    *gradients, dstate = ssd_backward.backward(x, final, *call)
    return [y, *final, *gradients, *dstate]


# What is computed, and how many programs of each kernel a row takes at most.
CALLS = {
    "sparse_attention": (attention, 4),
    "conv_silu": (convolution, 1),
    "diagonal_scan": (diagonal_scan, 2),
    "gated_norms": (norms, 4),
    "ssd": (partial(state_space, length=64, dim=256, directions=2), 4),
    "ssd, one token": (partial(state_space, length=1, dim=128, directions=128), 2),
    "block_ssd": (partial(state_space, length=64, dim=256, directions=2, pending=True), 4),
}


# Programs so large that a row takes few.
TILES = {"default": attention_forward.Choices(*[attention_forward.Tiles(64, 64, 4, 1)] * 4)}
SPANS = {"default": ssd_configs.Choices(*[ssd_configs.Tiles(32, 1, 8192, 4, 4)] * 4)}
SIZES = {
    attention_forward: {"FORWARD": TILES},
    attention_backward: {"QUERIES": TILES, "KEYS": TILES, "FAR": TILES},
    conv_silu: {"TOKENS": 128, "CHANNELS": 512},
    diagonal: {"CHANNELS": 1024},
    gated_norms: {"ELEMENTS": 128 * 64},
    ssd_backward: {"CONFIGS": SPANS},
    ssd_forward: {"CONFIGS": SPANS, "CARRIED": 4096, "STEPPED": 2**14},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_row_is_the_same_behind_70_000_others(monkeypatch, name):
    for module, sizes in SIZES.items():
        for attribute, size in sizes.items():
            monkeypatch.setattr(module, attribute, size)
    compute, programs = CALLS[name]
    with interpreted(None):
        expected = compute(rows(1))
        with last_programs(programs) as grids:
            found = compute(rows(ROWS))
    assert max(x.numel() for x in found) > 2**31
    assert all(size[1:] == (1,) * len(size[1:]) for size in grids)
    for x, alone in zip(found, expected, strict=True):
        assert torch.equal(x[-1:], alone)


def test_more_programs_than_a_gpu_takes():
    assert grid(3, 5) == (15,)
    assert grid(MOST_PROGRAMS, 1) == (MOST_PROGRAMS,)
    with pytest.raises(ValueError, match=r"at most 2,147,483,647 programs, got 65536 x 32768 = 2,"):
        grid(2**16, 2**15)
