"""`make bench`: layers of other libraries by length, after a comparison with ours."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed.common import RUNS, Shape
from benchmarks.speed.contenders import case
from benchmarks.speed.peers import PEERS, check

SHAPE = Shape(d_model=256, n_heads=4)
LENGTHS = (1024, 4096)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("run", RUNS)
def test_pass(benchmark: BenchmarkFixture, run: str, name: str, length: int) -> None:
    peer = PEERS[name]
    if peer.missing:
        pytest.skip(peer.missing)
    if run != "forward" and not peer.trains:
        pytest.skip(f"{name} has no backward pass on the CPU")
    if length > (peer.longest or length):
        pytest.skip(f"{name} takes minutes beyond {peer.longest} tokens")
    check(name)
    benchmark.group = f"peers, {run} at {length}"
    benchmark.pedantic(RUNS[run](case(name, SHAPE, length)), rounds=5, warmup_rounds=1)
