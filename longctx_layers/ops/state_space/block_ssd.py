"""The selective state space read across chunk boundaries only: SSD without its intra-chunk term."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops import reference
from longctx_layers.ops.backends import Operation
from longctx_layers.ops.checks import expect_positive
from longctx_layers.ops.segments import Segments, chunk_start, shortened
from longctx_layers.ops.state_space.cpu import scan_tiles
from longctx_layers.ops.state_space.diagonal import running_sum
from longctx_layers.ops.state_space.ssd import (
    TILE,
    Inputs,
    check_inputs,
    read,
    read_one,
    refuse_cpu,
    refuse_triton,
    step,
    steps,
)

_block_ssd = Operation("block_ssd")


def block_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    chunk_shift: int = 0,
    initial_state: tuple[Tensor, Tensor] | None = None,
    segments: Segments | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The same recurrence read across chunk boundaries only: `ssd` without its intra-chunk term.

    A token reads what was written before its own chunk began, decayed to the token itself; what
    its own chunk writes is read from the next chunk on. The chunk of position p of a segment is
    `floor((p - chunk_shift) / chunk_size)`.

    Args:
        x, dt, A, B, C, segments, backend: as for `ssd`. Without segments, chunks count from the
            call's first token.
        chunk_size: tokens in a chunk, at least 1.
        chunk_shift: where the first whole chunk begins, `0 <= chunk_shift < chunk_size`.
        initial_state: `(readable, pending)`, each `[B, H, P, N]`, float32 at least: what the
            tokens before this call wrote before the chunk that is open now, and in it.

    Returns:
        y `[B, T, H, P]` in x's dtype, and the final `(readable, pending)`. A chunk that ends with
        the last token is readable already, and nothing is pending.

    Raises:
        ValueError, TypeError: for shapes, dtypes or sizes that do not fit.
    """
    expect_positive("chunk_size", chunk_size)
    if not 0 <= chunk_shift < chunk_size:
        raise ValueError(
            f"chunk_shift: expected 0 <= chunk_shift < chunk_size ({chunk_size}), got {chunk_shift}"
        )
    readable, pending = (None, None) if initial_state is None else initial_state
    readable = check_inputs(x, dt, A, B, C, "initial_state[0]", readable, segments)
    pending = check_inputs(x, dt, A, B, C, "initial_state[1]", pending, segments)
    result: tuple[Tensor, tuple[Tensor, Tensor]] = _block_ssd(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=chunk_size,
        chunk_shift=chunk_shift,
        initial_state=(readable, pending),
        segments=segments,
        backend=backend,
    )
    return result


@_block_ssd.register("triton", refuse=refuse_triton)
def _block_ssd_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    chunk_shift: int,
    initial_state: tuple[Tensor, Tensor],
    segments: Segments | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    from longctx_layers.kernels.ssd import ssd as kernel  # imports Triton

    start = None if segments is None else segments.start
    until = _readable_until(x, segments, chunk_size, chunk_shift)
    dt, log_decay = steps(dt, A, torch.float64, segments)  # see ssd
    state = torch.stack(initial_state)
    y, final = kernel(x, dt.to(state.dtype), log_decay, B, C, state, start, until)
    return y, (final[0], final[1])


def _readable_until(x: Tensor, segments: Segments | None, size: int, shift: int) -> Tensor:
    """Before which token each one reads writes, `[1 or B, T + 1]`.

    The last entry, and those at pads, are those of the token right behind the row's last real one.
    """
    index = torch.arange(x.shape[1] + 1, device=x.device)[None]
    if segments is None:
        return chunk_start(index, 0, size, shift)
    index = torch.minimum(index, segments.length[:, None])
    start = torch.cat([segments.start, segments.next_start()[:, None]], 1)
    return torch.maximum(chunk_start(index, start, size, shift), start)


def _refuse_cpu(
    x: Tensor, *_: Any, chunk_size: int, chunk_shift: int, segments: Segments | None, **__: Any
) -> str | None:
    if (reason := refuse_cpu(x)) is not None:
        return reason
    if segments is not None or chunk_shift:
        return "takes chunks that count from the call's first token"
    if chunk_size == 1:
        return "takes chunks of at least two tokens"
    return None


