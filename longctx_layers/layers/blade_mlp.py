"""BLADE's original state update: one vector per segment, updated after every chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx_layers.ops import Segments
from longctx_layers.ops.segments import chunk_start

# From a chunk of each row, the state or None, and segments, to attention, keys and values.
Attend = Callable[[Tensor, Any, Segments | None], tuple[Tensor, Tensor, Tensor]]


class ChunkPlan(NamedTuple):
    """Which tokens of each row make up its chunks; the first chunk may have begun in another call.

    Attributes:
        segments: of the call.
        begin: `[B, T]`, the index at which the token's chunk begins, within its segment.
        number: `[B, T]`, the chunk of each token, counted along its row.
        offset, n_tokens: `[B, C]`, each chunk's first token in this call, and how many follow.
        chunk_size, chunk_shift: as for `BLADE`.
    """

    segments: Segments
    begin: Tensor
    number: Tensor
    offset: Tensor
    n_tokens: Tensor
    chunk_size: int
    chunk_shift: int

    def end(self, c: int) -> tuple[Tensor, Tensor, Tensor]:
        """How chunk c of each row ends.

        Returns:
            Three tensors `[B]`: its number of tokens, those of earlier calls included; whether it
            is finished, so that the next token begins another; whether its segment is, too.
        """
        end = self.offset[:, c] + self.n_tokens[:, c]
        last = (end - 1).clamp(min=0)[:, None]
        begin = self.begin.gather(1, last).squeeze(1)
        # The start of the segment of the next token, in this call or in a later one.
        within = end.clamp(max=self.begin.shape[1] - 1)[:, None]
        start = self.segments.start.gather(1, within).squeeze(1)
        start = torch.where(end == self.segments.length, self.segments.next_start(), start)
        new_segment = start == end
        finished = chunk_start(end, start, self.chunk_size, self.chunk_shift) == end
        return end - begin, (finished | new_segment) & (self.n_tokens[:, c] > 0), new_segment

    def by_token(self, chunks: list[Tensor]) -> Tensor:
        """Chunks `[B, chunk_size, ...]` to their tokens `[B, T, ...]`."""
        joined = torch.cat(chunks, dim=1)
        index = torch.arange(self.number.shape[1], device=joined.device)
        row = self.number * self.chunk_size + index - self.offset.gather(1, self.number)
        row = row.clamp(0, joined.shape[1] - 1)[..., None, None]
        return joined.gather(1, row.expand(-1, -1, *joined.shape[2:]))


def plan_chunks(
    x: Tensor, segments: Segments | None, chunk_size: int, chunk_shift: int
) -> ChunkPlan:
    """Find the chunks of a call with x `[B, T, D]`."""
    batch, length, _ = x.shape
    index = torch.arange(length, device=x.device)
    one_segment = segments is None
    if segments is None:
        segments = Segments(
            torch.zeros(batch, length, dtype=torch.int64, device=x.device),
            torch.full((batch,), length, device=x.device),
        )
    begin = chunk_start(index, segments.start, chunk_size, chunk_shift)
    begin = torch.maximum(begin, segments.start)
    number = ((begin == index) & (index > 0)).cumsum(1)
    if one_segment:
        n_chunks = 1 + (length - 1 - chunk_shift) // chunk_size + int(chunk_shift > 0)
    elif number.numel() <= batch:
        n_chunks = 1  # no row or one token: without a look at the data, decoding is one graph
    else:
        n_chunks = int(number.max()) + 1
    count = torch.zeros(batch, n_chunks, dtype=torch.int64, device=x.device)
    count = count.scatter_add(1, number, segments.real().to(torch.int64))
    offset = count.cumsum(1) - count
    return ChunkPlan(segments, begin, number, offset, count, chunk_size, chunk_shift)


class MlpUpdate(nn.Module):
    """`u + W_inj h` into the next chunk, and `h = MLP(mean of the chunk's attention output)`.

    Chunks run one after another. In packed or continued rows of several tokens, their number
    depends on the data, which a graph of torch.compile cannot express.

    Args:
        linear: makes a projection; `Layer.linear`.
        d_model: width of the layer's input.
        inner: width of the attention's output, all heads together.
        state_dim: width of the state.
    """

    def __init__(
        self, linear: Callable[..., nn.Linear], d_model: int, inner: int, state_dim: int
    ) -> None:
        super().__init__()
        # A weak loop over the chunks: at gains above 1 the state would grow without bound.
        self.inject = linear(state_dim, d_model, scale=0.5)
        self.hidden = linear(inner, state_dim, bias=True)
        self.out = linear(state_dim, state_dim, bias=True)

    def update(self, total: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
        """The state after a chunk, from the sum `[B, H * P]` over its `[B]` tokens.

        `dtype` is that of the activations: quantised weights have an integer one.
        """
        mean = (total / count.clamp(min=1)[:, None]).to(dtype)
        return self.out(F.gelu(self.hidden(mean))).to(total.dtype)

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        total: Tensor,
        state: Any,
        segments: Segments | None,
        *,
        attend: Attend,
        chunk_size: int,
        chunk_shift: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Attention `[B, T, H, P]` with its keys and values, h, and the unfinished chunk's sum.

        Args:
            x: `[B, T, D]`.
            h, total: the state `[B, N]` and the unfinished chunk's sum `[B, H * P]` before x.
            state: what `attend` needs to continue an unfinished chunk, or None.
            segments: of x; None for one new segment without padding.
            attend: computes the attention of one chunk of every row.
            chunk_size, chunk_shift: as for `BLADE`.
        """
        plan = plan_chunks(x, segments, chunk_size, chunk_shift)
        outputs = []
        keys = []
        values = []
        for c in range(plan.n_tokens.shape[1]):
            chunk = self._chunk(x, h, plan, c)
            if c == 0 and state is not None:
                start = plan.begin[:, :1].expand(-1, chunk_size)
                o, k, v = attend(chunk, state, Segments(start, plan.n_tokens[:, 0]))
            else:
                o, k, v = attend(chunk, None, None)
            outputs.append(o)
            keys.append(k)
            values.append(v)
            inside = torch.arange(chunk_size, device=x.device) < plan.n_tokens[:, c, None]
            total = total + torch.where(inside[..., None], o.flatten(2), 0).to(total.dtype).sum(1)
            size, finished, new_segment = plan.end(c)
            updated = self.update(total, size, x.dtype)
            updated = torch.where(new_segment[:, None], 0, updated)
            h = torch.where(finished[:, None], updated, h)
            total = torch.where(finished[:, None], 0, total)
        outputs[-1] = outputs[-1] + 0 * self._all_weights()
        return plan.by_token(outputs), plan.by_token(keys), plan.by_token(values), h, total

    def _chunk(self, x: Tensor, h: Tensor, plan: ChunkPlan, c: int) -> Tensor:
        """The tokens of chunk c of each row `[B, chunk_size, D]`, with the state added."""
        index = torch.arange(plan.chunk_size, device=x.device)
        at = (plan.offset[:, c, None] + index).clamp(max=x.shape[1] - 1)
        u = x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
        u = torch.where((index < plan.n_tokens[:, c, None])[..., None], u, 0)
        return u + self.inject(h.to(u.dtype))[:, None]

    def _all_weights(self) -> Tensor | int:
        """The sum of all weights: times 0, it gives each a gradient if no chunk was finished.

        Not by way of an updated state: 0 times the NaN of one row would be NaN in every row.
        """
        weights = (*self.hidden.parameters(), *self.out.parameters())
        return sum(weight.sum() for weight in weights if weight.requires_grad)
