"""Launches with the shapes of real models on the meta device, to be compiled ahead of time.

Each function calls an operation's launchers, forward and backward. Inside
`ahead.compiled_for(target)`, this compiles every kernel that they start.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx_layers.kernels import (
    attention_backward,
    attention_forward,
    conv_silu,
    diagonal,
    gated_norms,
    ssd_backward,
    ssd_forward,
)

BATCH, LENGTH, HEADS = 2, 4096, 12


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def sparse_attention(
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    groups: int = HEADS,
    far: bool = False,
    length: int = LENGTH,
    backward: bool = True,
) -> None:
    """One kernel serves all patterns; far keys add a loop. A length of 1 is a step of decoding."""
    q = empty(BATCH, length, HEADS, head_dim, dtype=dtype).transpose(1, 2)
    k = empty(BATCH, LENGTH, groups, head_dim, dtype=dtype).transpose(1, 2)
    distant: tuple[Tensor | None, ...] = (None, None, None, None)
    if far:
        lists = empty(BATCH, groups, LENGTH // 64, 6, head_dim, dtype=dtype)
        distant = (q, lists, lists, empty(BATCH, 1, length, 6, dtype=torch.bool))
    call = q, k, k, empty(1, length, dtype=torch.int32), *distant, 64, 0.125
    o, lse = attention_forward.forward(*call)
    if length > 1 and backward:
        attention_backward.backward(o, lse, o, lse, *call)


def diagonal_scan(invariant: bool, packed: bool) -> None:
    """The recurrence of a diagonal state space; invariant decays are the same for all tokens."""
    u = empty(BATCH, LENGTH, 64)
    decay = empty(64, dtype=torch.float32)
    if not invariant:
        decay = empty(BATCH, LENGTH, 64, dtype=torch.float32)
    state = empty(BATCH, 64, dtype=torch.float32)
    start = empty(BATCH, LENGTH, dtype=torch.int64) if packed else None
    length = empty(BATCH, dtype=torch.int64) if packed else None
    h, final = diagonal.forward(u, decay, state, start, length)
    diagonal.backward(h, final, h, decay, state, start, length)


def norms(head_dim: int) -> None:
    """The gate and the norms of both paths."""
    paths = [empty(BATCH, LENGTH, HEADS, head_dim) for _ in range(3)]
    weights = [empty(HEADS, head_dim, dtype=torch.float32) for _ in range(2)]
    y = gated_norms.forward(*paths, *weights, 1e-5)
    gated_norms.backward(y, *paths, *weights, 1e-5)


def convolution(packed: bool) -> None:
    """The short convolution of a selective state space."""
    x, weight = empty(BATCH, LENGTH, 896), empty(896, 4, dtype=torch.float32)
    start = empty(BATCH, LENGTH, dtype=torch.int64) if packed else None
    before = empty(BATCH, 3, 896)
    y = conv_silu.forward(x, weight, before, start)
    conv_silu.backward(y, x, weight, before, start)


def state_space(
    head_dim: int,
    directions: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    packed: bool = False,
    pending: bool = False,
    length: int = LENGTH,
) -> None:
    """`ssd`, or (pending) `block_ssd`; x, B and C are views of one tensor, as in the layers."""
    inner = HEADS * head_dim
    precise = torch.promote_types(dtype, torch.float32)
    mixed = empty(BATCH, length, inner + 2 * directions, dtype=dtype)
    x, B, C = mixed.split([inner, directions, directions], dim=-1)
    x = x.unflatten(-1, (HEADS, head_dim))
    dt = empty(BATCH, length, HEADS, dtype=precise)
    state = empty(2 if pending else 1, BATCH, HEADS, head_dim, directions, dtype=precise)
    start = empty(BATCH, length, dtype=torch.int64) if packed else None
    until = empty(BATCH if packed else 1, length + 1, dtype=torch.int64) if pending else None
    call = x, dt, dt.double(), B, C, state, start, until
    y, final = ssd_forward.forward(*call)
    if length > 1:
        ssd_backward.backward(y, final, *call)


# Matrix products that a tile of rows and a tile of keys need, by kernel.
TILE_PRODUCTS = {"_forward": 2, "_queries": 3, "_keys": 4}


def no_products(constants: dict[str, Any]) -> dict[str, list[float]]:
    """Kernels without matrix products."""
    return {}


def attention_products(constants: dict[str, Any]) -> dict[str, list[float]]:
    """Operations that an iteration of each hot loop needs, by kernel, from its constants."""
    if "KEYS" not in constants:
        return {}
    tile = 2 * constants["ROWS"] * constants["KEYS"] * constants["HEAD"]
    needed = {name: [count * tile] * 2 for name, count in TILE_PRODUCTS.items()}
    if constants.get("FAR"):
        far = 4 * constants["ROWS"] * constants["FAR_KEYS"] * constants["HEAD"]
        needed["_forward"].insert(0, far)
    return needed


def state_space_products(dtype: torch.dtype, constants: dict[str, Any]) -> dict[str, list[float]]:
    """The same for `ssd` and `block_ssd`. A product of float32 and bf16 is three bf16 products."""
    if not {"TOKENS", "COLUMNS"} <= constants.keys():
        return {}
    tokens, rows, columns = (constants[name] for name in ("TOKENS", "ROWS", "COLUMNS"))
    parts = 3 if dtype == torch.bfloat16 else 1
    among = 2 * tokens * tokens  # tokens with tokens, for each column of their vectors
    states = 2 * tokens * rows * columns * (2 if constants["PENDING"] else 1)
    return {
        "_states": [parts * states],
        "_scan": [(1 + parts) * states + among * (columns + rows)],
        "_back_to_writes": [parts * states + among * (columns + 2 * rows + parts * tokens)],
        "_back_to_directions": [(1 + parts) * states + among * (rows + 2 * columns)],
    }


class Launch(NamedTuple):
    """A row of the tables; every test run compares the hot loops of fast ones with the baseline."""

    label: str
    run: Callable[[], None]
    products: Callable[[dict[str, Any]], dict[str, list[float]]] = no_products
    fast: bool = False


def _attention(label: str, *args: Any, fast: bool = False, **kwargs: Any) -> Launch:
    run = partial(sparse_attention, *args, **kwargs)
    return Launch(f"attention, {label}", run, attention_products, fast)


def _state_space(
    label: str, directions: int, dtype: torch.dtype = torch.bfloat16, fast: bool = False, **kw: Any
) -> Launch:
    run = partial(state_space, 64, directions, dtype, **kw)
    return Launch(label, run, partial(state_space_products, dtype), fast)


REPRESENTATIVE = [
    _attention("head_dim 64", 64),
    _attention("head_dim 64, far keys", 64, far=True, fast=True),
    _attention("head_dim 128", 128),
    _attention("head_dim 128, 4 query heads per key head, far keys", 128, groups=3, far=True),
    _attention("head_dim 256", 256),
    _attention("head_dim 64, float32", 64, torch.float32),
    _attention("head_dim 128, float32", 128, torch.float32),
    _attention("one token, head_dim 64, 6 query heads per key head", 64, groups=2, length=1),
    _attention("one token, head_dim 128, 6 query heads per key head", 128, groups=2, length=1),
    _state_space("ssd, P 64, N 64", 64),
    _state_space("ssd, P 64, N 64, packed", 64, packed=True, fast=True),
    _state_space("ssd, P 64, N 128, packed", 128, packed=True),
    _state_space("ssd, P 64, N 256", 256),
    _state_space("ssd, P 64, N 64, float32", 64, torch.float32),
    _state_space("ssd, P 64, N 128, float32", 128, torch.float32),
    _state_space("block_ssd, P 64, N 64, packed", 64, packed=True, pending=True),
    _state_space("ssd, one token", 64, packed=True, length=1),
    Launch("diagonal, constant decay, packed", partial(diagonal_scan, True, True)),
    Launch("diagonal, varying decay", partial(diagonal_scan, False, False)),
    Launch("gated norms, head_dim 64", partial(norms, 64)),
    Launch("convolution, packed", partial(convolution, True)),
]
BASELINE = Path(__file__).with_name("baseline.json")


class Traffic(NamedTuple):
    """A small call on the CPU, whose bytes and operations the interpreter counts.

    Attributes:
        label: its name in the table.
        make: returns the call, the bytes of all tensors that it has to read or write, and the
            operations of the matrix products that its result needs.
    """

    label: str
    make: Callable[[], tuple[Callable[[], Any], int, int]]


def _bytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def attention_traffic(window: int | None, backward: bool) -> tuple[Callable[[], Any], int, int]:
    """One row of 1024 tokens, two heads of 64."""
    length, dim = 1024, 64
    q, k, v = (torch.randn(1, 2, length, dim, dtype=torch.bfloat16) for _ in range(3))
    index = torch.arange(length, dtype=torch.int32)
    first = (index - (window or length) + 1).clamp(min=0)[None]
    pairs = 2 * int((index - first + 1).sum())
    call = q, k, v, first, None, None, None, None, 0, dim**-0.5
    if not backward:
        o, lse = torch.empty_like(q), torch.empty(1, 2, length)
        least = _bytes(q, k, v, o, lse, first)
        return lambda: attention_forward.forward(*call), least, 4 * dim * pairs
    o, do = torch.randn_like(q), torch.randn_like(q)
    lse = torch.full((1, 2, length), 10.0)
    least = 2 * _bytes(q, k, v) + _bytes(o, do, lse, first)
    return (
        lambda: attention_backward.backward(do, lse, o, lse, *call),
        least,
        10 * dim * pairs,
    )


def norms_traffic() -> tuple[Callable[[], Any], int, int]:
    """512 tokens, two heads of 64."""
    paths = [torch.randn(1, 512, 2, 64, dtype=torch.bfloat16) for _ in range(3)]
    weights = [torch.ones(2, 64) for _ in range(2)]
    run = partial(gated_norms.forward, *paths, *weights, 1e-5)
    return run, _bytes(*paths, paths[0], *weights), 0


def convolution_traffic() -> tuple[Callable[[], Any], int, int]:
    """512 tokens of 128 channels."""
    x = torch.randn(1, 512, 128, dtype=torch.bfloat16)
    weight = torch.ones(128, 4)
    return partial(conv_silu.forward, x, weight), _bytes(x, x, weight), 0


def diagonal_traffic() -> tuple[Callable[[], Any], int, int]:
    """512 tokens of 64 channels, with a constant decay."""
    u = torch.randn(1, 512, 64)
    decay = torch.rand(64)
    state = torch.zeros(1, 64)
    return partial(diagonal.forward, u, decay, state), _bytes(u, u, decay, state, state), 0


def state_space_traffic(backward: bool) -> tuple[Callable[[], Any], int, int]:
    """1024 tokens, two heads of 64, 64 states; the recurrence needs the fewest operations."""
    length, heads, dim, directions = 1024, 2, 64, 64
    x = torch.randn(1, length, heads, dim, dtype=torch.bfloat16)
    B, C = (torch.randn(1, length, directions, dtype=torch.bfloat16) for _ in range(2))
    dt = torch.rand(1, length, heads)
    log_decay = -dt.double()
    state = torch.zeros(1, 1, heads, dim, directions)
    call = x, dt, log_decay, B, C, state
    inputs = _bytes(*call)
    products = 4 * length * heads * dim * directions  # a write and a read
    if not backward:
        return partial(ssd_forward.forward, *call), inputs + _bytes(x, state), products
    dy, dfinal = torch.randn_like(x), torch.zeros_like(state)
    run = partial(ssd_backward.backward, dy, dfinal, *call)
    return run, 2 * inputs + _bytes(dy, dfinal), 2 * products


TRAFFIC = [
    Traffic("ssd, forward", partial(state_space_traffic, False)),
    Traffic("ssd, backward", partial(state_space_traffic, True)),
    Traffic("window attention of 256, forward", partial(attention_traffic, 256, False)),
    Traffic("window attention of 256, backward", partial(attention_traffic, 256, True)),
    Traffic("full attention, forward", partial(attention_traffic, None, False)),
    Traffic("full attention, backward", partial(attention_traffic, None, True)),
    Traffic("gated norms, forward", norms_traffic),
    Traffic("convolution, forward", convolution_traffic),
    Traffic("diagonal, forward", diagonal_traffic),
]
