"""The two flash-attn libraries as far as the adapter calls them, in plain torch.

Names, order and defaults of the arguments are the libraries' own (flash-attn 2.8.3, flash-attn-4
4.0.0b36; `tests/ops/test_flash.py` compares them with one that is installed), and so are what a
window means, the shapes of log-sum-exps, and what is asserted of the inputs. Results come from the
formulas, in float32 at least. Unlike the libraries it takes float64, to be compared exactly.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from longctx_layers.ops import operation
from longctx_layers.ops.attention import flash


class Problem:
    """Scores of a call, and what a dropout leaves of their weights: both `[H, queries, keys]`.

    Without `cu_seqlens` the sequences are the rows of a batch. Here all are packed into one.
    """

    def __init__(self, q, k, v, scale, window, dropout_p, seed, packing):
        self.batch, self.scale = None if packing else len(q), scale
        for x in (q, k, v):
            assert x.dtype == q.dtype, "query and key must have the same dtype"
            assert x.stride(-1) == 1, "Input tensor must have contiguous last dimension"
            assert x.dim() == (3 if packing else 4)
        assert q.shape[-1] % 8 == 0, "head_size should be a multiple of 8"
        assert q.shape[-1] <= 256, "only supports head dimension at most 256"
        sequence, before_end = [], []
        for n, x in enumerate((q, k)):
            begins = packing[n] if packing else torch.arange(len(x) + 1) * x.shape[1]
            sizes = begins.diff()
            if packing:
                assert begins.dtype == torch.int32, "cu_seqlens_q must have dtype int32"
                assert packing[n + 2] == sizes.max(), "a lower bound fails, a higher one is slow"
            assert begins[-1] == self.pack(x).shape[0]
            sequence.append(torch.repeat_interleave(sizes))
            before_end.append(begins[1:].repeat_interleave(sizes) - torch.arange(begins[-1]))
        # Bottom-right aligned: the last query is level with the last key.
        offset = before_end[0][:, None] - before_end[1]
        left, right = window
        sees = sequence[0][:, None] == sequence[1]
        sees &= (offset >= -left if left >= 0 else True) & (offset <= right if right >= 0 else True)
        self.dtype, self.precise = q.dtype, torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = (self.pack(x) for x in (q, k, v))
        self.share = self.q.shape[1] // self.k.shape[1]
        scores = torch.einsum("thp,shp->hts", self.q, self.repeat(self.k)) * scale
        self.scores = scores.masked_fill(~sees, -math.inf)
        generator = torch.Generator().manual_seed(int(seed[0]))
        kept = torch.rand(scores.shape, generator=generator) >= dropout_p
        self.kept = (kept / (1 - dropout_p)).to(self.precise)

    def pack(self, x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x if self.batch is None else x.flatten(0, 1)

    def unpack(self, x):
        return x if self.batch is None else x.unflatten(0, (self.batch, -1))

    def repeat(self, x):
        return x.repeat_interleave(self.share, 1)

    def forward(self):
        """Outputs, and log-sum-exps `[B, H, T]`, or `[H, total]`."""
        weights = self.scores.softmax(-1) * self.kept
        y = torch.einsum("hts,shp->thp", weights, self.repeat(self.v))
        lse = self.scores.logsumexp(-1)
        return self.unpack(y).to(self.dtype), self.unpack(lse.mT).mT.contiguous()

    def backward(self, dout, out, lse, *grads):
        """As the kernels do, out of the output and the log-sum-exp that they are given."""
        for x in (out, dout, *grads):
            assert x.dtype == self.dtype, "query and out must have the same dtype"
            assert x.stride(-1) == 1
        assert lse.is_contiguous()
        assert lse.dtype == self.precise
        assert lse.shape == self.unpack(self.q[..., 0]).mT.shape
        dout, out, lse = self.pack(dout), self.pack(out), self.pack(lse.mT).mT
        weights = (self.scores - lse[..., None]).exp()
        dp = torch.einsum("thp,shp->hts", dout, self.repeat(self.v)) * self.kept
        ds = weights * (dp - (dout * out).sum(-1).mT[..., None]) * self.scale
        dq = torch.einsum("hts,shp->thp", ds, self.repeat(self.k))
        dk = torch.einsum("hts,thp->shp", ds, self.q)
        dv = torch.einsum("hts,thp->shp", weights * self.kept, dout)
        dk, dv = (x.unflatten(1, (-1, self.share)).sum(2) for x in (dk, dv))
        for grad, x in zip(grads, (dq, dk, dv), strict=True):
            grad.copy_(self.unpack(x))


def _random() -> Tensor:
    return torch.randint(2**31, (2,))


class Version2:
    """What flash_attn and flash_attn.flash_attn_interface of version 2 hold."""

    @staticmethod
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        window = (window_size[0], 0 if causal else window_size[1])
        return Problem(q, k, v, softmax_scale, window, dropout_p, _random(), ()).forward()[0]

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        window = (window_size[0], 0 if causal else window_size[1])
        packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return Problem(q, k, v, softmax_scale, window, dropout_p, _random(), packing).forward()[0]

    @staticmethod
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        window, seed = (window_size_left, 0 if causal else window_size_right), _random()
        y, lse = Problem(q, k, v, softmax_scale, window, dropout_p, seed, ()).forward()
        return y, lse, torch.empty(0), seed

    @staticmethod
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        window, seed = (window_size_left, 0 if causal else window_size_right), _random()
        packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        y, lse = Problem(q, k, v, softmax_scale, window, dropout_p, seed, packing).forward()
        return y, lse, torch.empty(0), seed

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        window = (window_size_left, 0 if causal else window_size_right)
        problem = Problem(q, k, v, softmax_scale, window, dropout_p, rng_state, ())
        problem.backward(dout, out, softmax_lse, dq, dk, dv)

    @staticmethod
    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        window = (window_size_left, 0 if causal else window_size_right)
        packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        problem = Problem(q, k, v, softmax_scale, window, dropout_p, rng_state, packing)
        problem.backward(dout, out, softmax_lse, dq, dk, dv)


class Version4:
    """What flash_attn.cute of version 4 holds: None, not -1, opens a window."""

    @staticmethod
    def flash_attn_func(
        q, k, v, *, softmax_scale=None, causal=False, window_size=(None, None),
        deterministic=False, return_lse=False,
    ):  # fmt: skip
        window = (-1 if window_size[0] is None else window_size[0], 0 if causal else -1)
        y, lse = Problem(q, k, v, softmax_scale, window, 0.0, _random(), ()).forward()
        return y, lse if return_lse else None

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, window_size=(None, None), deterministic=False,
        return_lse=False,
    ):  # fmt: skip
        window = (-1 if window_size[0] is None else window_size[0], 0 if causal else -1)
        packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        y, lse = Problem(q, k, v, softmax_scale, window, 0.0, _random(), packing).forward()
        return y, lse if return_lse else None


FUNCTIONS = {
    (2, "flash_attn"): ["flash_attn_func", "flash_attn_varlen_func"],
    (2, "flash_attn.flash_attn_interface"): [
        "_flash_attn_forward",
        "_flash_attn_varlen_forward",
        "_flash_attn_backward",
        "_flash_attn_varlen_backward",
    ],
    (4, "flash_attn.cute"): ["flash_attn_func", "flash_attn_varlen_func"],
}


def stand_in(version: int, name: str):
    """The stand-in for a library's function."""
    return getattr({2: Version2, 4: Version4}[version], name)


@contextmanager
def installed(version: int) -> Iterator[None]:
    """As if this version were installed and ran on the CPU."""
    package = ModuleType("flash_attn")
    modules = {"flash_attn": package}
    for (number, module), names in FUNCTIONS.items():
        if number == version:
            held = modules.setdefault(module, ModuleType(module))
            for name in names:
                setattr(held, name, stand_in(version, name))
            setattr(package, module.rpartition(".")[2], held)
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        with (
            mock.patch.object(flash, "choose", return_value=(version, None)),
            mock.patch.dict(operation.KINDS, flash=operation.Kind(eager=True)),
        ):
            yield
    finally:
        # Not mock.patch.dict, which also forgets what torch imported in the meantime.
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)
