"""Strong, absent and mixed decays, wrong arguments, and memory that grows with the length only."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from longctx_layers.ops import Segments, block_ssd, diagonal_scan, sparse_attention, ssd
from longctx_layers.testing import MemoryMeter, assert_within_budget

LENGTH = 150


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, LENGTH, 2, 4), (1, LENGTH, 2), (2,), (1, LENGTH, 3), (1, LENGTH, 3)
    x, dt, A, B, C = (torch.randn(s, generator=generator) for s in shapes)
    return [z.to(dtype) for z in (x, dt.abs(), -A.abs() - 0.01, B, C)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [0.0, 1e-6, 1.0, 1e4])
@pytest.mark.parametrize("operation", [ssd, block_ssd])
def test_any_decay_stays_within_budget(operation, strength, dtype):
    x, dt, A, B, C = inputs(dtype)
    # One very strong decay, then weak ones: sums of logarithms must not lose the weak ones.
    A = A.float() * strength
    dt = dt.float()
    dt[:, 20] = 500.0
    options = {"chunk_size": 16} if operation is block_ssd else {}
    actual, _ = operation(x, dt, A, B, C, **options)
    own, _ = operation(x, dt, A, B, C, backend="reference", **options)
    wide = (z.double() for z in (x, dt, A, B, C))
    oracle, _ = operation(*wide, backend="reference", **options)
    assert_within_budget(actual, own, oracle)


@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -1e6])
def test_diagonal_decays(log_decay):
    u = inputs(torch.float32)[3]
    decay = torch.full((3,), log_decay)
    actual, _ = diagonal_scan(u, decay)
    own, _ = diagonal_scan(u, decay, backend="reference")
    oracle, _ = diagonal_scan(u.double(), decay.double(), backend="reference")
    assert_within_budget(actual, own, oracle)


@pytest.mark.parametrize("scale", [1e-30, 1e4])
def test_huge_and_tiny_inputs_stay_finite(scale):
    x, dt, A, B, C = inputs(torch.float32)
    assert torch.isfinite(ssd(x * scale, dt, A, B * scale, C)[0]).all()
    q = torch.randn(1, 2, 40, 4) * scale
    assert torch.isfinite(sparse_attention(q, q, q, window_size=8)).all()


def meter(length: int, **options: object) -> MemoryMeter:
    q = torch.randn(1, 2, length, 8, requires_grad=True)
    if options.pop("packed", False):
        start = torch.arange(length)[None] // 100 * 100
        options["segments"] = Segments(start, torch.tensor([length]))
    with MemoryMeter() as measured:
        sparse_attention(q, q, q, **options).sum().backward()
    return measured


@pytest.mark.parametrize(
    "options",
    [{"window_size": 64}, {"chunk_size": 64}, {"chunk_size": 64, "chunk_shift": 32},
     {"window_size": 64, "packed": True}, {}, {"packed": True}],
)  # fmt: skip
def test_attention_memory_is_linear(options):
    peaks = [meter(n, **dict(options)).peak for n in (1024, 2048, 4096, 8192)]
    assert all(b <= 2.2 * a for a, b in pairwise(peaks)), peaks
    assert meter(8192, **dict(options)).largest < 8192 * 8192 / 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, "window_size: expected at least 1, got 0"),
        ({"window_size": 2.5}, "window_size: expected an integer"),
        ({"chunk_size": 4, "chunk_shift": 4}, "chunk_shift: expected 0 <= chunk_shift"),
        ({"dropout_p": 1.0}, "dropout_p: expected a probability"),
    ],
)
def test_wrong_options(options, message):
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises((ValueError, TypeError), match=message):
        sparse_attention(q, q, q, **options)


def test_wrong_tensors():
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="number of heads that divides"):
        sparse_attention(q, torch.randn(1, 3, 5, 4), torch.randn(1, 3, 5, 4))
    with pytest.raises(ValueError, match="at least the 5 keys"):
        sparse_attention(q, q[:, :, :3], q[:, :, :3])
    with pytest.raises(TypeError, match="expected torch.float32"):
        sparse_attention(q, q.double(), q.double())
    x, dt, A, B, C = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"dt: expected \[B, T, H\]"):
        ssd(x, dt[:, :3], A, B, C)
    with pytest.raises(ValueError, match="chunk_shift"):
        block_ssd(x, dt, A, B, C, chunk_size=4, chunk_shift=4)


def test_gradients_by_finite_differences():
    x, dt, A, B, C = (z[:, :9] if z.dim() > 1 else z for z in inputs(torch.float64))
    leaves = [z.clone().requires_grad_() for z in (x, dt, A, B, C)]
    assert torch.autograd.gradcheck(lambda *z: ssd(*z), leaves)
    assert torch.autograd.gradcheck(lambda *z: block_ssd(*z, chunk_size=4)[0], leaves)
    q = torch.randn(1, 2, 20, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: sparse_attention(q, q, q, window_size=3), (q,))
    assert torch.autograd.gradcheck(lambda u, a: diagonal_scan(u, -a.abs()), (leaves[3], leaves[4]))
