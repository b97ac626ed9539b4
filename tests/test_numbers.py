"""docs/numbers.md, line by line: which calls give the same bits, and how far the others are apart.

Each bound comes from the data: twice the error that the one call itself has, and rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from support.op_cases import inputs, results
from torch import Tensor

from longctx_layers.layers import AttentionLayer
from longctx_layers.ops import BACKENDS, use_backend
from longctx_layers.testing import LAYER_CASES, assert_within_budget, small_layer

LENGTH = 48  # several windows, chunks and (see the fixture in conftest.py) blocks of the CPU path
CPU_BACKENDS = ("auto", "torch", "reference")
OPERATIONS = {
    "sparse_attention": {"window_size": 20},
    "gated_norms": {},
    "conv_silu": {},
    "diagonal_scan": {},
    "ssd": {},
    "block_ssd": {"chunk_size": 12},
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def results_of(layer: AttentionLayer, x: Tensor) -> list[Tensor]:
    """Output, state, and the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    y, state = layer(x)
    return [y, *state, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", LAYER_CASES)
def test_a_layer_gives_the_same_bits_from_run_to_run(case):
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = small_layer(case, dtype=dtype), torch.randn(2, LENGTH, 16).to(dtype)
        for backend in CPU_BACKENDS if dtype == torch.float32 else ("auto",):
            with use_backend(backend):
                assert same(results_of(layer, x), results_of(deepcopy(layer), x.clone()))


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_the_same_bits_from_run_to_run(name):
    tensors = inputs(name, 2, LENGTH, dtype=torch.float32)
    for backend in ("cpu", "torch", "reference"):
        if backend == "cpu" and name in ("conv_silu", "diagonal_scan"):
            continue  # have no such backend
        runs = [results(name, tensors, **OPERATIONS[name], backend=backend) for _ in range(2)]
        for found, expected in zip(*runs, strict=True):
            assert same(list(found.values()), list(expected.values()))


def at_once(layer: AttentionLayer, x: Tensor) -> list[Tensor]:
    y, state = layer(x)
    return [y, *state]


def in_pieces(layer: AttentionLayer, x: Tensor, sizes: list[int]) -> list[Tensor]:
    state, ys = None, []
    for piece in x.split(sizes, dim=1):
        y, state = layer(piece, state)
        ys.append(y)
    return [torch.cat(ys, dim=1), *state]


def beside_others(layer: AttentionLayer, x: Tensor) -> list[Tensor]:
    others = torch.randn(6, *x.shape[1:]).to(x)
    return [z[3:4] for z in at_once(layer, torch.cat([others[:3], x, others[3:]]))]


def with_more_threads(layer: AttentionLayer, x: Tensor) -> list[Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        return at_once(layer, x)
    finally:
        torch.set_num_threads(threads)


WAYS: dict[str, Callable[[AttentionLayer, Tensor], list[Tensor]]] = {
    "a batch beside it": beside_others,
    "a split into calls": lambda layer, x: in_pieces(layer, x, [17, 1, 25, 5]),
    "steps of one token": lambda layer, x: in_pieces(layer, x, [1] * LENGTH),
    "other numbers of threads": with_more_threads,
}


@pytest.mark.parametrize("case", LAYER_CASES)
@DTYPES
@torch.no_grad()
def test_the_bound_where_bits_may_differ(case, dtype):
    torch.manual_seed(0)
    layer, x = small_layer(case, dtype=dtype), torch.randn(1, LENGTH, 16).to(dtype)
    # Around BLADE's loop over chunks the rounding of one is the next one's input.
    factor = 4.0 if "mlp" in case else 2.0
    whole = at_once(layer, x)
    with use_backend("reference"):
        exact = at_once(deepcopy(layer).double(), x.double())
    for way, run in WAYS.items():
        for found, own, true in zip(run(layer, x), whole, exact, strict=True):
            if found.is_floating_point() and found.numel():
                try:
                    scale = true.abs().max().item()
                    assert_within_budget(found, own, true, scale=scale, factor=factor)
                except AssertionError as error:
                    raise AssertionError(f"{way}: {error}") from error
            else:
                assert torch.equal(found, own)


def test_the_page_names_every_backend():
    page = (Path(__file__).parents[1] / "docs" / "numbers.md").read_text()
    assert all(f"`{name}`" in page for name in BACKENDS)
    assert "not measured" in page
