"""The state of a converted layer, in the place of keys and values in a cache of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache, StaticLayer

from longctx_layers.layers import map_state, select_rows
from longctx_layers.transformers_calls.documents import record_pads


class StateCacheLayer(CacheLayerMixin):
    """What a cache holds for a converted layer: its state, and the columns that it has seen.

    Attributes:
        state: the layer's state, or None before the first call.
        seen: columns of all calls, pads included: the length as transformers counts it.
        pads: `[B, n]` bool, which of the columns were pads; those after the n were tokens. None
            without pads.
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

    def advance(self, state: Any, length: int, segment_ids: Tensor | None) -> None:
        """Take over the state after a call of `length` columns with these segments."""
        self.pads = record_pads(self.pads, self.seen, segment_ids)
        self.state, self.seen, self.is_initialized = state, self.seen + length, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: there are no keys to make room for."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> NoReturn:
        """Refused: a converted layer never hands out keys and values."""
        raise RuntimeError(
            "StateCacheLayer: expected the converted layer that it belongs to, got keys and values "
            "of another; begin with a new cache for each model"
        )

    def get_seq_length(self) -> int:
        """Columns seen so far."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns and offset of a mask: those of full attention, for layers that kept theirs."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in early versions of transformers 5

    def reset(self) -> None:
        """Begin again."""
        self.state, self.seen, self.pads, self.is_initialized = None, 0, None, False

    def offload(self) -> None:
        """Nothing: a state is small."""

    def prefetch(self) -> None:
        """Nothing, likewise."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows (beams) in this order."""
        self._map(lambda tensors: select_rows(tensors, beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        rows = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        self.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda tensors: map_state(lambda x: x.repeat_interleave(repeats, dim=0), tensors))

    def _map(self, change: Callable[[Any], Any]) -> None:
        if self.state is not None:
            self.state = change(self.state)
        if self.pads is not None:
            (self.pads,) = change((self.pads,))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, but for no tokens: what a state has taken in cannot be taken out again."""
        if tokens_to_remove:
            raise ValueError(
                f"crop: expected 0 tokens to remove, got {tokens_to_remove}; a converted layer's "
                "state cannot go back: copy the cache (copy.deepcopy) before the tokens that may "
                "be withdrawn, and generate without an assistant or prompt lookup"
            )


def state_layer(cache: Any) -> StateCacheLayer | None:
    """The first layer of a cache that holds a state; None without one."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers = cache.layers if isinstance(cache, Cache) else []
    found = (layer for layer in layers if isinstance(layer, StateCacheLayer))
    return next((layer for layer in found if layer.state is not None), None)


def cache_layer(cache: Any, index: int) -> StateCacheLayer:
    """The place of layer `index` in a cache, made ours on the first call.

    Raises:
        TypeError: for caches of another kind, or static ones.
        ValueError: if it holds keys and values of the model before its conversion.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        raise TypeError(
            f"past_key_values: expected a Cache of transformers, got a {type(cache).__name__}; "
            "pass DynamicCache(config=model.config), or nothing"
        )
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) <= index:
        raise TypeError(
            f"past_key_values: expected a DynamicCache, got a {type(cache).__name__} without a "
            f"place for layer {index}; pass DynamicCache(config=model.config), or nothing"
        )
    layer: Any = cache.layers[index]
    if isinstance(layer, StateCacheLayer):
        return layer
    if isinstance(layer, StaticLayer):
        raise TypeError(
            f"past_key_values: expected a DynamicCache, got a {type(cache).__name__}; leave "
            "cache_implementation out: a converted layer's state has a fixed size as it is"
        )
    if layer.get_seq_length():
        raise ValueError(
            "past_key_values: expected an empty cache or one of the converted model, got one with "
            f"{layer.get_seq_length()} tokens of the model before its conversion; begin anew"
        )
    cache.layers[index] = ours = StateCacheLayer()
    return ours
