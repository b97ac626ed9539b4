"""State-space layers of other libraries, each with an equivalent built from our operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from benchmarks.speed.common import Shape
from benchmarks.speed.peer_attention import Function, with_weights
from longctx_layers import CausalAttention, ops

N_STATES = 64


class Called(nn.Module):
    """A module that needs more than `module(x)`, behind that signature."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


def build_mamba2(shape: Shape, expand: int = 1) -> nn.Module:
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=shape.d_model,
        expand=expand,
        num_heads=expand * shape.n_heads,
        head_dim=shape.d_model // shape.n_heads,
        state_size=N_STATES,
        n_groups=1,
        chunk_size=shape.local,
        use_conv_bias=False,
        num_hidden_layers=1,
    )
    return Mamba2Mixer(config, layer_idx=0)


def selective(peer: Any, x: Tensor) -> Tensor:
    """Mamba-2 up to its output projection, computed by our operations with a peer's weights."""
    inner = peer.intermediate_size
    states = peer.ssm_state_size
    gate, z, dt = peer.in_proj(x).split([inner, inner + 2 * states, peer.num_heads], dim=-1)
    u, B, C = ops.conv_silu(z, peer.conv1d.weight[:, 0]).split([inner, states, states], dim=-1)
    u = rearrange(u, "b t (h p) -> b t h p", h=peer.num_heads)
    y, _ = ops.ssd(u, F.softplus(dt + peer.dt_bias), -torch.exp(peer.A_log), B, C)
    y = rearrange(y + peer.D[:, None] * u, "b t h p -> b t (h p)") * F.silu(gate)
    if isinstance(peer.norm, nn.Identity):
        return y
    return F.rms_norm(y, y.shape[-1:], peer.norm.weight, peer.norm.variance_epsilon)


def our_mamba2(peer: Any, shape: Shape) -> Function:
    return lambda x: peer.out_proj(selective(peer, x))


def build_falcon(shape: Shape) -> nn.Module:
    """The mixers of a layer, attention and Mamba-2 in parallel, without norms and feed-forward."""
    from transformers.models.falcon_h1.configuration_falcon_h1 import FalconH1Config
    from transformers.models.falcon_h1.modeling_falcon_h1 import (
        FalconH1DecoderLayer,
        FalconH1RotaryEmbedding,
        compute_mup_vector,
    )

    config = FalconH1Config(  # type: ignore[call-arg]  # its fields leave out those of the base
        hidden_size=shape.d_model,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_heads,
        mamba_n_heads=shape.n_heads,
        mamba_d_head=shape.d_model // shape.n_heads,
        mamba_d_ssm=shape.d_model,
        mamba_d_state=N_STATES,
        mamba_chunk_size=shape.local,
        mamba_conv_bias=False,
        attn_implementation="sdpa",
    )
    layer = FalconH1DecoderLayer(config, layer_idx=0)
    layer.mamba.register_buffer("mup_vector", compute_mup_vector(config), persistent=False)
    for name in ("input_layernorm", "pre_ff_layernorm", "feed_forward"):
        setattr(layer, name, nn.Identity())
    rotary = FalconH1RotaryEmbedding(config)

    def call(module: Any, x: Tensor) -> Tensor:
        table = rotary(x, torch.arange(x.shape[1])[None])
        y, _ = module.self_attn(x, position_embeddings=table, attention_mask=None)
        return module.mamba(x) + y

    return Called(layer, call)


def our_falcon(peer: Any, shape: Shape) -> Function:
    mamba = peer.module.mamba
    attention = peer.module.self_attn
    qkv = [z.weight for z in (attention.q_proj, attention.k_proj, attention.v_proj)]
    layer = CausalAttention(shape.d_model, shape.n_heads)
    full = with_weights(layer, qkv, attention.o_proj.weight)
    return lambda x: mamba.out_proj(selective(mamba, x)) + full(x)


def build_recurrent_gemma(shape: Shape) -> nn.Module:
    """The recurrent block: two branches, a short convolution and a gated linear recurrence."""
    from transformers.models.recurrent_gemma.configuration_recurrent_gemma import (
        RecurrentGemmaConfig,
    )
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
        RecurrentGemmaRecurrentBlock,
    )

    config = RecurrentGemmaConfig(
        hidden_size=shape.d_model,
        lru_width=shape.d_model,
        num_attention_heads=shape.n_heads,
        num_hidden_layers=1,
    )
    block = RecurrentGemmaRecurrentBlock(config, layer_idx=0)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "rg_lru" in name:  # created uninitialised
                parameter.normal_(std=shape.n_heads**0.5 * shape.d_model**-0.5)

    def call(module: Any, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])[None]
        return module(x, positions, attention_mask=None, use_cache=False)[0]

    return Called(block, call)


def our_recurrent_gemma(peer: Any, shape: Shape) -> Function:
    block = peer.module
    unit = block.rg_lru

    def gate(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        heads = rearrange(u, "b t (h p) -> b t h p", h=len(weight))
        y = torch.sigmoid(einsum(heads, weight, "b t h p, h p q -> b t h q") + bias)
        return rearrange(y, "b t h q -> b t (h q)")

    def run(x: Tensor) -> Tensor:
        u = rearrange(block.linear_x(x), "b t d -> b d t")
        u = rearrange(block.conv_1d(u)[..., : x.shape[1]], "b d t -> b t d")
        decay = gate(u, unit.recurrent_gate_weight, unit.recurrent_gate_bias)
        log_decay = -8 * decay * F.softplus(unit.recurrent_param)
        u = u * gate(u, unit.input_gate_weight, unit.input_gate_bias)
        scale = torch.sqrt(-torch.expm1(2 * log_decay))
        is_first = torch.arange(x.shape[1])[:, None] == 0  # the first token is not scaled
        h, _ = ops.diagonal_scan(u * torch.where(is_first, 1, scale), log_decay)
        return block.linear_out(h * F.gelu(block.linear_y(x), approximate="tanh"))

    return run


def build_mambapy(shape: Shape) -> nn.Module:
    """Mamba-1 as published: twice the width inside, and a state for every channel."""
    from mambapy.mamba import MambaBlock, MambaConfig

    config = MambaConfig(shape.d_model, n_layers=1, d_state=16, conv_bias=False)
    return MambaBlock(config)


def our_mambapy(peer: Any, shape: Shape) -> Function:
    """Mamba-1 has a decay for each channel: here each channel is a head of its own.

    Its rates also differ between the states of a channel, while ours do not. They are made equal.
    """
    with torch.no_grad():
        peer.A_log.copy_(peer.A_log[:, :1].expand_as(peer.A_log) + torch.rand(len(peer.A_log), 1))
    states = peer.config.d_state
    rank = peer.config.dt_rank

    def run(x: Tensor) -> Tensor:
        z, gate = peer.in_proj(x).chunk(2, dim=-1)
        u = ops.conv_silu(z, peer.conv1d.weight[:, 0])
        dt, B, C = peer.x_proj(u).split([rank, states, states], dim=-1)
        A = -torch.exp(peer.A_log[:, 0])
        y, _ = ops.ssd(u[..., None], F.softplus(peer.dt_proj(dt)), A, B, C)
        return peer.out_proj((y.squeeze(-1) + peer.D * u) * F.silu(gate))

    return run
