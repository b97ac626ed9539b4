"""Keep the states of converted layers in a transformers cache, in place of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache, StaticLayer

from longctx_layers.layers import map_state, select_rows
from longctx_layers.transformers_calls.documents import record_pads


class StateCacheLayer(CacheLayerMixin):
    """One layer's entry in a transformers cache: a state instead of keys and values.

    Attributes:
        state: the layer's state, or None before the first call.
        seen: number of columns read so far, including padding: the length in transformers' sense.
        pads: `[B, n]` bool, which of the first n columns were padding; later columns were tokens.
            None if there was no padding.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0
        self.pads: Tensor | None = None

    def record(self, state: Any, length: int, segment_ids: Tensor | None) -> None:
        """Take over the state after a call of `length` columns with these segment ids."""
        self.pads = record_pads(self.pads, self.seen, segment_ids)
        self.state = state
        self.seen += length
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there are no keys to allocate."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> NoReturn:
        """Raise RuntimeError: there are no keys and values to append to."""
        raise RuntimeError(
            "StateCacheLayer: expected to be used by a converted layer, got keys and values of "
            "another model; use a new cache for each model"
        )

    def get_seq_length(self) -> int:
        """Return the number of columns read so far."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the size and offset of a mask for layers that kept their full attention."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Return -1, as there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in early versions of transformers 5

    def reset(self) -> None:
        """Empty the cache."""
        self.state = None
        self.seen = 0
        self.pads = None
        self.is_initialized = False

    def offload(self) -> None:
        """Do nothing: a state is small."""

    def prefetch(self) -> None:
        """Do nothing: nothing was offloaded."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows (beams) by index, `[n]`, in that order."""
        self._map(lambda tensors: select_rows(tensors, beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows by index, `[n]` in that order, or by a bool mask `[B]`."""
        rows = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        self.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, next to itself."""
        self._map(lambda tensors: map_state(lambda x: x.repeat_interleave(repeats, dim=0), tensors))

    def _map(self, change: Callable[[Any], Any]) -> None:
        if self.state is not None:
            self.state = change(self.state)
        if self.pads is not None:
            (self.pads,) = change((self.pads,))

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError unless there is nothing to remove: a state cannot be rewound."""
        if tokens_to_remove:
            raise ValueError(
                f"crop: expected 0 tokens to remove, got {tokens_to_remove}; a converted layer's "
                "state cannot be rewound: copy the cache (copy.deepcopy) before tokens that may "
                "have to be removed, and generate without an assistant or prompt lookup"
            )


def first_state_layer(cache: Any) -> StateCacheLayer | None:
    """Return the first entry of a cache that holds a state; None if there is none."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers = cache.layers if isinstance(cache, Cache) else []
    state_layers = (layer for layer in layers if isinstance(layer, StateCacheLayer))
    return next((layer for layer in state_layers if layer.state is not None), None)


def cache_layer(cache: Any, index: int) -> StateCacheLayer:
    """Return the entry of layer `index` in a cache; at the first call, put a new one there.

    Raises:
        TypeError: for other kinds of cache, and static ones.
        ValueError: if the cache holds keys and values from before the model was converted.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        raise TypeError(
            f"past_key_values: expected a Cache of transformers, got a {type(cache).__name__}; "
            "pass DynamicCache(config=model.config), or leave it out"
        )
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) <= index:
        raise TypeError(
            f"past_key_values: expected a DynamicCache, got a {type(cache).__name__} without an "
            f"entry for layer {index}; pass DynamicCache(config=model.config), or leave it out"
        )
    layer: Any = cache.layers[index]
    if isinstance(layer, StateCacheLayer):
        return layer
    if isinstance(layer, StaticLayer):
        raise TypeError(
            f"past_key_values: expected a DynamicCache, got a {type(cache).__name__}; do not set "
            "cache_implementation: the state of a converted layer has a fixed size anyway"
        )
    if layer.get_seq_length():
        raise ValueError(
            "past_key_values: expected an empty cache or one of the converted model, got one with "
            f"keys and values of {layer.get_seq_length()} tokens from before its conversion; start "
            "with a new cache"
        )
    state_layer = StateCacheLayer()
    cache.layers[index] = state_layer
    return state_layer
