"""BLADE's original state update: one vector per segment, renewed after every chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx_layers.ops import Segments
from longctx_layers.ops.segments import chunk_start

if TYPE_CHECKING:
    from longctx_layers.layers.blade import BLADE, BLADEState


class MlpUpdate(nn.Module):
    """`u + W_inj h` into the next chunk, and `h = MLP(mean of the chunk's attention output)`.

    Chunks run one after another. In packed or continued rows of several tokens their number depends
    on the data, which a graph of torch.compile can't hold.
    """

    def __init__(self, layer: BLADE, state_dim: int) -> None:
        super().__init__()
        # A weak loop over the chunks: at gains above 1 the state would grow without bound.
        self.inject = layer.linear(state_dim, layer.d_model, scale=0.5)
        self.hidden = layer.linear(layer.n_heads * layer.head_dim, state_dim, bias=True)
        self.out = layer.linear(state_dim, state_dim, bias=True)

    def update(self, total: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
        """The state behind a chunk, from the sum `[B, H * P]` over its `[B]` tokens.

        `dtype` is that of the activations: quantised weights have one of integers.
        """
        mean = (total / count.clamp(min=1)[:, None]).to(dtype)
        return self.out(F.gelu(self.hidden(mean))).to(total.dtype)

    def forward(
        self, layer: BLADE, x: Tensor, state: BLADEState | None, segments: Segments | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Outputs, keys and values as `attend` gives them, h, and the open chunk's sum."""
        batch, length, _ = x.shape
        index = torch.arange(length, device=x.device)
        if segments is None:
            packed = Segments(
                torch.zeros(batch, length, dtype=torch.int64, device=x.device),
                torch.full((batch,), length, device=x.device),
            )
        else:
            packed = segments
        begin = chunk_start(index, packed.start, layer.chunk_size, layer.chunk_shift)
        begin = torch.maximum(begin, packed.start)
        # Chunks of each row by number; the first may have begun in an earlier call.
        number = ((begin == index) & (index > 0)).cumsum(1)
        if segments is None:
            chunks = 1 + (length - 1 - layer.chunk_shift) // layer.chunk_size
            chunks += int(layer.chunk_shift > 0)
        else:
            # One token needs no look at the data, so that decoding is one graph.
            chunks = int(number.max()) + 1 if number.numel() > batch else 1
        count = torch.zeros(batch, chunks, dtype=torch.int64, device=x.device)
        count = count.scatter_add(1, number, packed.real().to(torch.int64))
        offset = count.cumsum(1) - count

        precise = torch.promote_types(x.dtype, torch.float32)
        if state is None:
            h = x.new_zeros(batch, layer.state_dim, dtype=precise)
            total = x.new_zeros(batch, layer.n_heads * layer.head_dim, dtype=precise)
        else:
            goes_on = packed.start[:, :1] < 0
            h = torch.where(goes_on, state.readable, 0)
            total = torch.where(goes_on, state.pending, 0)
        outputs, keys, values = [], [], []
        for c in range(chunks):
            cached: Any = state if c == 0 else None
            first = begin[:, 0] if c == 0 else None
            o, k, v = self._chunk(layer, x, h, offset[:, c], count[:, c], cached, first)
            outputs.append(o)
            keys.append(k)
            values.append(v)
            inside = torch.arange(o.shape[1], device=x.device) < count[:, c, None]
            total = total + torch.where(inside[..., None], o.flatten(2), 0).to(precise).sum(1)
            # The chunk is over where the next token, here or in a later call, begins another.
            end = offset[:, c] + count[:, c]
            last = end == packed.length
            start = packed.start.gather(1, end.clamp(max=length - 1)[:, None]).squeeze(1)
            start = torch.where(last, packed.next_start(), start)
            over = chunk_start(end, start, layer.chunk_size, layer.chunk_shift) == end
            over = (over | (start == end)) & (count[:, c] > 0)
            origin = begin.gather(1, (end - 1).clamp(min=0)[:, None]).squeeze(1)
            renewed = self.update(total, end - origin, x.dtype)
            renewed = torch.where((start == end)[:, None], 0, renewed)
            h = torch.where(over[:, None], renewed, h)
            total = torch.where(over[:, None], 0, total)
        # Every parameter gets a gradient, even where no chunk was ever finished. By way of the
        # parameters, not of `renewed`: 0 times a row's NaN would be every row's.
        trained = (*self.hidden.parameters(), *self.out.parameters())
        unused = sum(p.sum() for p in trained if p.requires_grad)
        outputs[-1] = outputs[-1] + 0 * unused

        row = number * layer.chunk_size + index - offset.gather(1, number)
        row = row.clamp(0, chunks * layer.chunk_size - 1)[..., None, None]

        def by_token(pieces: list[Tensor]) -> Tensor:
            joined = torch.cat(pieces, dim=1)
            return joined.gather(1, row.expand(-1, -1, *joined.shape[2:]))

        k, v = by_token(keys), by_token(values)
        if state is not None:
            k = torch.cat([state.k.to(k.dtype), k], dim=1)
            v = torch.cat([state.v.to(v.dtype), v], dim=1)
        return by_token(outputs), k, v, h, total

    def _chunk(
        self,
        layer: BLADE,
        x: Tensor,
        h: Tensor,
        offset: Tensor,
        count: Tensor,
        state: Any,
        first: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One chunk of every row, `[B, C, H, P]`; the first goes on where `state` stopped."""
        size = layer.chunk_size
        index = torch.arange(size, device=x.device)
        at = (offset[:, None] + index).clamp(max=x.shape[1] - 1)
        u = x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
        u = torch.where((index < count[:, None])[..., None], u, 0)
        u = u + self.inject(h.to(u.dtype))[:, None]
        segments = None
        if state is not None and first is not None:
            segments = Segments(first[:, None].expand(-1, size), count)
        o, k, v = layer.attend(u, state, segments, window_size=size, far=layer.memory(u))
        return o, k[:, -size:], v[:, -size:]
