"""Layers of other libraries, each with the same function built from this library.

Before a peer is timed, its results are compared with ours. Shapes are equal as far as the peer
allows: width, heads, window or chunk size, 64 states, no biases and no dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import nn
from torch.testing import assert_close

from benchmarks.speed.common import Shape
from benchmarks.speed.peer_attention import (
    Function,
    build_flex,
    build_local_attention,
    build_masked_sdpa,
    build_sdpa,
    build_x_transformers,
    our_full,
    our_local_attention,
    our_window,
    our_x_transformers,
)
from benchmarks.speed.peer_state_space import (
    build_falcon,
    build_mamba2,
    build_mambapy,
    build_recurrent_gemma,
    our_falcon,
    our_mamba2,
    our_mambapy,
    our_recurrent_gemma,
)

SMALL = Shape(d_model=64, n_heads=4, local=16)
SDPA = "torch SDPA"
MASKED_SDPA = "torch SDPA, window mask"
FLEX = "torch FlexAttention, window"
LOCAL_ATTENTION = "local-attention LocalMHA"
X_TRANSFORMERS = "x-transformers Attention"
MAMBA2 = "HF Mamba2Mixer"
WIDE_MAMBA2 = "HF Mamba2Mixer, expand 2"
FALCON = "HF Falcon-H1 mixers"
RECURRENT_GEMMA = "HF RecurrentGemma recurrent block"
MAMBAPY = "mambapy MambaBlock"


class Peer(NamedTuple):
    """Another library's layer.

    Attributes:
        package: the import name of its package.
        build: makes the module, which maps `[B, T, D]` to `[B, T, D]`.
        ours: the same function of the same weights, built from this library.
        same: what the two have in common, and what differs.
        trains: whether it has a backward pass on the CPU.
        longest: the length beyond which a pass takes minutes, if there is one.
        oldest: the first version of the package that has the layer in this form.
    """

    package: str
    build: Callable[[Shape], nn.Module]
    ours: Callable[[Any, Shape], Function]
    same: str
    trains: bool = True
    longest: int | None = None
    oldest: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if find_spec(self.package) is None:
            return f"{self.package} is not installed: make bench-peers installs it"
        if self.oldest is None:
            return None
        installed = metadata.version(self.package)
        if Version(installed) < Version(self.oldest):
            return f"{self.package} {installed} has this layer in another form than {self.oldest}"
        return None


PEERS = {
    SDPA: Peer("torch", build_sdpa, our_full, "vanilla without rotary embedding"),
    MASKED_SDPA: Peer("torch", build_masked_sdpa, our_window, "window without rotary embedding"),
    FLEX: Peer(
        "torch",
        build_flex,
        our_window,
        "window without rotary embedding",
        trains=False,
    ),
    LOCAL_ATTENTION: Peer(
        "local_attention",
        build_local_attention,
        our_local_attention,
        "window with rotary embedding; at the same window_size it sees one key more",
    ),
    X_TRANSFORMERS: Peer(
        "x_transformers",
        build_x_transformers,
        our_x_transformers,
        "vanilla without rotary embedding",
    ),
    MAMBA2: Peer(
        "transformers", build_mamba2, our_mamba2, "conv_silu and ssd; the inner width is d_model"
    ),
    WIDE_MAMBA2: Peer(
        "transformers",
        partial(build_mamba2, expand=2),
        our_mamba2,
        "conv_silu and ssd; as published, with twice the inner width and twice the heads",
    ),
    FALCON: Peer(
        "transformers",
        build_falcon,
        our_falcon,
        "vanilla in parallel with conv_silu and ssd; norms and feed-forward left out",
        oldest="5.23",
    ),
    RECURRENT_GEMMA: Peer(
        "transformers",
        build_recurrent_gemma,
        our_recurrent_gemma,
        "diagonal_scan; the peer processes tokens one by one",
        longest=2048,
        oldest="5.23",
    ),
    MAMBAPY: Peer(
        "mambapy",
        build_mambapy,
        our_mambapy,
        "conv_silu and ssd, one channel per head, equal rates for the 16 states of a channel",
    ),
}


def check(name: str, shape: Shape = SMALL, length: int = 75) -> None:
    """Compare a peer's output and gradient with ours, at torch's default tolerance for the dtype.

    Raises:
        AssertionError: if they differ.
    """
    peer = PEERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = peer.build(shape)
        ours = peer.ours(module, shape)
        x = torch.randn(1, length, shape.d_model)
        upstream = torch.randn_like(x)

    def results(function: Callable[..., Any]) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_(peer.trains)
        with torch.set_grad_enabled(peer.trains):
            y = function(leaf)
        return [y.detach(), *(torch.autograd.grad(y, leaf, upstream) if peer.trains else ())]

    for theirs, expected in zip(results(module), results(ours), strict=True):
        assert_close(theirs, expected, msg=lambda text: f"{name} and ours differ: {text}")
