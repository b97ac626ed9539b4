"""`LongCtxCache`: the model's state in the form of a transformers cache.

Design
------
transformers expects one cache object that the model updates in place, whereas these layers return
a new state from each call. The cache therefore holds the latest state, and the model calls
`record` with the next one.

Assisted generation also needs to remove tokens: the model reads several guessed tokens at once,
and `crop` removes the wrong ones. Keys and values can simply be cut off, but a recurrent state
cannot be rewound. So while `activate_past_recording` is in effect, the cache keeps for each call
the state before it and its inputs (a state is small, and so are the inputs of a few tokens).
`crop(-n)` drops whole calls by restoring the state before them. If it cuts a call in the middle,
the remaining columns must be read again, from the state before that call. The cache cannot run the
model, so it keeps them as `unread`, and the model reads them at its next call.

Rereading a long prompt for the sake of its last few tokens would be slow. `parts` splits off the
last 64 columns of a long call as a call of their own; guesses are shorter, so `crop` rarely has to
go back further. The recording ends with the next `crop`, as transformers defines it, or with the
next `generate` without an assistant, if it was `generate` that switched it on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from longctx_layers.layers import map_state, select_rows
from longctx_layers.transformers_calls.documents import record_pads

LAST_PART = 64  # columns at the end of a recorded call that crop can remove without the others


class RecordedCall(NamedTuple):
    """What it takes to repeat a call.

    Attributes:
        state: the state before the call.
        x: `[B, T, D]`, embedded tokens.
        segment_ids: `[B, T]` or None.
    """

    state: Any
    x: Tensor
    segment_ids: Tensor | None


class LongCtxCache(Cache):
    """Continue a `LongCtxForCausalLM` from call to call; replaces a key-value cache.

    >>> from longctx_layers.hf import LongCtxCache, LongCtxForCausalLM
    >>> model = LongCtxForCausalLM.from_native(create_model(256, "tiny")).eval()
    >>> cache = LongCtxCache()
    >>> for ids in torch.randint(256, (2, 12)).split(4, dim=1):
    ...     logits = model(ids, past_key_values=cache).logits
    >>> cache
    LongCtxCache(seq_length=12, batch_size=2)

    It takes the memory of the layers' states, which is constant for dpassm, blade, window and
    baseline_longformer. `copy.deepcopy(cache)` forks a conversation. Tokens can only be removed
    after `activate_past_recording()`, because a state cannot be rewound; from then on, every call
    is kept until the next `crop`.

    Attributes:
        state: the state that `LongContextLM` takes and returns; None while the cache is empty.
        pads: `[B, n]` bool, which of the first n columns were padding; later columns were tokens.
            None if there was no padding. An attention_mask of the whole sequence must agree with
            it.
        unread: columns to read again before the next call, left over from a `crop` within a call;
            None in general.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: Any = None
        self.pads: Tensor | None = None
        self.unread: RecordedCall | None = None
        self._seen = 0
        self._recording = False
        self._recording_for_generate = False
        self._is_user_defined = False  # read by transformers
        self._calls: list[RecordedCall] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seq_length={self._seen}, batch_size={self.batch_size})"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    # ---- For the model

    def reread(self, state: Any) -> None:
        """Replace the state by the one after the `unread` columns."""
        self.state = state
        self.unread = None

    def parts(self, length: int) -> list[slice]:
        """Return how the model must split the columns of a call, to `record` each part."""
        if self._recording and length > LAST_PART:
            return [slice(0, -LAST_PART), slice(-LAST_PART, None)]
        return [slice(None)]

    def record(self, x: Tensor, segment_ids: Tensor | None, state: Any) -> None:
        """Take over the state after a call, or a part of one.

        Args:
            x: `[B, T, D]`, the embedded tokens that were read from the previous state.
            segment_ids: `[B, T]`, or None for tokens that continue their segment.
            state: the new state.
        """
        if self._recording:
            self._calls.append(RecordedCall(self.state, x, segment_ids))
        self.state = state
        self.pads = record_pads(self.pads, self._seen, segment_ids)
        self._seen += x.shape[1]

    def begin_generation(self, *, user_defined: bool, assisted: bool) -> None:
        """Prepare for a call of `generate`.

        Args:
            user_defined: whether the cache was passed to `generate`, so that it outlives the call.
            assisted: whether tokens will be removed.
        """
        self._is_user_defined = user_defined
        if assisted and not self._recording:
            self._recording = True
            self._recording_for_generate = True
        elif self._recording_for_generate and not assisted:
            self._recording = False
            self._recording_for_generate = False
            self._calls = []

    def held_segment(self) -> Tensor | None:
        """Return the id of the segment that each row is in, `[B]`; -1 before its first token."""
        if self.state is None:
            return None
        segment: Tensor = self.state[0].segment
        return segment

    # ---- The interface of a transformers cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns read so far, including padding."""
        return self._seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1, as there is no longest sequence."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of columns that a mask would have, and the first one."""
        return self._seen + query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Return whether the cache has read anything."""
        return self._seen > 0

    @property
    def batch_size(self) -> int:
        """Number of rows; -1 while the cache is empty."""
        held = self.held_segment()
        if held is None:
            return -1 if self.unread is None else len(self.unread.x)
        return len(held)

    @property
    def is_linear(self) -> list[bool]:
        """False, because the cache counts its columns itself."""
        return [False] * max(len(self), 1)

    @property
    def is_initialized(self) -> bool:
        """Whether the cache has read anything."""
        return self._seen > 0

    @property
    def is_compileable(self) -> bool:
        """False, so that `generate` does not compile the model on its own."""
        return False

    @property
    def is_croppable(self) -> bool:
        """True: tokens can be removed, after `activate_past_recording`."""
        return True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Raise TypeError: there are no keys and values to append to."""
        raise TypeError(
            "LongCtxCache.update: expected to be used by a LongCtxForCausalLM, got keys and values "
            "of another model; pass a DynamicCache to that model"
        )

    def reset(self) -> None:
        """Empty the cache."""
        self.state = None
        self.pads = None
        self.unread = None
        self._seen = 0
        self._calls = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows (beams) by index, `[n]`, in that order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows by index, `[n]` in that order, or by a bool mask `[B]`."""
        rows = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        self._map(lambda state: select_rows(state, rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, next to itself."""
        self._map(lambda state: map_state(lambda x: x.repeat_interleave(repeats, 0), state))

    def _map(self, change: Callable[[Any], Any]) -> None:
        """Apply a change of rows to everything that the cache holds."""
        if self.state is None and self.unread is None:
            return

        def changed(call: RecordedCall) -> RecordedCall:
            state = None if call.state is None else change(call.state)
            (x,) = change((call.x,))
            segment_ids = call.segment_ids
            if segment_ids is not None:
                (segment_ids,) = change((segment_ids,))
            return RecordedCall(state, x, segment_ids)

        self.state = None if self.state is None else change(self.state)
        if self.pads is not None:
            (self.pads,) = change((self.pads,))
        self._calls = [changed(call) for call in self._calls]
        self.unread = None if self.unread is None else changed(self.unread)

    # ---- Removing tokens

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs: the state before each call from now on, and its inputs."""
        self._recording = True

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """Return whether `crop` can remove the tokens that are read from now on."""
        return self._recording

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, and free the recording of those that stay.

        If only a part of a call is removed, the next call computes its other tokens again.

        Args:
            tokens_to_remove: minus the number of columns to remove, or 0 to free the recording
                only. A positive number is the number of columns to leave, as in transformers
                before 5.23.

        Raises:
            ValueError: if the columns to remove were not all recorded.
        """
        remove = -tokens_to_remove
        if tokens_to_remove > 0:
            remove = max(self._seen - tokens_to_remove, 0)
        calls = self._calls if self.unread is None else [self.unread]
        recorded = sum(call.x.shape[1] for call in calls)
        if remove > recorded:
            raise ValueError(
                f"crop: expected to remove at most the {recorded} tokens since recording began or "
                f"crop was last called, got {remove}; a state cannot be rewound: call "
                "activate_past_recording() before tokens that may have to be removed"
            )
        self._seen -= remove
        if self.pads is not None:
            self.pads = self.pads[:, : self._seen]
        while remove:
            call = calls.pop()
            length = call.x.shape[1]
            self.state = call.state
            self.unread = None
            if remove < length:
                ids = None if call.segment_ids is None else call.segment_ids[:, :-remove]
                self.unread = RecordedCall(call.state, call.x[:, :-remove], ids)
            remove -= min(remove, length)
        self._calls = []


def expect_cache(cache: Any) -> LongCtxCache:
    """Return the cache; raise TypeError if it is of another kind."""
    if not isinstance(cache, LongCtxCache):
        raise TypeError(
            f"past_key_values: expected a LongCtxCache, got a {type(cache).__name__}; pass "
            "longctx_layers.hf.LongCtxCache(), or leave it out"
        )
    return cache


def check_cache_implementation(name: str | None, *, constant: bool) -> None:
    """Raise ValueError for a `cache_implementation` that this cache cannot provide.

    Args:
        name: the option of `generate`.
        constant: whether the model's state has a constant size.
    """
    # Assisted generation before transformers 5.23 asks for "dynamic_full".
    if name in (None, "dynamic", "dynamic_full") or (name == "static" and constant):
        return
    remedy = "leave it out: there are no keys and values to offload or quantize"
    if name == "static":
        remedy = "leave it out, or use other layers: this model's state grows with the sequence"
    raise ValueError(
        "cache_implementation: expected None, 'dynamic', or 'static' for a model whose state has a "
        f"constant size, got {name!r}; {remedy}"
    )
