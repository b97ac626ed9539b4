"""Selective state spaces on a CPU: forward and backward over tiles, with few passes over memory.

The mathematics is that of the torch path, with three differences: the state goes from tile to tile
in a loop, products overwrite what is not needed any more, and decays within a tile are computed
head by head, once more in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops.second_order import own_backward
from longctx_layers.ops.segments import Segments
from longctx_layers.ops.state_space.tiles import TILE, SSDInputs, segment_sums, tile_starts


def refuse_ssd(inputs: SSDInputs, **_: Any) -> str | None:
    """Why the CPU path can't run a call of `ssd`, or None."""
    if inputs.x.shape[1] == 1:
        return "takes no single token, which has no tiles"
    return None


def ssd(
    inputs: SSDInputs, *, initial_state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """`longctx_layers.ops.ssd` on a CPU."""
    y, before, added, fade = _scan_tiles(inputs, initial_state, TILE, True, segments)
    return y, fade * before + added


def refuse_block_ssd(
    inputs: SSDInputs, *, chunk_size: int, chunk_shift: int, segments: Segments | None, **_: Any
) -> str | None:
    """Why the CPU path can't run a call of `block_ssd`, or None."""
    if (reason := refuse_ssd(inputs)) is not None:
        return reason
    if segments is not None or chunk_shift:
        return "takes chunks that count from the call's first token"
    if chunk_size == 1:
        return "takes chunks of at least two tokens"
    return None


def block_ssd(
    inputs: SSDInputs,
    *,
    chunk_size: int,
    chunk_shift: int,
    initial_state: tuple[Tensor, Tensor],
    segments: Segments | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`longctx_layers.ops.block_ssd` on a CPU, without shift and segments."""
    readable, pending = initial_state
    y, before, added, fade = _scan_tiles(inputs, readable + pending, chunk_size, False, None)
    if inputs.x.shape[1] % chunk_size == 0:
        return y, (fade * before + added, 0 * added)  # zero, but with a gradient
    return y, (fade * before, added)


def _scan_tiles(
    inputs: SSDInputs, initial: Tensor, tile: int, within: bool, segments: Segments | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Update and read the state, tile by tile.

    Args:
        inputs, segments: as for `ssd`.
        initial: the state before the first token, `[B, H, P, N]`.
        tile: tokens in a tile.
        within: whether tokens read what their own tile wrote before them.

    Returns:
        y `[B, T, H, P]` in x's dtype; the state before the last tile and what that one adds to it,
        `[B, H, P, N]`; and the decay over the last tile `[B, H, 1, 1]`.
    """
    length = inputs.x.shape[1]
    tiles = -(-length // tile)
    back = tiles * tile - length
    dt, log_decay = inputs.steps(initial.dtype, segments)
    log_decay = F.pad(log_decay, (0, 0, 0, back)).unflatten(1, (tiles, tile))
    sums = segment_sums(log_decay.mT)  # [B, n, H, L]
    start = None if segments is None else tile_starts(segments.start, tiles, tile)
    y, before, added = _Scan.apply(inputs.x, dt, sums, inputs.B, inputs.C, initial, start, within)
    fade = sums[:, -1, :, -1].exp().to(initial.dtype)
    if start is not None:
        fade = fade * (start[:, -1, -1] < (tiles - 1) * tile)[:, None]
    return y, before, added, fade[..., None, None]


class _Scan(torch.autograd.Function):
    """See `_scan_tiles`; sums `[B, n, H, L]` of log-decays in tiles, start `[B, n, L]` or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        sums: Tensor,
        B: Tensor,
        C: Tensor,
        initial: Tensor,
        start: Tensor | None,
        within: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tiles = _Tiles(x, dt, sums, B, C, start)
        added = (tiles.u * tiles.fade_out).flatten(2).mT @ tiles.B
        added = added.view(*sums.shape[:3], x.shape[3], B.shape[2])
        before = torch.empty_like(added)
        before[:, 0] = initial
        for n in range(added.shape[1] - 1):
            torch.addcmul(added[:, n], before[:, n], tiles.decay[:, n], out=before[:, n + 1])
        y = tiles.read(before).mul_(tiles.fade_in)
        if within:
            products = tiles.C @ tiles.B.mT
            for h, decay in tiles.decays():
                y[:, :, h] += torch.bmm(decay.mul_(products), tiles.u[:, :, h])
        ctx.save_for_backward(x, dt, sums, B, C, start, before)
        ctx.within = within
        return tiles.rows(y).to(x.dtype), before[:, -1].clone(), added[:, -1].clone()

    @staticmethod
    @own_backward
    def backward(
        ctx: Any, dy: Tensor, dbefore: Tensor, dadded: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, dt, sums, B, C, start, before = ctx.saved_tensors
        tiles = _Tiles(x, dt, sums, B, C, start)
        dy = tiles.cut(dy)
        # Gradients of the states before each tile. The one before tile n + 1 is also the gradient
        # of what tile n adds.
        faded = (dy * tiles.fade_in).flatten(2)
        dstates = before.new_empty(len(before), before.shape[1] + 1, *before.shape[2:])
        dstates[:, :-1] = (faded.mT @ tiles.C).view_as(before)
        dC = faded @ before.flatten(2, 3).flatten(0, 1)
        dstates[:, -2] += dbefore
        dstates[:, -1] = dadded
        for n in range(before.shape[1] - 2, -1, -1):
            dstates[:, n].addcmul_(dstates[:, n + 1], tiles.decay[:, n])
        dadded = dstates[:, 1:]
        ddecay = (before[:, :-1] * dadded[:, :-1]).sum((-1, -2), keepdim=True)
        dtotal = (ddecay * tiles.decay[:, :-1]).flatten(2).double()
        dtotal = F.pad(dtotal, (0, 0, 0, 1))  # [B, n, H]

        # Reads and writes: the exponents' gradients are those of the faded values.
        dread = (faded.view_as(dy) * tiles.read(before)).sum(-1)
        flat = dadded.flatten(2, 3).flatten(0, 1)
        du = (tiles.B @ flat.mT).view_as(dy).mul_(tiles.fade_out)
        dwrite = (du * tiles.u).sum(-1).double()
        dB = torch.mul(tiles.u, tiles.fade_out, out=faded.view_as(dy)).flatten(2) @ flat
        dsums = dread.double().sub_(dwrite).mT  # [B * n, H, L]
        dtotal += dwrite.sum(1).view_as(dtotal)

        if ctx.within:
            products = tiles.C @ tiles.B.mT
            dproducts = torch.zeros_like(products)
            for h, decay in tiles.decays():
                gradient = torch.bmm(dy[:, :, h], tiles.u[:, :, h].mT)
                dproducts.addcmul_(gradient, decay)
                weight = decay.mul_(products)
                du[:, :, h] += torch.bmm(weight.mT, dy[:, :, h])
                # In float64: the gradient of one decay is a small difference of large sums.
                gradient.mul_(weight)
                dsums[:, h] += gradient.sum(-1, dtype=dsums.dtype)
                dsums[:, h] -= gradient.sum(-2, dtype=dsums.dtype)
            dC.baddbmm_(dproducts, tiles.B)
            dB.baddbmm_(dproducts.mT, tiles.C)
        dsums = dsums.reshape(sums.shape)
        dsums[..., -1] += dtotal

        du = tiles.rows(du)
        return (
            (du * dt[..., None]).to(x.dtype),
            (du * x).sum(-1),
            dsums.to(sums.dtype),
            tiles.rows(dB).to(B.dtype),
            tiles.rows(dC).to(C.dtype),
            dstates[:, 0].clone(),
            None,
            None,
        )


class _Tiles:
    """Inputs of `_Scan` cut into M = B * n tiles, and the decays from, to and over them.

    Attributes:
        u: `x * dt` `[M, L, H, P]`.
        B, C: `[M, L, N]`.
        fade_in, fade_out: decays from the begin of a tile to each token, and from each token to
            the tile's end, `[M, L, H, 1]`.
        decay: over whole tiles, `[B, n, H, 1, 1]`.
    """

    def __init__(
        self, x: Tensor, dt: Tensor, sums: Tensor, B: Tensor, C: Tensor, start: Tensor | None
    ) -> None:
        self.dtype = dt.dtype
        self.batch, self.count, _, self.size = sums.shape
        self.length = x.shape[1]
        self.sums = sums.flatten(0, 1)
        self.back = self.count * self.size - self.length
        u = x.new_empty(self.batch, self.count * self.size, *x.shape[2:], dtype=self.dtype)
        torch.mul(x, dt[..., None], out=u[:, : self.length])
        u[:, self.length :].zero_()
        self.u = u.unflatten(1, (self.count, self.size)).flatten(0, 1)
        self.B = self.cut(B)
        self.C = self.cut(C)
        total = self.sums[..., -1:]
        fade_in = self.sums.exp()
        fade_out = (total - self.sums).exp()
        decay = total.exp()
        row = torch.arange(self.size)
        self.hidden = (row > row[:, None])[None]
        if start is not None:
            begin = self.size * torch.arange(self.count)[:, None]
            reached = (start < begin).flatten(0, 1)[:, None]  # by the state before the tile
            fade_in = fade_in * reached
            decay = decay * reached[..., -1:]
            start = (start - begin).flatten(0, 1)  # counted in the tile
            fade_out = fade_out * (row >= start[:, -1:])[:, None]
            self.hidden = self.hidden | (row < start[..., None])
        self.fade_in = fade_in.to(self.dtype).mT[..., None]
        self.fade_out = fade_out.to(self.dtype).mT[..., None]
        self.decay = decay.to(self.dtype).view(self.batch, self.count, -1, 1, 1)

    def cut(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` to `[M, L, ...]`."""
        x = x.to(self.dtype)
        if self.back:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.back))
        return x.unflatten(1, (self.count, self.size)).flatten(0, 1)

    def rows(self, x: Tensor) -> Tensor:
        """`[M, L, ...]` to `[B, T, ...]`."""
        x = x.unflatten(0, (self.batch, self.count)).flatten(1, 2)
        return x[:, : self.length]

    def read(self, states: Tensor) -> Tensor:
        """What each token reads of the state before its tile, without decay: `[M, L, H, P]`."""
        flat = states.flatten(2, 3).flatten(0, 1)
        return (self.C @ flat.mT).view_as(self.u)

    def decays(self) -> Iterator[tuple[int, Tensor]]:
        """Each head's decays from token to token within the tiles, `[M, L, L]`, in one buffer."""
        buffer = self.u.new_empty(len(self.u), self.size, self.size)
        for h in range(self.u.shape[2]):
            sums = self.sums[:, h]
            # Subtracted in float64, see `segment_sums`.
            torch.sub(sums[..., None], sums[:, None], out=buffer)
            yield h, buffer.masked_fill_(self.hidden, -math.inf).exp_()
