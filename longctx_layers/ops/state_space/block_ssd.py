"""The selective state space read across chunk boundaries only: SSD without its intra-chunk term."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops import reference
from longctx_layers.ops.checks import expect_positive
from longctx_layers.ops.examples import Draw
from longctx_layers.ops.operation import Operation
from longctx_layers.ops.segments import Segments, chunk_start, clip_tile
from longctx_layers.ops.state_space import cpu
from longctx_layers.ops.state_space.ssd import check_inputs, example, refuse_triton
from longctx_layers.ops.state_space.tiles import TILE, SSDInputs, Tiles, Writes, read, running_sum

_operation = Operation(
    "block_ssd",
    examples={
        "": partial(example, chunk_size=32),
        "packed": partial(example, packed=True, states=2, chunk_size=32, chunk_shift=5),
        "one token": lambda _: example(Draw(1), packed=True, states=2, chunk_size=32),
    },
    precise=("dt", "A", "initial_state"),
)


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
    """Selective state space whose reads see only what earlier chunks wrote.

    A token reads what was written before its own chunk began, decayed until the token itself; what
    its own chunk writes is read from the next chunk on. The chunk of position p of a segment is
    `floor((p - chunk_shift) / chunk_size)`. Otherwise as `ssd`.

    Args:
        x, dt, A, B, C, segments, backend: as for `ssd`. Without segments, chunks count from the
            call's first token.
        chunk_size: tokens in a chunk, at least 1.
        chunk_shift: where the first whole chunk begins, `0 <= chunk_shift < chunk_size`.
        initial_state: `(readable, pending)`, each `[B, H, P, N]`, float32 at least: what the
            tokens before this call wrote before the current chunk, and in the current chunk.

    Returns:
        y `[B, T, H, P]` in x's dtype, and the final `(readable, pending)`. If a chunk ends with the
        last token, it is already readable and nothing is pending.

    Raises:
        ValueError, TypeError: for shapes, dtypes or sizes that do not fit.

    >>> import torch
    >>> x, dt, A = torch.randn(1, 10, 2, 8), torch.rand(1, 10, 2), -torch.ones(2)
    >>> B, C = torch.randn(2, 1, 10, 4)
    >>> y, (readable, pending) = block_ssd(x, dt, A, B, C, chunk_size=5)
    >>> y.shape, bool((y[:, :5] == 0).all()), bool((pending == 0).all())
    (torch.Size([1, 10, 2, 8]), True, True)
    """
    expect_positive("chunk_size", chunk_size)
    if not 0 <= chunk_shift < chunk_size:
        raise ValueError(
            f"chunk_shift: expected 0 <= chunk_shift < chunk_size ({chunk_size}), got {chunk_shift}"
        )
    readable, pending = (None, None) if initial_state is None else initial_state
    inputs = SSDInputs(x, dt, A, B, C)
    readable = check_inputs(inputs, "initial_state[0]", readable, segments)
    pending = check_inputs(inputs, "initial_state[1]", pending, segments)
    result: tuple[Tensor, tuple[Tensor, Tensor]] = _operation(
        inputs,
        chunk_size=chunk_size,
        chunk_shift=chunk_shift,
        initial_state=(readable, pending),
        segments=segments,
        backend=backend,
    )
    return result


@_operation.register("triton", refuse=refuse_triton)
def _triton(
    inputs: SSDInputs,
    *,
    chunk_size: int,
    chunk_shift: int,
    initial_state: tuple[Tensor, Tensor],
    segments: Segments | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    from longctx_layers.kernels.ssd import ssd as kernel  # imports Triton

    start = None if segments is None else segments.start
    until = _readable_until(inputs.x, segments, chunk_size, chunk_shift)
    dt, log_decay = inputs.steps(torch.float64, segments)  # see ssd
    state = torch.stack(initial_state)
    dt = dt.to(state.dtype)
    y, final = kernel(inputs.x, dt, log_decay, inputs.B, inputs.C, state, start, until)
    return y, (final[0], final[1])


def _readable_until(x: Tensor, segments: Segments | None, size: int, shift: int) -> Tensor:
    """The token before which each one reads writes, `[1 or B, T + 1]`.

    The last entry, and those at padding, are for the token right after the row's last real one.
    """
    index = torch.arange(x.shape[1] + 1, device=x.device)[None]
    if segments is None:
        return chunk_start(index, 0, size, shift)
    index = torch.minimum(index, segments.length[:, None])
    start = torch.cat([segments.start, segments.next_start()[:, None]], 1)
    return torch.maximum(chunk_start(index, start, size, shift), start)


_operation.register("cpu", refuse=cpu.refuse_block_ssd)(cpu.block_ssd)


@_operation.register("torch")
def _torch(
    inputs: SSDInputs,
    *,
    chunk_size: int,
    chunk_shift: int,
    initial_state: tuple[Tensor, Tensor],
    segments: Segments | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    writes = Writes(inputs, initial_state[0].dtype, segments)
    if segments is None:
        y, state = _aligned_blocks(writes, chunk_size, chunk_shift, *initial_state)
    elif inputs.x.shape[1] == 1:
        y, state = _block_one(writes, segments, chunk_size, chunk_shift, *initial_state)
    else:
        y, state = _blocks_anywhere(writes, segments, chunk_size, chunk_shift, *initial_state)
    return y.to(inputs.x.dtype), state


def _aligned_blocks(
    writes: Writes, size: int, shift: int, readable: Tensor, pending: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Chunks are the tiles, and nothing is read within them; the last one stays open."""
    front = (size - shift) % size
    length = writes.u.shape[1]
    tiles = Tiles(writes, size, front, spare=1)
    added = tiles.added()
    if front:
        # Tokens before the first whole chunk continue the open one.
        fade = tiles.total[:, :1, :, None, None].exp().to(added.dtype)
        added = torch.cat([added[:, :1] + fade * pending[:, None], added[:, 1:]], dim=1)
    else:
        readable = readable + pending
    before, _ = tiles.before(readable, added)
    y = read(tiles.C, before, tiles.sums, None).flatten(1, 2)[:, front : front + length]
    # Exported programs have spare tiles, see `cover`. In torch 2.8, `is_exporting` also holds in
    # compiled graphs, where an index in brackets would cause one graph for each length.
    last = (front + length) // size if torch.compiler.is_exporting() else -1
    fade = tiles.total.select(1, last)[..., None, None].exp().to(added.dtype)
    kept = added.select(1, last).clone()  # a view would keep all of `added`
    return y, (before.select(1, last) * fade, kept)


