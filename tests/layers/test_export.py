"""torch.export: the same results from the exported program."""

import pytest
import torch
from torch.testing import assert_close

from longctx_layers.testing import LAYER_CASES, small_layer

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("case", LAYER_CASES)
def test_export(case):
    layer = small_layer(case, dtype=torch.float32)
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(layer, (x,)).module()
    assert_close(exported(x), layer(x), **CLOSE)


# Without BLADE's mlp, a loop over chunks, and BigBird, whose number of blocks becomes a constant.
# Only Longformer belongs to the fast tests.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case == "longformer" else pytest.mark.slow)
        for case in LAYER_CASES
        if not case.startswith(("blade-mlp", "bigbird"))
    ],
)
def test_export_for_many_lengths(case):
    layer = small_layer(case, dtype=torch.float32)
    torch.manual_seed(0)
    x = torch.randn(2, 333, 16)
    dynamic = ({1: torch.export.Dim.AUTO},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=dynamic).module()
    for length in (333, 334, 500, 1000):
        x = torch.randn(2, length, 16)
        assert_close(exported(x), layer(x), **CLOSE)
