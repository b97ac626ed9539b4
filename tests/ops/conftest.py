"""What the tests of all operations share: their random inputs, and results with all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longctx_layers import ops
from longctx_layers.ops import FarKeys

HEADS, DIM, STATE = 4, 3, 2


def _shapes(name: str, batch: int, length: int, prefix: int, groups: int) -> dict[str, Any]:
    if name == "sparse_attention":
        keys = (batch, groups, prefix + length, DIM)
        return {"q": (batch, HEADS, length, DIM), "k": keys, "v": keys}
    if name == "diagonal_scan":
        sequence = (batch, length, STATE)
        return {"u": sequence, "log_decay": sequence, "initial_state": (batch, STATE)}
    state = (batch, HEADS, DIM, STATE)
    shapes = {
        "x": (batch, length, HEADS, DIM),
        "dt": (batch, length, HEADS),
        "A": (HEADS,),
        "B": (batch, length, STATE),
        "C": (batch, length, STATE),
    }
    states = ("readable", "pending") if name == "block_ssd" else ("initial_state",)
    return shapes | dict.fromkeys(states, state)


def _call(name: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    if "far.k" in tensors:
        far = {n: tensors[f"far.{n}"] for n in ("q", "k", "v")}
        options = {**options, "far": FarKeys(**far, mask=options["mask"], block=options["block"])}
        del options["mask"], options["block"]
        tensors = {n: x for n, x in tensors.items() if not n.startswith("far.")}
    if name == "sparse_attention":
        return [ops.sparse_attention(**tensors, **options)]
    if name == "block_ssd" and "readable" in tensors:
        states = tensors["readable"], tensors["pending"]
        tensors = {n: x for n, x in tensors.items() if n not in ("readable", "pending")}
        y, final = ops.block_ssd(**tensors, initial_state=states, **options)
        return [y, *final]
    y, final = getattr(ops, name)(**tensors, **options)
    return [y, *(final if name == "block_ssd" else (final,))]


class Bench:
    """Inputs of an operation by its name, and its results."""

    def inputs(
        self,
        name: str,
        batch: int,
        length: int,
        *,
        prefix: int = 0,
        groups: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> dict[str, Tensor]:
        """Random tensors by argument; steps, decays and states in float32 at least."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for key, shape in _shapes(name, batch, length, prefix, groups).items():
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            x = x.abs() if key == "dt" else -x.abs() if key in ("A", "log_decay") else x
            input_like = key in ("q", "k", "v", "x", "B", "C", "u")
            tensors[key] = x.to(dtype if input_like else torch.promote_types(dtype, torch.float32))
        return tensors

    def call(self, name: str, tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
        """The operation's output and final states; `far.q, far.k, far.v` with `mask`, `block`."""
        return _call(name, tensors, options)

    def results(
        self, name: str, tensors: dict[str, Tensor], **options: Any
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs (zero at pads) and final states; gradients of every input by name.

        The loss weighs them with numbers that are the same in every dtype.
        """
        leaves = {n: x.detach().clone().requires_grad_() for n, x in tensors.items()}
        y, *states = self.call(name, leaves, **options)
        assert y.isfinite().all()
        if (segments := options.get("segments")) is not None:
            real = segments.real()
            shape = real.unsqueeze(1) if name == "sparse_attention" else real
            y = torch.where(shape.view(*shape.shape, *[1] * (y.dim() - shape.dim())), y, 0)
        outputs = [y, *states]
        generator = torch.Generator().manual_seed(1)
        weights = [
            (torch.randint(-8, 9, x.shape, generator=generator) / 8).to(x.dtype) for x in outputs
        ]
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), weights, allow_unused=True, materialize_grads=True
        )
        named = {f"output {n}": x.detach() for n, x in enumerate(outputs)}
        return named, dict(zip(leaves, gradients, strict=True))


@pytest.fixture(scope="session")
def bench() -> Bench:
    return Bench()
