"""What the interpreted tests of all kernels start from."""

import pytest
from interpreter import interpreted

from longctx_layers.ops import triton_support


@pytest.fixture
def interpret(monkeypatch):
    """Triton's backend accepts CPU tensors, and the interpreter runs its kernels."""
    monkeypatch.setattr(triton_support, "refuse", lambda x: None)
    with interpreted():
        yield
