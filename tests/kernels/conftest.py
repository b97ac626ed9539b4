"""What the interpreted tests of all kernels start from."""

import pytest
from interpreter import interpreted

from longctx_layers.kernels import conv_silu, diagonal, gated_norms
from longctx_layers.ops import triton_support

# Small programs, so that short inputs have many of them, and edges.
SIZES = {
    conv_silu: {"TOKENS": 8, "CHANNELS": 4},
    diagonal: {"TILE": 16, "CHANNELS": 4},
    gated_norms: {"ELEMENTS": 32},
}


@pytest.fixture
def interpret(monkeypatch):
    """Triton's backend accepts CPU tensors, and the interpreter runs its kernels."""
    monkeypatch.setattr(triton_support, "refuse_device", lambda device: None)
    for module, sizes in SIZES.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)
    with interpreted():
        yield
