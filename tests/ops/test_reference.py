"""The torch path of each operation equals its reference: outputs, states and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longctx_layers.ops import (
    FarKeys,
    Segments,
    block_ssd,
    diagonal_scan,
    sparse_attention,
    ssd,
)
from longctx_layers.ops.segments import chunk_start

# Around the edges of tiles and blocks.
LENGTHS = st.sampled_from([1, 2, 5, 17, 63, 64, 65, 100, 129, 200])
DIM, STATE = 4, 3


@st.composite
def rows(draw: Any) -> tuple[int, int, Segments | None]:
    """Batch size, length, and segments: packed, continued, padded at the right, or none."""
    batch, length = draw(st.integers(1, 3)), draw(LENGTHS)
    if draw(st.booleans()):
        return batch, length, None
    starts, counts = [], []
    for _ in range(batch):
        count = draw(st.integers(0, length))
        # A row without tokens of its own can only go on where an earlier call stopped.
        position = draw(st.integers(0 if count else 1, 20))
        begins = draw(st.sets(st.integers(0, max(count - 1, 0)), max_size=6)) if count else set()
        row, start = [], -position
        for t in range(length):
            start = t if t in begins else start
            row.append(start)
        starts.append(row)
        counts.append(count)
    return batch, length, Segments(torch.tensor(starts), torch.tensor(counts))


def tensors(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in flat(part)]


def assert_equal_backends(
    call: Callable[..., Any], inputs: list[Tensor], real: Tensor | None
) -> None:
    """Outputs at real tokens, final states, and gradients of every input."""
    found = []
    for backend in ("reference", "torch"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = flat(call(*leaves, backend=backend))
        if real is not None:
            mask = real.view(*real.shape, *[1] * (outputs[0].dim() - real.dim()))
            outputs[0] = torch.where(mask, outputs[0], 0)
        weights = tensors(1, *(tuple(x.shape) for x in outputs))
        loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        found.append([*outputs, *gradients])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def real_tokens(segments: Segments | None) -> Tensor | None:
    return None if segments is None else segments.real()


@given(rows(), st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 99))
def test_ssd(shape, step, seed):
    batch, length, segments = shape
    x, dt, A, B, C, h = tensors(
        seed, (batch, length, 2, DIM), (batch, length, 2), (2,),
        (batch, length, STATE), (batch, length, STATE), (batch, 2, DIM, STATE),
    )  # fmt: skip

    def call(x, dt, A, B, C, h, backend):
        return ssd(x, dt, A, B, C, initial_state=h, segments=segments, backend=backend)

    inputs = [x, dt.abs() * step, -A.abs(), B, C, h]
    assert_equal_backends(call, inputs, real_tokens(segments))


@given(rows(), st.integers(1, 130), st.integers(0, 129), st.integers(0, 99))
def test_block_ssd(shape, size, shift, seed):
    batch, length, segments = shape
    shift %= size
    x, dt, A, B, C, h, pending = tensors(
        seed, (batch, length, 2, DIM), (batch, length, 2), (2,), (batch, length, STATE),
        (batch, length, STATE), (batch, 2, DIM, STATE), (batch, 2, DIM, STATE),
    )  # fmt: skip
    if segments is not None:
        # Nothing is pending at a boundary.
        first = torch.minimum(segments.start[:, 0], torch.tensor(0))
        boundary = chunk_start(torch.zeros_like(first), first, size, shift) == 0
        pending = torch.where(boundary[:, None, None, None], 0, pending)

    def call(x, dt, A, B, C, h, pending, backend):
        return block_ssd(
            x, dt, A, B, C, chunk_size=size, chunk_shift=shift, initial_state=(h, pending),
            segments=segments, backend=backend,
        )  # fmt: skip

    inputs = [x, dt.abs(), -A.abs(), B, C, h, pending]
    assert_equal_backends(call, inputs, real_tokens(segments))


@given(rows(), st.booleans(), st.sampled_from([0.1, 1.0, 10.0]), st.integers(0, 99))
def test_diagonal_scan(shape, invariant, strength, seed):
    batch, length, segments = shape
    decay_shape = (STATE,) if invariant else (batch, length, STATE)
    u, decay, h = tensors(seed, (batch, length, STATE), decay_shape, (batch, STATE))

    def call(u, decay, h, backend):
        return diagonal_scan(u, decay, initial_state=h, segments=segments, backend=backend)

    assert_equal_backends(call, [u, -strength * decay.abs(), h], real_tokens(segments))


@given(
    rows(),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0, 3, 40]),
    st.sampled_from([None, 1, 3, 16, 40, 150]),
    st.sampled_from([None, 1, 3, 16, 50]),
    st.sampled_from([None, 16, 64, 1000]),
    st.integers(0, 99),
)
def test_sparse_attention(shape, groups, prefix, window, chunk, far_block, seed):
    batch, length, segments = shape
    heads, total = 4, prefix + length
    inputs = tensors(
        seed, (batch, heads, length, DIM), (batch, groups, total, DIM), (batch, groups, total, DIM)
    )
    mask = None
    if window is None and chunk is None and far_block is not None:
        far_block = 1000
    if far_block is not None:
        lists = (batch, groups, -(-length // far_block), 3, DIM)
        inputs += tensors(seed + 1, (batch, heads, length, DIM), lists, lists)
        mask = torch.rand(batch, groups, length, 3) < 0.5

    def call(q, k, v, *far, backend):
        return sparse_attention(
            q, k, v, window_size=window, chunk_size=chunk, chunk_shift=(chunk or 1) // 2,
            segments=segments, far=FarKeys(*far, mask, far_block) if far else None, backend=backend,
        )  # fmt: skip

    real = None if segments is None else segments.real()[:, None]
    assert_equal_backends(call, inputs, real)
