"""Calls of the operations that tests of all backends draw, and their results with all gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from longctx_layers import ops
from longctx_layers.ops import FarKeys, Segments
from longctx_layers.testing import assert_within_budget

HEADS, DIM, STATE = 4, 3, 2
SIZES = st.sampled_from([1, 3, 15, 16, 17, 40, 64, 130])


def _shapes(name: str, batch: int, length: int, prefix: int, groups: int) -> dict[str, Any]:
    if name == "sparse_attention":
        keys = (batch, groups, prefix + length, DIM)
        return {"q": (batch, HEADS, length, DIM), "k": keys, "v": keys}
    if name == "gated_norms":
        paths = (batch, length, HEADS, DIM)
        return dict.fromkeys("zos", paths) | dict.fromkeys(("weight_o", "weight_s"), paths[2:])
    if name == "conv_silu":
        shapes = {"x": (batch, length, STATE), "weight": (STATE, 4)}
        return shapes | {"before": (batch, 3, STATE)}
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


def call(name: str, tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The operation's output and final states; `far.q, far.k, far.v` with `mask`, `block`."""
    if "far.k" in tensors:
        far = {n: tensors[f"far.{n}"] for n in ("q", "k", "v")}
        options = {**options, "far": FarKeys(**far, mask=options["mask"], block=options["block"])}
        del options["mask"], options["block"]
        tensors = {n: x for n, x in tensors.items() if not n.startswith("far.")}
    if name in ("sparse_attention", "gated_norms", "conv_silu"):
        return [getattr(ops, name)(**tensors, **options)]
    if name == "block_ssd" and "readable" in tensors:
        states = tensors["readable"], tensors["pending"]
        tensors = {n: x for n, x in tensors.items() if n not in ("readable", "pending")}
        y, final = ops.block_ssd(**tensors, initial_state=states, **options)
        return [y, *final]
    y, final = getattr(ops, name)(**tensors, **options)
    return [y, *(final if name == "block_ssd" else (final,))]