@_block_ssd.register("cpu", refuse=_refuse_cpu)
def _block_ssd_cpu(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    chunk_shift: int,
    initial_state: tuple[Tensor, Tensor],
    segments: Segments | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    readable, pending = initial_state
    inputs = x, *steps(dt, A, readable.dtype, None), B, C, readable + pending
    y, before, added, fade = scan_tiles(*inputs, tile=chunk_size, within=False)
    if x.shape[1] % chunk_size == 0:
        return y, (fade * before + added, 0 * added)  # with a gradient, as the others
    return y, (fade * before, added)


@_block_ssd.register("torch")
def _block_ssd_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    chunk_shift: int,
    initial_state: tuple[Tensor, Tensor],
    segments: Segments | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    inputs = Inputs(x, dt, A, B, C, initial_state[0].dtype, segments)
    if segments is None:
        y, state = _aligned_blocks(inputs, chunk_size, chunk_shift, *initial_state)
    elif x.shape[1] == 1:
        y, state = _block_one(inputs, segments, chunk_size, chunk_shift, *initial_state)
    else:
        y, state = _blocks_anywhere(inputs, segments, chunk_size, chunk_shift, *initial_state)
    return y.to(x.dtype), state


def _aligned_blocks(
    inputs: Inputs, size: int, shift: int, readable: Tensor, pending: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Chunks are the tiles, and nothing is read within them; the last one stays open."""
    front, length = (size - shift) % size, inputs.u.shape[1]
    tiles = inputs.tile(size, front, spare=1)
    added = tiles.added()
    if front:
        # Tokens before the first whole chunk continue the open one.
        fade = tiles.total[:, :1, :, None, None].exp().to(added.dtype)
        added = torch.cat([added[:, :1] + fade * pending[:, None], added[:, 1:]], dim=1)
    else:
        readable = readable + pending
    before, _ = tiles.before(readable, added)
    y = read(tiles.C, before, tiles.sums, None).flatten(1, 2)[:, front : front + length]
    # Exported programs have spare tiles, see `cover`. In torch 2.8 compiled ones think they are
    # exported, and an index in brackets would make a graph for each length.
    last = (front + length) // size if torch.compiler.is_exporting() else -1
    fade = tiles.total.select(1, last)[..., None, None].exp().to(added.dtype)
    kept = added.select(1, last).clone()  # a view would keep all of `added`
    return y, (before.select(1, last) * fade, kept)


def _block_one(
    inputs: Inputs,
    segments: Segments,
    size: int,
    shift: int,
    readable: Tensor,
    pending: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One token: chunk boundaries are passed where the token begins or ends a chunk."""

    def pass_boundary(
        index: Tensor, start: Tensor, readable: Tensor, pending: Tensor
    ) -> tuple[Tensor, Tensor]:
        begins = chunk_start(index, start, size, shift) == index
        begins = begins[:, None, None, None]
        return torch.where(begins, readable + pending, readable), torch.where(begins, 0, pending)

    start, alive = segments.start[:, 0], segments.start < 0
    readable, pending = pass_boundary(torch.zeros_like(start), start, readable, pending)
    readable = step(inputs, readable, alive, write=False)
    pending = step(inputs, pending, alive)
    y = read_one(inputs, readable)
    return y, pass_boundary(segments.length, start, readable, pending)


def _blocks_anywhere(
    inputs: Inputs,
    segments: Segments,
    size: int,
    shift: int,
    readable: Tensor,
    pending: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Chunks that begin anywhere in a row: tiles at least as long, and a read over two of them.

    A token's chunk began in its own tile or the one before, so the state before that tile lies
    wholly behind the boundary, and the writes since then are read one by one under a mask.
    """
    length = inputs.u.shape[1]
    tiles = inputs.tile(shortened(max(TILE, size), length))
    index = tiles.token
    assert tiles.start is not None
    boundary = chunk_start(index, tiles.start, size, shift)
    before, _ = tiles.before(readable + pending)
    base = torch.cat([readable[:, None], before[:, :-1]], dim=1)
    previous = F.pad(tiles.total, (0, 0, 1, 0))[:, :-1, :, None]  # decay of the tile before
    behind = F.pad(index[:-1, 0], (1, 0))[:, None]  # where that tile began
    y = read(tiles.C, base, tiles.sums + previous, tiles.start < behind)
    mask = (index[:, None] >= tiles.start[..., None]) & (index[:, None] < boundary[..., None])
    y = y + tiles.read_written(tiles.u, tiles.B, tiles.sums, mask)
    if tiles.count > 1:

        def shifted(x: Tensor) -> Tensor:  # each tile's predecessor
            return F.pad(x, (0, 0) * (x.dim() - 2) + (1, 0))[:, :-1]

        earlier = index - tiles.size
        mask = (earlier[:, None] >= tiles.start[..., None]) & (
            earlier[:, None] < boundary[..., None]
        )
        mask = mask & (earlier >= 0)[:, None]
        sums = shifted(tiles.sums) - previous
        y = y + tiles.read_written(shifted(tiles.u), shifted(tiles.B), sums, mask)
    # Pending writes of an earlier call: readable for the chunks that begin in this one.
    late = (tiles.start[:, :1] < 0) & (boundary[:, :1] >= 0)
    head = read(tiles.C[:, :1], pending[:, None], tiles.sums[:, :1], late)
    y = torch.cat([y[:, :1] + head, y[:, 1:]], dim=1).flatten(1, 2)[:, :length]

    # At the row's end, the writes before the boundary of the next token's chunk are readable.
    start = segments.next_start()[:, None, None]
    boundary = chunk_start(segments.length[:, None, None], start, size, shift)
    total = running_sum(tiles.total, 1)
    weight = tiles.fade_to_end() * (total[:, -1:] - total).exp().to(y.dtype)[:, :, None]
    early = ((index >= start) & (index < boundary))[..., None]
    late = ((index >= start) & (index >= boundary))[..., None]
    fade = (total[:, -1].exp().to(y.dtype) * (start[:, 0] < 0))[..., None, None]
    passed = (boundary >= 0)[..., None]
    final_readable = fade * torch.where(passed, readable + pending, readable)
    final_pending = fade * torch.where(passed, 0, pending)
    return y, (
        final_readable + tiles.writes(weight * early).sum(1),
        final_pending + tiles.writes(weight * late).sum(1),
    )


_block_ssd.register("reference")(reference.block_ssd)
