"""What `generate` hands from call to call: the model's state, as a cache of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from longctx_layers.layers import map_state, select_rows
from longctx_layers.transformers_calls.documents import record_pads

KEPT_APART = 64  # tokens at a recorded call's end: crop goes back this far without the rest

# (x, state, segment_ids) to (outputs, state): one output or more, each `[B, T, D]`.
Run = Callable[[Tensor, Any, "Tensor | None"], tuple[list[Tensor], Any]]


class _Call(NamedTuple):
    """A call that can be taken back: the state before it, and its inputs."""

    state: Any
    x: Tensor
    segment_ids: Tensor | None


class LongCtxCache(Cache):
    """The state of a `LongCtxForCausalLM`, in place of keys and values.

    Its memory is what the layers' states take: constant for dpassm, blade, window and
    baseline_longformer. It is empty at first, and a model's forward moves it on:

        cache = LongCtxCache()
        model(prompt, past_key_values=cache)
        model(more, past_key_values=cache)

    `copy.deepcopy(cache)` forks a conversation. States forget, so a token can only be taken back
    after `activate_past_recording()`: from then on every call is kept until the next `crop`.

    Attributes:
        state: what `LongContextLM` takes and returns; None while the cache is empty.
        pads: `[B, n]` bool, which of the columns were pads; those after the n were tokens. None
            without pads. A later attention_mask of the whole sequence is checked against it.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: Any = None
        self.pads: Tensor | None = None
        self._seen = 0
        self._recording = self._recording_for_generate = self._is_user_defined = False
        self._calls: list[_Call] = []
        self._replay: _Call | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seq_length={self._seen}, batch_size={self.batch_size})"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    def settle(self, run: Run) -> None:
        """Bring the state up to where the last `crop` left the cache."""
        if self._replay is not None:
            call, self._replay = self._replay, None
            _, self.state = run(call.x, call.state, call.segment_ids)

    def advance(self, run: Run, x: Tensor, segment_ids: Tensor | None) -> list[Tensor]:
        """Run `[B, T, D]` from the state on, and move it: what `run` returns of the whole call."""
        parts: list[list[Tensor]] = []
        length = x.shape[1]
        apart = self._recording and length > KEPT_APART
        for part in [slice(0, -KEPT_APART), slice(-KEPT_APART, None)] if apart else [slice(None)]:
            ids = None if segment_ids is None else segment_ids[:, part]
            call = _Call(self.state, x[:, part], ids)
            outputs, self.state = run(call.x, call.state, ids)
            parts.append(outputs)
            if self._recording:
                self._calls.append(call)
        self.pads = record_pads(self.pads, self._seen, segment_ids)
        self._seen += length
        if len(parts) == 1:
            return parts[0]
        return [torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True)]

    def begin_generation(self, *, given: bool, assisted: bool) -> None:
        """Get ready for `generate`.

        Args:
            given: whether the cache is the caller's, and outlives the call.
            assisted: whether tokens will be taken back.
        """
        self._is_user_defined = given
        if assisted and not self._recording:
            self._recording = self._recording_for_generate = True
        elif self._recording_for_generate and not assisted:
            self._recording, self._recording_for_generate, self._calls = False, False, []

    def held_segment(self) -> Tensor | None:
        """`[B]`, the id of the segment that each row is in; -1 before its first token."""
        if self.state is None:
            return None
        segment: Tensor = self.state[0].segment
        return segment

    # ---- What generate asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, pads included."""
        return self._seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest sequence."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns that a mask would have, and where they begin."""
        return self._seen + query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether the cache has seen anything."""
        return self._seen > 0

    @property
    def batch_size(self) -> int:
        """Rows; -1 while the cache is empty."""
        held = self.held_segment()
        if held is None:
            return -1 if self._replay is None else len(self._replay.x)
        return len(held)

    @property
    def is_linear(self) -> list[bool]:
        """False: the cache knows how many columns it has seen, and begins where they end."""
        return [False] * max(len(self), 1)

    @property
    def is_initialized(self) -> bool:
        """Whether the cache has seen anything."""
        return self._seen > 0

    @property
    def is_compileable(self) -> bool:
        """False: `generate` shall not compile the model by itself."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back, with `activate_past_recording` beforehand: yes."""
        return True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Not for these layers.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "LongCtxCache.update: expected a LongCtxForCausalLM to move the cache, got keys and "
            "values of another model; give that model a DynamicCache"
        )

    def reset(self) -> None:
        """Forget everything seen."""
        self.state, self.pads, self._seen, self._calls, self._replay = None, None, 0, [], None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by index `[n]`, in that order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices, or of a mask, in that order."""
        rows = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        self._map(lambda state: select_rows(state, rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._map(lambda state: map_state(lambda x: x.repeat_interleave(repeats, 0), state))

    def _map(self, change: Callable[[Any], Any]) -> None:
        if self.state is None and self._replay is None:
            return

        def changed(call: _Call) -> _Call:
            inputs = (call.x,) if call.segment_ids is None else (call.x, call.segment_ids)
            x, *ids = change(inputs)
            return _Call(None if call.state is None else change(call.state), x, *ids or [None])

        self.state = None if self.state is None else change(self.state)
        if self.pads is not None:
            (self.pads,) = change((self.pads,))
        self._calls = [changed(call) for call in self._calls]
        self._replay = None if self._replay is None else changed(self._replay)

    # ---- Taking tokens back

    def activate_past_recording(self) -> None:
        """Keep what is needed to take tokens back: the state before each call, and its inputs."""
        self._recording = True

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """Whether `crop` can take back what is seen from now on."""
        return self._recording

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, and stop keeping what came before them.

        Where a call is taken back in part, the next call computes its other tokens again. Cropping
        by 0 only frees what was kept.

        Args:
            tokens_to_remove: 0, or minus the number of columns to take back; or, as transformers
                before 5.23 has it, the number of columns to leave.

        Raises:
            ValueError: for more than what was recorded.
        """
        remove = -tokens_to_remove
        if tokens_to_remove > 0:
            remove = max(self._seen - tokens_to_remove, 0)
        calls = self._calls if self._replay is None else [self._replay]
        kept = sum(call.x.shape[1] for call in calls)
        if remove > kept:
            raise ValueError(
                f"crop: expected at most the {kept} tokens since recording began or crop was last "
                f"called, got {remove}; a state forgets: call activate_past_recording() before "
                "the tokens that may have to go"
            )
        self._seen -= remove
        if self.pads is not None:
            self.pads = self.pads[:, : self._seen]
        while remove:
            call = calls.pop()
            length = call.x.shape[1]
            self.state, self._replay = call.state, None
            if remove < length:
                ids = None if call.segment_ids is None else call.segment_ids[:, :-remove]
                self._replay = _Call(call.state, call.x[:, :-remove], ids)
            remove -= min(remove, length)
        self._calls = []


def expect_cache(cache: Any) -> LongCtxCache:
    """The cache, or a TypeError for another kind."""
    if not isinstance(cache, LongCtxCache):
        raise TypeError(
            f"past_key_values: expected a LongCtxCache, got a {type(cache).__name__}; leave it out "
            "to begin, or pass longctx_layers.hf.LongCtxCache()"
        )
    return cache


def check_cache_implementation(name: str | None, *, constant: bool) -> None:
    """Raise ValueError for a `cache_implementation` that means nothing to these states.

    Args:
        name: the option of `generate`.
        constant: whether the model's state has a constant size.
    """
    # "dynamic_full" is what assisted generation asks for before 5.23.
    if name in (None, "dynamic", "dynamic_full") or (name == "static" and constant):
        return
    reason = "the state is no keys and values to offload or quantize: leave it out"
    if name == "static":
        reason = "the state of vanilla and baseline_bigbird grows: use other blocks"
    raise ValueError(
        "cache_implementation: expected None, 'dynamic', or 'static' where the state is constant, "
        f"got {name!r}; {reason}"
    )
