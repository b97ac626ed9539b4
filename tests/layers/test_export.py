"""torch.export: the same results from the exported program."""

import pytest
import torch
from torch.testing import assert_close

from longctx_layers.testing import LAYER_CASES, small_layer

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


# One of each kind belongs to the fast tests.
KINDS = ("vanilla", "dpassm", "dpassm-diagonal", "blade-memory", "longformer-biased", "bigbird")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in KINDS else pytest.mark.slow) for case in LAYER_CASES],
)
def test_export(case):
    layer = small_layer(case, dtype=torch.float32)
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(layer, (x,)).module()
    assert_close(exported(x), layer(x), **CLOSE)


# Without BLADE's mlp, a loop over chunks, and BigBird, whose number of blocks becomes a constant.
# Two belong to the fast tests.
FAST = ("dpassm-global", "blade-shift")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in FAST else pytest.mark.slow)
        for case in LAYER_CASES
        if not case.startswith(("blade-mlp", "bigbird"))
    ],
)
def test_export_for_many_lengths(case):
    layer = small_layer(case, dtype=torch.float32)
    torch.manual_seed(0)
    x = torch.randn(2, 300, 16)
    dynamic = ({1: torch.export.Dim.AUTO},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=dynamic).module()
    # Shorter and longer, and around the edges of blocks, of tiles, and of 32 tiles.
    for length in (16, 63, 64, 65, 300, 2047, 2048, 2049, 4100):
        x = torch.randn(2, length, 16)
        assert_close(exported(x), layer(x), **CLOSE)
