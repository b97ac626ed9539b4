"""Second derivatives of the operations, and derivatives under hooks on what backwards keep."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from support.op_cases import build, call

# The kinds of call that have code of their own.
SECOND_ORDER: dict[str, tuple[str, dict[str, Any]]] = {
    "sparse_attention-full": ("sparse_attention", {"options": {"window_size": None}}),
    "sparse_attention-window": ("sparse_attention", {"options": {"window_size": 10}, "prefix": 5}),
    "sparse_attention-chunks": (
        "sparse_attention",
        {"options": {"window_size": None, "chunk_size": 8, "chunk_shift": 3}},
    ),
    "sparse_attention-far": (
        "sparse_attention",
        {"options": {"window_size": 10}, "far": (2, 16, (2, 1), 0.5), "rows": "packed"},
    ),
    "sparse_attention-packed": (
        "sparse_attention",
        {"options": {"window_size": None}, "rows": "packed"},
    ),
    "ssd": ("ssd", {}),
    "ssd-packed": ("ssd", {"rows": "packed"}),
    "block_ssd": ("block_ssd", {"options": {"chunk_size": 8, "chunk_shift": 0}}),
    "block_ssd-packed": (
        "block_ssd",
        {"options": {"chunk_size": 8, "chunk_shift": 2}, "rows": "packed"},
    ),
    "diagonal_scan": ("diagonal_scan", {"invariant": True}),
    "diagonal_scan-packed": ("diagonal_scan", {"rows": "packed"}),
    "conv_silu": ("conv_silu", {}),
    "conv_silu-packed": ("conv_silu", {"rows": "packed"}),
    "gated_norms": ("gated_norms", {}),
}
_PACKED = [(28, 4, {7, 20}), (30, 0, {3})]


def _second_order_call(
    case: str, short: bool = False
) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    name, given = SECOND_ORDER[case]
    full = {"batch": 2, "length": 30, "seed": 0, "options": {}, "strength": 0.5}
    full |= {"invariant": False, "groups": 2, "prefix": 0, **given}
    full["rows"] = _PACKED if "rows" in given else None
    if short:
        full |= {"batch": 1, "length": 9, "rows": [(8, 4, {3})] if "rows" in given else None}
        if "far" in given:
            full["far"] = (2, 16, (1, 1), 0.5)
    if name != "sparse_attention":
        del full["groups"], full["prefix"]
    return name, *build(name, full, torch.float64)


def _loss(name: str, leaves: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """A curved function of all outputs, without what is unspecified at pads."""
    y, *states = call(name, leaves, **options)
    if (segments := options.get("segments")) is not None:
        real = segments.real().unsqueeze(1) if name == "sparse_attention" else segments.real()
        y = torch.where(real.view(*real.shape, *[1] * (y.dim() - real.dim())), y, 0)
    return sum((x.sin() * (n + 1)).sum() for n, x in enumerate([y, *states]))


def assert_second_order(case: str, backend: str) -> None:
    """Gradients of a penalty on all gradients are those of the reference, however one asks."""
    name, tensors, options = _second_order_call(case)

    def derivatives(backend: str, whole: bool) -> list[Tensor]:
        leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
        loss = _loss(name, leaves, {**options, "backend": backend})
        inputs = list(leaves.values())
        if whole:  # as gradient penalties do
            loss.backward(create_graph=True)
            slopes = [x.grad.clone() for x in inputs]
            for x in inputs:
                x.grad = None
            sum((g * g).sum() for g in slopes).backward()
            curved = [x.grad for x in inputs]
        else:  # as Hessian-vector products do: of one input after another
            curved = []
            for x in inputs:
                (slope,) = torch.autograd.grad(loss, x, create_graph=True)
                product = torch.autograd.grad(slope.cos().sum(), x, retain_graph=True)
                curved += product
            slopes = []
        return [x.detach() for x in (*slopes, *curved)]

    for whole in (True, False):
        actual, expected = derivatives(backend, whole), derivatives("reference", whole)
        assert max(x.abs().max() for x in expected) > 1e-3
        assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def assert_hooks_are_harmless(case: str, backend: str) -> None:
    """First and second derivatives under checkpointing, offloading and counting hooks."""
    name, tensors, options = _second_order_call(case)
    options["backend"] = backend
    unpacked: list[int] = []

    def pack(x: Tensor) -> tuple[int, Tensor]:
        unpacked.append(0)
        return len(unpacked) - 1, x

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        unpacked[packed[0]] += 1
        return packed[1]

    def gradients(how: str, second: bool) -> list[Tensor]:
        leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}

        def function(*values: Tensor) -> Tensor:
            return _loss(name, dict(zip(leaves, values, strict=True)), options)

        contexts = {
            "offloaded": partial(torch.autograd.graph.save_on_cpu),
            "counted": partial(torch.autograd.graph.saved_tensors_hooks, pack, unpack),
        }
        with contexts.get(how, nullcontext)():
            if how.startswith("checkpoint"):
                reentrant = how.endswith("reentrant")
                loss = checkpoint(function, *leaves.values(), use_reentrant=reentrant)
            else:
                loss = function(*leaves.values())
        if second:
            slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            loss = sum((g * g).sum() for g in slopes)
        loss.backward()
        return [x.grad for x in leaves.values()]

    for second in (False, True):
        expected = gradients("plain", second)
        for how in ("checkpoint", "checkpoint reentrant", "offloaded", "counted"):
            if second and how.endswith("reentrant"):
                continue  # torch refuses torch.autograd.grad there
            assert_close(gradients(how, second), expected, rtol=1e-12, atol=1e-12)
        if not second:
            assert unpacked
            assert max(unpacked) == 1


def assert_short_second_order(case: str, backend: str) -> None:
    """In one small call: second derivatives, and saved tensors that are read once a pass."""
    name, tensors, options = _second_order_call(case, short=True)
    reads: dict[int, int] = {}

    def pack(x: Tensor) -> tuple[int, Tensor]:
        reads[len(reads)] = 0
        return len(reads) - 1, x

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        reads[packed[0]] += 1
        return packed[1]

    found = []
    for chosen in (backend, "reference"):
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        named = dict(zip(tensors, leaves, strict=True))
        reads.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = _loss(name, named, {**options, "backend": chosen})
        slopes = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        assert reads
        assert max(reads.values()) == 1
        penalty = sum((g * g).sum() for g in slopes)
        found.append([x.detach() for x in (*slopes, *torch.autograd.grad(penalty, leaves))])
    assert_close(*found, rtol=1e-8, atol=1e-8)