def inputs(
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
        input_like = key in ("q", "k", "v", "x", "B", "C", "u", "z", "o", "s", "before")
        tensors[key] = x.to(dtype if input_like else torch.promote_types(dtype, torch.float32))
    return tensors


def results(
    name: str, tensors: dict[str, Tensor], **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs (zero at pads) and final states; gradients of every input by name.

    The loss weighs them with numbers that are the same in every dtype.
    """
    leaves = {n: x.detach().clone().requires_grad_() for n, x in tensors.items()}
    y, *states = call(name, leaves, **options)
    assert y.isfinite().all()
    if (segments := options.get("segments")) is not None:
        real = segments.real()
        shape = real.unsqueeze(1) if name == "sparse_attention" else real
        y = torch.where(shape.view(*shape.shape, *[1] * (y.dim() - shape.dim())), y, 0)
    outputs = [y, *states]
    generator = torch.Generator().manual_seed(1)
    weights = [(torch.randint(-8, 9, x.shape, generator=generator) / 8).to(x) for x in outputs]
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), weights, allow_unused=True, materialize_grads=True
    )
    named = {f"output {n}": x.detach() for n, x in enumerate(outputs)}
    return named, dict(zip(leaves, gradients, strict=True))


@st.composite
def rows(draw: Any, length: int) -> tuple[int, int, set[int]]:
    """A row's number of real tokens, those before the call, and where segments begin."""
    count = draw(st.integers(0, length))
    begins = draw(st.sets(st.integers(0, max(count - 1, 0)), max_size=6))
    # A row of pads alone can only go on where an earlier call stopped.
    return count, draw(st.integers(0 if count else 1, 20)), begins if count else set()


@st.composite
def chunks(draw: Any) -> dict[str, int]:
    size = draw(SIZES)
    return {"chunk_size": size, "chunk_shift": draw(st.integers(0, size - 1))}


@st.composite
def cases(draw: Any, name: str, lengths: list[int]) -> dict[str, Any]:
    """Plain numbers from which `build` makes a call."""
    batch, length = draw(st.integers(1, 3)), draw(st.sampled_from(lengths))
    packed = st.lists(rows(length), min_size=batch, max_size=batch)
    packed = st.none() if name == "gated_norms" else st.none() | packed
    case = {"batch": batch, "length": length, "rows": draw(packed)}
    case |= {"seed": draw(st.integers(0, 99)), "options": {}}
    if name == "block_ssd":
        case["options"] = draw(chunks())
    if name == "sparse_attention":
        options = {"window_size": draw(st.none() | SIZES), **draw(chunks() | st.just({}))}
        case["options"] = {**options, "scale": draw(st.sampled_from([None, 0.7]))}
        case["groups"] = draw(st.sampled_from([1, 2, 4]))
        case["prefix"] = draw(st.sampled_from([0, 3, 40]))
        one_list = options == {"window_size": None}
        blocks = st.just(length) if one_list else st.sampled_from([5, 16, 64, 9999])
        masks = st.sampled_from([(1, 1), (batch, 1), (1, case["groups"])])
        densities = st.sampled_from([0.0, 0.5, 1.0])
        case["far"] = draw(st.none() | st.tuples(st.integers(1, 3), blocks, masks, densities))
    elif name not in ("gated_norms", "conv_silu"):
        case["strength"] = draw(st.sampled_from([0.01, 1.0, 30.0]))
        case["invariant"] = draw(st.booleans())
    return case


def build(
    name: str, case: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs and options of the call."""
    batch, length, options = case["batch"], case["length"], dict(case["options"])
    shape = {n: case[n] for n in ("groups", "prefix") if n in case}
    tensors = inputs(name, batch, length, seed=case["seed"], dtype=dtype, **shape)
    for key in {"dt", "log_decay"} & set(tensors):
        tensors[key] *= case["strength"]
    if "log_decay" in tensors and case["invariant"]:
        tensors["log_decay"] = tensors["log_decay"][0, 0]
    if case.get("far") is not None:
        count, options["block"], mask, density = case["far"]
        generator = torch.Generator().manual_seed(case["seed"])
        lists = (batch, case["groups"], -(-length // options["block"]), count, 3)
        far = {"far.q": (batch, 4, length, 3), "far.k": lists, "far.v": lists}
        tensors |= {n: torch.randn(s, generator=generator).to(dtype) for n, s in far.items()}
        options["mask"] = torch.rand(*mask, length, count, generator=generator) < density
    if case["rows"] is not None:
        starts = [
            [max((b for b in begins if b <= t), default=-position) for t in range(length)]
            for _, position, begins in case["rows"]
        ]
        counts = [count for count, _, _ in case["rows"]]
        options["segments"] = Segments(torch.tensor(starts), torch.tensor(counts))
    return tensors, options


def assert_equal_in_float64(name: str, case: dict[str, Any], backend: str = "auto") -> None:
    """Outputs, final states and all gradients are those of the reference."""
    tensors, options = build(name, case, torch.float64)
    actual = results(name, tensors, **options, backend=backend)
    expected = results(name, tensors, **options, backend="reference")
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def assert_as_precise(
    name: str,
    case: dict[str, Any],
    dtype: torch.dtype,
    backend: str = "auto",
    device: torch.device | str = "cpu",
) -> None:
    """Errors are those of the reference in the same dtype."""
    to_device = partial(tree_map_only, Tensor, lambda x: x.to(device))
    tensors, options = to_device(build(name, case, dtype))
    wide = {n: x.double() for n, x in tensors.items()}
    actual = results(name, tensors, **options, backend=backend)
    own = results(name, tensors, **options, backend="reference")
    exact = results(name, wide, **options, backend="reference")
    for kind, found in enumerate(actual):
        # Gradients meet on their way, and small ones are differences of large ones.
        scale = max(x.abs().max().item() for x in exact[kind].values()) if kind else None
        for key, x in found.items():
            assert_within_budget(x, own[kind][key], exact[kind][key], scale=scale)
