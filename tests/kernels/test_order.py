"""Results do not depend on the order in which programs run: the same bits every time."""

import pytest
import torch
from support.op_cases import inputs, results
from support.sizes import LENGTHS

from benchmarks.kernels.interpreter import interpreted
from longctx_layers.ops import Segments

pytestmark = pytest.mark.usefixtures("small")

OPTIONS = {"sparse_attention": {"window_size": 20}, "block_ssd": {"chunk_size": 24}}


# block_ssd runs the kernels of ssd, and more of each.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "ssd" else n for n in LENGTHS]
)
def test_the_same_bits_in_any_order(name):
    length = max(LENGTHS[name])
    tensors = inputs(name, 2, length, dtype=torch.float32)
    options = OPTIONS.get(name, {})
    if name != "gated_norms":
        start = torch.tensor([[0] * length, [0] * 5 + [5] * (length - 5)])
        options = {**options, "segments": Segments(start, torch.tensor([length, length - 3]))}
    found = []
    for order in (0, 1, None):
        with interpreted(order):
            outputs, gradients = results(name, tensors, **options, backend="triton")
        found.append([*outputs.values(), *gradients.values()])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
