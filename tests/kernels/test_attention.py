"""The attention kernels: sizes, strides and splits, the log-sum-exp, and the operator."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longctx_layers.kernels import attention, attention_forward
from longctx_layers.ops import FarKeys
from longctx_layers.ops import sparse_attention as operation

pytestmark = pytest.mark.usefixtures("interpret")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def call(length: int, keys: int, far: bool) -> tuple:
    """Arguments of the operator: one row, two heads of one group, a window of 4."""
    q, far_q = draw(1, 2, length, 3), draw(1, 2, length, 3)
    k, v = draw(1, 1, keys, 3), draw(1, 1, keys, 3)
    first = (torch.arange(length, dtype=torch.int32) - 3).clamp(min=length - keys)[None]
    mask = torch.rand(1, 1, length, 2) < 0.5
    lists = -(-length // 4)
    distant = (far_q, draw(1, 1, lists, 2, 3), draw(1, 1, lists, 2, 3), mask)
    return q, k, v, first, *(distant if far else (None,) * 4), 4, 0.5


@pytest.mark.parametrize("dim", [1, 16, 48])
def test_head_dims_and_strides(dim):
    q = draw(20, 2, dim, 4).permute(1, 3, 0, 2)  # no contiguous dimension at all
    k = draw(2, 20, 2, dim).transpose(1, 2)
    v = draw(2, 20, 2, 2 * dim).transpose(1, 2)[..., :dim]
    actual = operation(q, k, v, window_size=18, backend="triton")
    assert_close(actual, operation(q, k, v, window_size=18, backend="reference"))


@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("window", [None, 70])
def test_few_rows_split_over_many_keys(monkeypatch, length, window):
    monkeypatch.setattr(attention_forward, "processors", lambda device: 16)
    q, k, v = draw(1, 4, length, 4), draw(1, 2, 300, 4), draw(1, 2, 300, 4)
    mask = torch.ones(1, 1, length, 2, dtype=torch.bool)
    far = FarKeys(draw(1, 4, length, 4), draw(1, 2, 1, 2, 4), draw(1, 2, 1, 2, 4), mask, length)
    splits = []
    merge = attention_forward._merge
    monkeypatch.setattr(
        attention_forward, "_merge", _Spy(merge, lambda *args: splits.append(args[9]))
    )
    actual = operation(q, k, v, window_size=window, far=far, backend="triton")
    assert len(splits) == 1
    assert splits[0] > 1
    expected = operation(q, k, v, window_size=window, far=far, backend="reference")
    assert_close(actual, expected)


class _Spy:
    """A kernel that tells its arguments before it runs."""

    def __init__(self, kernel, tell):
        self.kernel, self.tell = kernel, tell

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.tell(*args)
            return self.kernel[grid](*args, **kwargs)

        return launch


def test_log_sum_exp_and_its_gradient():
    q, k, v, first, *rest = call(20, 23, far=False)
    q, k = q.requires_grad_(), k.requires_grad_()
    _, actual = attention.sparse_attention(q, k, v, first, *rest)
    scores = q @ k.expand(-1, 2, -1, -1).mT * 0.5
    j = torch.arange(-3, 20)
    seen = (j >= first[0][:, None]) & (j <= torch.arange(20)[:, None])
    expected = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    assert_close(actual, expected)
    weights = draw(*actual.shape)
    gradients = (torch.autograd.grad((x * weights).sum(), (q, k)) for x in (actual, expected))
    assert_close(*gradients)


@pytest.mark.parametrize("heads", [False, True])
def test_offsets_beyond_32_bits(monkeypatch, heads):
    length, dim, stride = 20, 4, 2**29 if heads else 2**27
    # Virtual memory alone: pages that are never touched cost nothing.
    memory = torch.UntypedStorage(2 * length * stride)
    shape, strides = (1, 1, length, dim), (length * stride, dim, stride, 1)
    if heads:  # far apart too
        length, shape, strides = 5, (1, 5, 3, dim), (5 * stride, stride, dim, 1)
    spread = torch.empty(0, dtype=torch.float16).set_(memory, 0, shape, strides)
    x = torch.randn(shape, dtype=torch.float16)
    spread.copy_(x)
    expected = operation(x, x, x, backend="reference")
    for take in (lambda x: x, attention_forward.strided):  # which copies such tensors
        monkeypatch.setattr(attention_forward, "strided", take)
        actual = operation(spread, spread, spread, backend="triton")
        assert_close(actual, expected, rtol=0, atol=1e-2)  # rounding of fp16, not garbage


def far_keys(length: int, block: int, **replaced: Tensor) -> FarKeys:
    lists = -(-length // block)
    mask = torch.ones(1, 1, length, 2, dtype=torch.bool)
    keys = draw(1, 1, lists, 2, 3), draw(1, 1, lists, 2, 3)
    return FarKeys(draw(1, 2, length, 3), *keys, mask, block)._replace(**replaced)


@pytest.mark.parametrize("block", [2**30, 2**31 - 1, 2**62])
def test_blocks_far_longer_than_the_call(block):
    far = far_keys(20, block)
    q, k = draw(1, 2, 20, 3), draw(1, 1, 20, 3)
    gradients = []
    for backend in ("triton", "reference"):
        leaf = far.k.clone().requires_grad_()
        y = operation(q, k, k, window_size=4, far=far._replace(k=leaf), backend=backend)
        gradients.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    assert_close(*gradients)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask": torch.ones(2, 1, 6, 2, dtype=torch.bool)},
        {"mask": torch.ones(1, 2, 6, 2, dtype=torch.bool)},
        {"mask": torch.ones(1, 1, 6, 2)},
        {"k": torch.zeros(1, 1, 2, 2, 3)},
    ],
)
def test_far_keys_that_do_not_fit_are_errors(wrong):
    far, q, k = far_keys(6, 4, **wrong), draw(1, 2, 6, 3), draw(1, 1, 6, 3)
    with pytest.raises((ValueError, TypeError), match=r"far\.(mask|k)"):
        operation(q, k, k, window_size=4, far=far)


def test_empty_calls_are_refused_and_run_elsewhere():
    q = draw(1, 2, 0, 3)
    with pytest.raises(ValueError, match="takes no empty tensors"):
        operation(q, q, q, window_size=4, backend="triton")
    assert operation(q, q, q, window_size=4).shape == q.shape


def test_one_exported_program_for_every_length_of_a_list():
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            far = FarKeys(q, k[:, :, None, :2], v[:, :, None, :2], mask, q.shape[2])
            return operation(q, k, v, window_size=4, far=far, backend="triton")

    inputs = (*call(6, 6, far=False)[:3], torch.ones(1, 1, 6, 2, dtype=torch.bool))
    time = {2: torch.export.Dim.AUTO}
    exported = torch.export.export(Module(), inputs, dynamic_shapes=(time,) * 4)
    longer = [torch.cat([x, x], dim=2) for x in inputs]
    assert_close(exported.module()(*longer), Module()(*longer))


@pytest.mark.parametrize("far", [True, False])
def test_the_operator_is_registered_whole(far):
    inputs = [
        x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in call(5, 6, far)
    ]
    assert torch.autograd.gradcheck(attention.sparse_attention, inputs, fast_mode=True)
    torch.library.opcheck(attention.sparse_attention, tuple(inputs))


def test_compiled_exported_and_on_meta():
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return operation(q, k, v, window_size=4, backend="triton")

    inputs = call(6, 8, far=False)[:3]
    expected = Module()(*inputs)
    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)
    assert_close(compiled(*inputs), expected)
    time = {2: torch.export.Dim.AUTO}
    exported = torch.export.export(Module(), inputs, dynamic_shapes=(time, time, time))
    longer = [torch.cat([x, x], dim=2) for x in inputs]
    assert_close(exported.module()(*longer), Module()(*longer))
    y = Module()(*(x.to("meta") for x in inputs))
    assert (y.shape, y.stride(), y.device.type) == (expected.shape, expected.stride(), "meta")
