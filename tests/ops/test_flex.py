"""FlexAttention's adapter: its masks, one compiled call, and the rest with the kernel uncompiled.

Compiled it has no gradients on a CPU; uncompiled, its formulas have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.op_cases import assert_equal_in_float64, build, cases, inputs
from torch.nn.attention import flex_attention as library
from torch.testing import assert_close

from longctx_layers import explain
from longctx_layers.ops import FarKeys, Pattern, availability, sparse_attention
from longctx_layers.ops.attention import _operation, flex

LENGTHS = [1, 2, 5, 17, 63, 64, 65, 129, 200, 257]


@contextmanager
def uncompiled() -> Iterator[None]:
    """FlexAttention's own formulas instead of a kernel, for every call."""
    backend = _operation.backends["flex"]._replace(refuse=lambda *_, **__: None)
    with (
        mock.patch.object(flex, "compiled", return_value=library.flex_attention),
        mock.patch.dict(_operation.backends, flex=backend),
        mock.patch.object(library, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, create=True),
        mock.patch.object(library, "_validate_device"),  # which refuses gradients on a CPU
    ):
        yield


@given(data=st.data())
def test_equal_in_float64(data):
    with uncompiled():
        case = data.draw(cases("sparse_attention", LENGTHS))
        assert_equal_in_float64("sparse_attention", case, backend="flex")


@given(data=st.data())
def test_masks_are_those_of_every_score(data):
    case = data.draw(cases("sparse_attention", [1, 127, 128, 129, 300, 512]))
    options = build("sparse_attention", case, torch.float32)[1]
    length, prefix, cpu = case["length"], case["prefix"], torch.device("cpu")
    pattern = Pattern(**{name: options[name] for name in Pattern._fields if name in options})
    first = pattern.first_key(length, prefix, cpu)
    first = first.expand(case["batch"], -1)
    mask = flex.range_mask(first, prefix)
    shape = case["batch"], 1, length, prefix + length
    i, j = torch.arange(length)[:, None], torch.arange(-prefix, length)
    sees = (j >= first[..., None]) & (j <= i)
    assert torch.equal(library.create_mask(mask.mask_mod, *shape, cpu)[:, 0], sees)
    expected = library.create_block_mask(mask.mask_mod, *shape, device=cpu)
    assert mask.shape == expected.shape
    for side in ("kv", "q"):
        for name in (f"{full}{side}_{kind}" for full in ("", "full_") for kind in TABLES):
            assert torch.equal(getattr(mask, name), getattr(expected, name))


TABLES = ("num_blocks", "indices")


@pytest.mark.slow  # the compiler takes half a minute; the other tests run the same formulas
@torch.no_grad()
def test_the_compiled_kernel_is_the_reference():
    q, k, v = inputs("sparse_attention", 2, 150, prefix=40, dtype=torch.float32).values()
    y, expected = (
        sparse_attention(q, k, v, window_size=70, backend=backend)
        for backend in ("flex", "reference")
    )
    assert_close(y, expected)


def test_never_automatic_on_a_cpu():
    rows = explain(sparse_attention, *[torch.zeros(1, 2, 3, 16)] * 3)
    assert [row.backend for row in rows if row.chosen] == ["torch"]
    reasons = {row.backend: row.reason for row in rows}
    assert "only when asked for by name" in reasons["flex"]


def tensors(dim: int = 16, length: int = 3, dtype: torch.dtype = torch.float32, **options):
    return [torch.zeros(1, 2, length, dim, dtype=dtype, **options) for _ in range(3)]


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        (tensors(length=0), {}, "takes no empty tensors"),
        (tensors(dtype=torch.float64), {}, "got torch.float64"),
        (tensors(dim=264), {}, "takes head_dim up to 256, got 264"),
        (tensors(), {"dropout_p": 0.1}, "drops no attention weights, got dropout_p = 0.1"),
        (tensors(requires_grad=True), {}, "has no gradients on a CPU"),
        (tensors(device="meta"), {}, "needs a GPU or a CPU, got a tensor on 'meta'"),
    ],
)
def test_refusals(arguments, options, reason):
    with pytest.raises(ValueError, match=f"backend 'flex' was asked for .*{reason}"):
        sparse_attention(*arguments, **options, backend="flex")


def test_refuses_far_keys_on_a_cpu():
    q, k, v = tensors()
    far = FarKeys(q, k[:, :, None], v[:, :, None], torch.ones(1, 1, 3, 3, dtype=torch.bool), 3)
    with pytest.raises(ValueError, match="has no log-sum-exp on a CPU"):
        sparse_attention(q, k, v, window_size=1, far=far, backend="flex")


def test_a_gpu_needs_triton_and_no_request(monkeypatch):
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(1, 2, 3, 16))
    monkeypatch.setattr(availability, "INSTALLED", False)
    assert "longctx-layers[triton]" in flex.refuse(x, x, x, Pattern(), far=None, dropout_p=0.0)
    monkeypatch.setattr(availability, "INSTALLED", True)
    assert flex.refuse(x, x, x, Pattern(), far=None, dropout_p=0.0) is None
    assert flex.reserve(x) is None


def test_refuses_to_be_compiled_once_more(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match="is not traced by torch.compile"):
        sparse_attention(*tensors(), backend="flex")
