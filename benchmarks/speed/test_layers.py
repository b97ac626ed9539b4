"""`make bench`: layers and operations by length; forward, forward with backward, and decode."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed.common import RUNS, Shape, forward
from benchmarks.speed.contenders import case, decode, floors
from benchmarks.speed.operations import OPERATIONS, operation_case
from benchmarks.speed.peers import SDPA
from longctx_layers import LAYERS

SHAPE = Shape(d_model=256, n_heads=4)
LENGTHS = (1024, 4096)
NAMES = [SDPA, *LAYERS, *floors(LAYERS, SHAPE), *OPERATIONS]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", RUNS)
def test_pass(benchmark: BenchmarkFixture, run: str, name: str, length: int) -> None:
    kind = "operations" if name in OPERATIONS else "layers"
    benchmark.group = f"{kind}, {run} at {length}"
    benchmark.pedantic(RUNS[run](case(name, SHAPE, length)), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("context", LENGTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_decode_of_layers(benchmark: BenchmarkFixture, name: str, context: int) -> None:
    benchmark.group = f"layers, one token after {context}"
    run, benchmark.extra_info["state_bytes"] = decode(name, SHAPE, context)
    benchmark.pedantic(run, rounds=50, warmup_rounds=5)


@pytest.mark.parametrize("context", LENGTHS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_decode_of_operations(benchmark: BenchmarkFixture, name: str, context: int) -> None:
    benchmark.group = f"operations, one token after {context}"
    run = forward(operation_case(name, SHAPE, 1, cached=context))
    benchmark.pedantic(run, rounds=50, warmup_rounds=5)
