"""`make bench`: forward, forward with backward, and decode of every layer, by length."""

from __future__ import annotations

import pytest
import torch
from common import SDPA, contenders, forward, forward_backward

LENGTHS = (1024, 4096)
NAMES = list(contenders(48, 4, 16))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", [forward, forward_backward])
def test_layer(benchmark, run, name, length):
    layer = contenders(256, 4, 128)[name]
    x = torch.randn(1, length, 256, requires_grad=True)
    benchmark.group = f"{run.__name__} at {length}"
    benchmark.pedantic(run(layer, x), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", [name for name in NAMES if name != SDPA])
def test_decode(benchmark, name):
    layer = contenders(256, 4, 128)[name]
    with torch.no_grad():
        _, state = layer(torch.randn(1, 4096, 256))
        token = torch.randn(1, 1, 256)
        benchmark.group = "one token after 4096"
        benchmark.pedantic(lambda: layer(token, state), rounds=50, warmup_rounds=5)
