"""The state of a converted layer, in the place of keys and values in a cache of transformers."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache, StaticLayer

from longctx_layers.layers import map_state, select_rows


class StateCacheLayer(CacheLayerMixin):
    """What a cache holds for a converted layer: its state, and the columns that it has seen.

    Attributes:
        state: the layer's state, or None before the first call.
        seen: columns of all calls, pads included: the length as transformers counts it.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0

    def advance(self, state: Any, length: int) -> None:
        """Take over the state behind a call of `length` columns."""
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

    def reset(self) -> None:
        """Begin again."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def offload(self) -> None:
        """Nothing: a state is small."""

    def prefetch(self) -> None:
        """Nothing, likewise."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows (beams) in this order."""
        if self.state is not None:
            self.state = select_rows(self.state, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        if self.state is not None and indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            self.state = map_state(lambda x: x.repeat_interleave(repeats, dim=0), self.state)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, but for no tokens: what a state has taken in cannot be taken out again."""
        if tokens_to_remove:
            raise ValueError(
                f"crop: expected 0 tokens to remove, got {tokens_to_remove}; a converted layer's "
                "state cannot go back: copy the cache (copy.deepcopy) before the tokens that may "
                "be withdrawn, and generate without an assistant or prompt lookup"
            )


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
