"""States as NamedTuples of tensors, and the arrangement of padded and packed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from longctx_layers.ops import Segments

State = TypeVar("State", bound=tuple[Any, ...])


class Field(NamedTuple):
    """One tensor of a state: its shape without the batch (None: grows), and what it holds."""

    shape: tuple[int | None, ...]
    kind: Literal["cache", "accumulator", "index"] = "cache"

    def dtype(self, parameters: torch.dtype) -> torch.dtype:
        """Caches have the parameters' dtype, accumulators float32 at least."""
        if self.kind == "index":
            return torch.int64
        if self.kind == "accumulator":
            return torch.promote_types(parameters, torch.float32)
        return parameters


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply a function to every tensor of a layer's state, or of a model's tuple of states.

    >>> from longctx_layers import CausalAttention
    >>> _, state = CausalAttention(64, 4)(torch.randn(1, 10, 64))
    >>> map_state(lambda x: x.cpu(), state).k.shape
    torch.Size([1, 10, 4, 16])
    """
    mapped = [function(x) if isinstance(x, Tensor) else map_state(function, x) for x in state]
    if hasattr(state, "_fields"):
        return type(state)(*mapped)
    return type(state)(mapped)


def detach_state(state: State) -> State:
    """Cut the state's history of gradients, for truncated back-propagation through time.

    >>> from longctx_layers import DPASSM
    >>> _, state = DPASSM(64, 4, window_size=16)(torch.randn(1, 10, 64))
    >>> state.h.requires_grad, detach_state(state).h.requires_grad
    (True, False)
    """
    return map_state(Tensor.detach, state)


def usable_in_training(state: State) -> State:
    """The state, with copies of tensors made in inference mode, which autograd cannot save."""
    return map_state(lambda x: x.clone() if x.is_inference() else x, state)


def select_rows(state: State, index: Tensor) -> State:
    """Choose rows of a state by index `[n]`: reorders, drops or repeats sequences of a batch.

    >>> from longctx_layers import DPASSM
    >>> _, state = DPASSM(64, 4, window_size=16)(torch.randn(3, 10, 64))
    >>> select_rows(state, torch.tensor([2, 2])).h.shape[0]
    2
    """
    return map_state(lambda x: x.index_select(0, index.to(x.device)), state)


def state_to(state: State, device: torch.device | str) -> State:
    """Move a state to another device.

    >>> from longctx_layers import DPASSM
    >>> _, state = DPASSM(64, 4, window_size=16)(torch.randn(1, 10, 64))
    >>> state_to(state, "cpu").h.device.type
    'cpu'
    """
    return map_state(lambda x: x.to(device), state)


class Rows(NamedTuple):
    """How a call's rows are rearranged so that padding is at their right end.

    Attributes:
        segments: for the operations; None for rows of one new segment without padding.
        position: `[B]`, the position in its segment of each row's next token.
        segment: `[B]`, the id of the row's last segment.
        order, inverse: the permutation of tokens `[B, T]`, and the one back; None if none moved.
        real: `[B, T]`, which tokens are no padding, in the caller's order; None if none moved.
    """

    segments: Segments | None
    position: Tensor
    segment: Tensor
    order: Tensor | None = None
    inverse: Tensor | None = None
    real: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """Rearrange `[B, T, D]`: padding goes to the right, and becomes zero."""
        if self.order is None or self.segments is None:
            return x
        return torch.where(self.segments.real()[..., None], _take(x, self.order), 0)

    def unpack(self, y: Tensor) -> Tensor:
        """Return outputs to the caller's order, with zeros at padding."""
        if self.inverse is None or self.real is None:
            return y
        return torch.where(self.real[..., None], _take(y, self.inverse), 0)

    def restart(self, state: State | None) -> State | None:
        """Set the state to zero (NaN, too) in rows whose first token begins a segment."""
        if state is None or self.order is None or self.segments is None:
            return state
        continues = self.segments.start[:, 0] < 0
        return map_state(
            lambda x: torch.where(continues.view(-1, *[1] * (x.dim() - 1)), x, 0), state
        )


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens of `[B, T, D]` by `[B, T]`; the backward pass adds whole tokens."""
    batch, length, dim = x.shape
    flat = index + length * torch.arange(batch, device=x.device)[:, None]
    return x.reshape(-1, dim).index_select(0, flat.flatten()).view(batch, length, dim)


def arrange(x: Tensor, state: Any, segment_ids: Tensor | None) -> Rows:
    """Find the segments and the padding of a call."""
    batch, length = x.shape[:2]
    index = torch.arange(length, device=x.device)
    if state is None:
        if segment_ids is None:
            whole = index.new_full((batch,), length)
            return Rows(None, whole, torch.zeros_like(whole))
        position, held = index.new_zeros(batch), index.new_full((batch,), -1)
    else:
        position, held = state.position, state.segment
    if segment_ids is None:
        start = -position[:, None].expand(-1, length)
        segments = Segments(start, torch.full_like(position, length), packed=False)
        return Rows(segments, position + length, held.clamp(min=0))
    real = segment_ids >= 0
    order = torch.argsort(~real, dim=1, stable=True)
    count = real.sum(1)
    ids = torch.where(index < count[:, None], segment_ids.gather(1, order), -1).to(torch.int64)
    begins = (ids >= 0) & (ids != torch.cat([held[:, None], ids[:, :-1]], dim=1))
    start = torch.where(begins, index, -position[:, None]).cummax(1).values
    segments = Segments(start, count)
    last = ids.gather(1, (count - 1).clamp(min=0)[:, None]).squeeze(1)
    return Rows(
        segments,
        count - segments.next_start(),
        torch.where(count > 0, last, held),
        order,
        order.argsort(1),
        real,
    )


def tail(x: Tensor, size: int, segments: Segments | None, first: Tensor | None = None) -> Tensor:
    """The last `size` real entries of each row's segment, right-aligned, zeros before them.

    Args:
        x: `[B, S, ...]`, of which the last T belong to this call.
        segments: of this call; None for T real tokens of one segment.
        first: `[B]`, the first entry that is still needed; the segment's first by default.

    Returns:
        `[B, size, ...]`, a copy.
    """
    total = x.shape[1]
    if first is None and (segments is None or not segments.packed):
        kept = x[:, max(total - size, 0) :]
        if kept.shape[1] == size:
            return kept.clone(memory_format=torch.contiguous_format)
        return torch.cat([x.new_zeros(len(x), size - kept.shape[1], *x.shape[2:]), kept], dim=1)
    assert segments is not None
    length = segments.start.shape[1]
    first = segments.next_start() if first is None else first
    index = segments.length[:, None] + torch.arange(-size, 0, device=x.device)
    at = (index + (total - length)).clamp(min=0)
    flat = x.flatten(2)
    kept = flat.gather(1, at[..., None].expand(-1, -1, flat.shape[2]))
    kept = torch.where((index >= first[:, None])[..., None], kept, 0)
    return kept.view(len(x), size, *x.shape[2:])


def cache_tail(
    k: Tensor, v: Tensor, size: int, segments: Segments | None, first: Tensor | None = None
) -> dict[str, Tensor]:
    """The new state's `k` and `v`: the last `size` keys and values of each row; see `tail`."""
    return {"k": tail(k, size, segments, first), "v": tail(v, size, segments, first)}
