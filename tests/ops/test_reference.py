"""The torch path of each operation equals its reference: outputs, states and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longctx_layers.ops import Segments
from longctx_layers.testing import assert_within_budget

NAMES = pytest.mark.parametrize("name", ["sparse_attention", "ssd", "block_ssd", "diagonal_scan"])
# Around the edges of blocks (16 to 128), of tiles (64), and of those of full attention (256).
EDGES = [1, 2, 5, 16, 17, 63, 64, 65, 127, 128, 129, 200, 255, 257]
MANY = [511, 512, 513, 1025]
FEWER = settings(max_examples=max(settings.default.max_examples * 2 // 5, 1))
SIZES = st.sampled_from([1, 3, 15, 16, 17, 40, 64, 130])


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
    case = {"batch": batch, "length": length, "rows": draw(st.none() | packed)}
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
    else:
        case["strength"] = draw(st.sampled_from([0.01, 1.0, 30.0]))
        case["invariant"] = draw(st.booleans())
    return case


def build(bench: Any, name: str, case: dict[str, Any], dtype: torch.dtype) -> Any:
    """Inputs and options of the call."""
    batch, length, options = case["batch"], case["length"], dict(case["options"])
    shape = {n: case[n] for n in ("groups", "prefix") if n in case}
    tensors = bench.inputs(name, batch, length, seed=case["seed"], dtype=dtype, **shape)
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


def assert_equal_in_float64(bench: Any, name: str, case: dict[str, Any]) -> None:
    tensors, options = build(bench, name, case, torch.float64)
    actual = bench.results(name, tensors, **options)
    expected = bench.results(name, tensors, **options, backend="reference")
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@NAMES
@given(data=st.data())
def test_equal_in_float64(bench, name, data):
    assert_equal_in_float64(bench, name, data.draw(cases(name, EDGES)))


@NAMES
@given(data=st.data())
@settings(max_examples=4)
def test_equal_in_float64_over_many_tiles(bench, name, data):
    assert_equal_in_float64(bench, name, data.draw(cases(name, MANY)))


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(data=st.data())
@FEWER
def test_as_precise_as_the_reference(bench, name, dtype, data):
    tensors, options = build(bench, name, data.draw(cases(name, [1, 17, 65, 129])), dtype)
    wide = {n: x.double() for n, x in tensors.items()}
    actual = bench.results(name, tensors, **options)
    own = bench.results(name, tensors, **options, backend="reference")
    exact = bench.results(name, wide, **options, backend="reference")
    for kind, results in enumerate(actual):
        # Gradients meet on their way, and small ones are differences of large ones.
        scale = max(x.abs().max().item() for x in exact[kind].values()) if kind else None
        for key, x in results.items():
            assert_within_budget(x, own[kind][key], exact[kind][key], scale=scale)
