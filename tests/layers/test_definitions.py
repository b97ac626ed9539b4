"""Each layer computes its formula, written down here independently, for all pairs of tokens."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from longctx_layers.ops.attention.far import random_positions
from longctx_layers.testing import LAYER_CASES, small_layer

T = 140
i = torch.arange(T)[:, None]  # queries
j = torch.arange(T)  # keys


def rotated(layer, x):
    """RoPE on `[T, H, P]`: pairs of halves are complex numbers, turned by the position."""
    if layer.rope_base is None:
        return x
    half, scaling = x.shape[-1] // 2, layer.projection.rope_scaling
    wavelength = 2 * math.pi * layer.rope_base ** (torch.arange(half, dtype=x.dtype) / half)
    if scaling is not None:
        turns = scaling.original_length / wavelength
        kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
        wavelength = wavelength / (kept + (1 - kept) / scaling.factor)
    angle = i * (2 * math.pi / wavelength)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def heads(layer, x):
    """`[T, h * P]` to `[T, H, P]`, each key head repeated for the query heads that it serves."""
    x = x.unflatten(-1, (-1, layer.head_dim))
    return x.repeat_interleave(layer.n_heads // x.shape[1], 1)


def attention(layer, u, near, far=None):
    """Near keys by position `[T, T]`, far ones `(k, v, mask [H or 1, T, F])` by content alone."""
    q, k, v = (heads(layer, project(u)) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = normed(layer.q_norm, q), normed(layer.k_norm, k)
    turned_q, turned_k = rotated(layer, q), rotated(layer, k)
    scores = torch.einsum("ihp,jhp->hij", turned_q, turned_k).masked_fill(~near, -math.inf)
    if far is not None:
        far_k, far_v, mask = far(k, v)
        more = torch.einsum("ihp,fhp->hif", q, far_k).masked_fill(~mask, -math.inf)
        scores, v = torch.cat([scores, more], -1), torch.cat([v, far_v])
    return torch.einsum("hij,jhp->ihp", (scores / math.sqrt(layer.head_dim)).softmax(-1), v)


def windowed(layer, u):
    """Window and global tokens, which have projections of their own."""
    n, window = layer.n_global_tokens, layer.window_size

    def far(k, v):
        k, v = (heads(layer, p(u[:n])) for p in (layer.global_k_proj, layer.global_v_proj))
        return normed(layer.k_norm, k), v, j[:n] <= i - window

    return attention(layer, u, (j <= i) & (j > i - window), far if n else None)


def chunk_of(layer, position):
    return torch.div(position - layer.chunk_shift, layer.chunk_size, rounding_mode="floor")


def chunked(layer, u):
    """Chunks and memory tokens."""

    def memory(k, v):
        mask = torch.ones(T, layer.n_memory_tokens, dtype=torch.bool)
        return *(heads(layer, m.flatten(1)) for m in (layer.memory_k, layer.memory_v)), mask

    near = (j <= i) & (chunk_of(layer, i) == chunk_of(layer, j))
    return attention(layer, u, near, memory if layer.n_memory_tokens else None)


def selective(layer, u, reads):
    """Sum over the j that i reads of `a_(j+1) ... a_i dt_j (B_j C_i) x_j`, and x."""
    space, N = layer.state_space, layer.state_space.state_dim
    z = F.pad(space.in_proj(u), (0, 0, 3, 0))
    z = F.silu(sum(z[n : n + T] * space.conv[:, n] for n in range(4)))
    x, B, C = z[:, : -2 * N].unflatten(-1, (layer.n_heads, -1)), z[:, -2 * N : -N], z[:, -N:]
    dt = F.softplus(space.dt_proj(u) + space.dt_bias)
    log_decay = (-torch.exp(space.A_log) * dt).cumsum(0).T
    decay = (log_decay[:, :, None] - log_decay[:, None]).masked_fill(~reads, -math.inf).exp()
    return torch.einsum("hij,jh,jn,in,jhp->ihp", decay, dt, B, C, x) + space.skip[:, None] * x


def diagonal(layer, u):
    space = layer.state_space
    powers = torch.exp(-torch.exp(space.log_rate) * (i - j).clamp(min=0)[..., None])
    h = torch.einsum("ijn,jn->in", powers * (j <= i)[..., None], space.B_proj(u))
    return space.C_proj(h).unflatten(-1, (layer.n_heads, -1))


def normed(norm, x):
    return (
        x if norm is None else x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    )


def dpassm(layer, u):
    o = windowed(layer, u)
    if layer.ssm is None:
        return o
    if layer.ssm == "diagonal":
        s = diagonal(layer, u)
    else:
        s = selective(layer, u, j <= i)
    g = torch.sigmoid(layer.gate_proj(u)).unflatten(-1, (layer.n_heads, -1))
    if layer.fuse == "residual":
        return o + (1 - g) * normed(layer.norm_s, s)
    return g * normed(layer.norm_o, o) + (1 - g) * normed(layer.norm_s, s)


def blade(layer, u):
    if layer.state_update == "mlp":
        return blade_mlp(layer, u)
    o = chunked(layer, u)
    if layer.state_update is None:
        return o
    r = selective(layer, u, chunk_of(layer, j) < chunk_of(layer, i))
    g = torch.sigmoid(layer.gate_proj(u)).unflatten(-1, (layer.n_heads, -1))
    return g * normed(layer.norm_o, o) + (1 - g) * normed(layer.norm_r, r)


def blade_mlp(layer, u):
    mlp, chunk = layer.mlp, chunk_of(layer, j)
    h = u.new_zeros(layer.state_dim)
    injected, outputs = torch.zeros_like(u), []
    for c in chunk.unique():
        injected[chunk == c] = u[chunk == c] + mlp.inject.weight @ h
        outputs.append(chunked(layer, injected)[chunk == c])
        h = mlp.out(F.gelu(mlp.hidden(outputs[-1].flatten(1).mean(0))))
    return torch.cat(outputs)


def bigbird(layer, u):
    n, window = layer.n_global_tokens, layer.window_size

    def far(k, v):
        seen = torch.zeros(layer.n_kv_heads, T, T, dtype=torch.bool)
        position, exists = random_positions(
            j // 64,
            layer.n_random_tokens,
            layer.n_kv_heads,
            window_size=window,
            n_global_tokens=n,
            seed=layer.seed,
        )
        for g, t, draw in exists.nonzero().tolist():
            seen[g, t, position[g, t, draw]] = True
        seen = (seen | (j < n)) & (j <= i - window)
        return k, v, seen.repeat_interleave(layer.n_heads // layer.n_kv_heads, 0)

    return attention(layer, u, (j <= i) & (j > i - window), far)


FORMULAS = {
    "vanilla": lambda layer, u: attention(layer, u, j <= i),
    "window": windowed,
    "dpassm": dpassm,
    "blade": blade,
    "baseline_longformer": windowed,
    "baseline_bigbird": bigbird,
}


@pytest.mark.parametrize("case", [c for c, (name, _) in LAYER_CASES.items() if name in FORMULAS])
@torch.no_grad()
def test_layer_computes_its_formula(case):
    layer = small_layer(case, n_kv_heads=2)
    x = torch.randn(T, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = layer.o_proj(FORMULAS[LAYER_CASES[case][0]](layer, x).flatten(1))
    assert_close(layer(x[None])[0][0], y, rtol=1e-9, atol=1e-9)


def test_random_keys_lie_in_their_strata():
    """One key of each equal part of what lies between the global tokens and the window."""
    blocks = torch.arange(40)
    position, exists = random_positions(blocks, 4, 3, window_size=70, n_global_tokens=2, seed=5)
    for block in blocks.tolist():
        count = max(64 * block - 70 - 2 + 1, 0)
        for stratum in range(4):
            low, high = (2 + count * n // 4 for n in (stratum, stratum + 1))
            assert exists[:, block, stratum].eq(low < high).all()
            if low < high:
                assert (
                    (position[:, block, stratum] >= low) & (position[:, block, stratum] < high)
                ).all()
    other, _ = random_positions(blocks, 4, 3, window_size=70, n_global_tokens=2, seed=6)
    assert (other != position).any()
    assert (position[0] != position[1]).any()


def test_the_layers_that_must_begin_alike_do():
    """The residual fusion begins as window attention; global keys begin as the local ones."""
    layer = small_layer("dpassm-residual")
    layer.reset_parameters()
    window = small_layer("window", window_size=6)
    window.load_state_dict({n: layer.state_dict()[n] for n in window.state_dict()})
    x = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(layer(x)[0], window(x)[0], rtol=1e-12, atol=1e-12)
    longformer = small_layer("longformer")
    longformer.reset_parameters()
    assert_close(longformer.global_k_proj.weight, longformer.k_proj.weight, rtol=0, atol=0)
    assert_close(longformer.global_v_proj.weight, longformer.v_proj.weight, rtol=0, atol=0)
