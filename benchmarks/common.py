"""What is measured: every layer of the registry beside torch's own full causal attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx_layers import LAYERS, build_layer
from longctx_layers.layers import layer_options

SDPA = "torch SDPA"
LOCAL_OPTIONS = ("window_size", "chunk_size")


class FullAttention(nn.Module):
    """Full causal attention as a user of plain torch would write it."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        q, k, v = (
            z.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for z in self.qkv(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2)), None


def contenders(d_model: int, n_heads: int, local: int) -> dict[str, nn.Module]:
    """torch's attention and every layer, with windows and chunks of `local` tokens."""
    found: dict[str, nn.Module] = {SDPA: FullAttention(d_model, n_heads)}
    for name in LAYERS:
        options = {key: local for key in LOCAL_OPTIONS if key in layer_options(name)}
        found[name] = build_layer(name, d_model, n_heads, **options)
    return found


def forward(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    """One pass without gradients."""

    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def forward_backward(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    """One pass and the gradients of x and of all parameters."""

    def run() -> None:
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        layer(x)[0].sum().backward()

    return run