def _block_one(
    writes: Writes,
    segments: Segments,
    size: int,
    shift: int,
    readable: Tensor,
    pending: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One token, which passes a chunk boundary where it begins or ends a chunk."""

    def pass_boundary(
        index: Tensor, start: Tensor, readable: Tensor, pending: Tensor
    ) -> tuple[Tensor, Tensor]:
        begins = chunk_start(index, start, size, shift) == index
        begins = begins[:, None, None, None]
        return torch.where(begins, readable + pending, readable), torch.where(begins, 0, pending)

    start = segments.start[:, 0]
    alive = segments.start < 0
    readable, pending = pass_boundary(torch.zeros_like(start), start, readable, pending)
    readable = writes.step(readable, alive, write=False)
    pending = writes.step(pending, alive)
    y = writes.read_one(readable)
    return y, pass_boundary(segments.length, start, readable, pending)


def _blocks_anywhere(
    writes: Writes,
    segments: Segments,
    size: int,
    shift: int,
    readable: Tensor,
    pending: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Chunks that begin anywhere in a row: tiles at least as long, and reads over two of them.

    A token's chunk began in its own tile or the one before. So the state before that tile is
    readable as a whole, and the writes since then are read one by one under a mask.
    """
    length = writes.u.shape[1]
    tiles = Tiles(writes, clip_tile(max(TILE, size), length))
    index = tiles.token
    assert tiles.start is not None
    boundary = chunk_start(index, tiles.start, size, shift)
    before, _ = tiles.before(readable + pending)
    base = torch.cat([readable[:, None], before[:, :-1]], dim=1)
    previous = F.pad(tiles.total, (0, 0, 1, 0))[:, :-1, :, None]  # decay of the tile before
    base_index = F.pad(index[:-1, 0], (1, 0))[:, None]  # where that tile began
    y = read(tiles.C, base, tiles.sums + previous, tiles.start < base_index)
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
    # Pending writes of an earlier call are readable for the chunks that begin in this one.
    late = (tiles.start[:, :1] < 0) & (boundary[:, :1] >= 0)
    head = read(tiles.C[:, :1], pending[:, None], tiles.sums[:, :1], late)
    y = torch.cat([y[:, :1] + head, y[:, 1:]], dim=1).flatten(1, 2)[:, :length]

    # At the end of a row, the writes before the next token's chunk are readable.
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


_operation.register("reference")(reference.block_ssd)
