"""Adapter: a layer of this library with the signature of a transformers attention module."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache

from longctx_layers.convert.cache import cache_layer, first_state_layer
from longctx_layers.convert.families import attention_sites
from longctx_layers.layers import AttentionLayer
from longctx_layers.packing import position_ids_from_segment_ids
from longctx_layers.transformers_calls.arguments import cache_argument, expect_known
from longctx_layers.transformers_calls.documents import DOCUMENTS, call_segments

# Arguments of a decoder that `hand_over_segments` reads.
_READ = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "cache",
        "use_cache",
        *DOCUMENTS,
    }
)
# Arguments that decoders pass on to their attention and that a layer does not need, because
# segment_ids contain what matters to it.
_UNUSED = frozenset(
    {
        "attention_mask",
        "position_ids",
        "position_embeddings",
        "output_hidden_states",
        "return_dict",
        *DOCUMENTS,
        # Arguments of the loss, in calls with labels.
        "num_items_in_batch",
        "ignore_index",
        "shift_labels",
    }
)


class ConvertedAttention(nn.Module):
    """A layer of this library in the place of a transformers attention module.

    `convert_attention` puts it there; `self_attn.layer` (`attn.layer` in GPT-2) is the layer.

    Attributes:
        layer: the layer.
        layer_idx: its index in the model and in the cache.
    """

    def __init__(self, layer: AttentionLayer[Any], layer_idx: int) -> None:
        super().__init__()
        self.layer = layer
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        *,
        past_key_values: Any = None,
        cache: Any = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Run the layer.

        Args:
            hidden_states: `[B, T, D]`, normalised activations.
            past_key_values: a transformers cache that holds the layer's state; or None.
            cache: the name of past_key_values in transformers 5.24 and later.
            use_cache: True if there must be a cache.
            segment_ids: `[B, T]`, from `hand_over_segments`.
            others: masks, positions and the like, which the layer does not need.

        Returns:
            `[B, T, D]`, and None in place of attention weights, which are never formed.

        Raises:
            TypeError: for an unknown argument.
            ValueError: for `use_cache` without a cache.
        """
        name = type(self).__name__
        expect_known(name, others, _UNUSED)
        cache = cache_argument(name, {"past_key_values": past_key_values, "cache": cache})
        if cache is None:
            if use_cache:
                raise ValueError(
                    f"{name}: expected a cache with use_cache=True, got none from transformers "
                    f"{transformers.__version__}, so that the layer would forget all earlier "
                    "tokens; pass use_cache=False. If the model was given a cache, that version "
                    "of transformers is too new for this library: install an older one"
                )
            y, _ = self.layer(hidden_states, segment_ids=segment_ids)
            return y, None
        layer_cache = cache_layer(cache, self.layer_idx)
        y, state = self.layer(hidden_states, layer_cache.state, segment_ids=segment_ids)
        layer_cache.record(state, hidden_states.shape[1], segment_ids)
        return y, None


def hand_over_segments(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a decoder that passes segment ids to the converted layers.

    They are computed from the decoder's masks, positions and documents. If all layers are
    converted, the decoder makes no mask of its own, whose size would be quadratic in the length.
    """
    if args:
        kwargs = {**inspect.signature(decoder.forward).bind_partial(*args).arguments, **kwargs}
    if kwargs.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
        raise ValueError(
            "output_attentions: expected False for a converted model, got True; leave it out: its "
            "layers never form the attention weights"
        )
    where = f"converted {type(decoder).__name__}"
    expect_known(where, kwargs, _READ | _UNUSED)
    documents = [name for name in DOCUMENTS if kwargs.get(name) is not None]
    cache = cache_argument(where, kwargs)
    seen = cache.get_seq_length() if isinstance(cache, Cache) else 0
    if seen and kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError(
            f"cu_seq_lens_q: expected an empty cache, got one with {seen} tokens, whose document "
            "may or may not continue; pass segment_ids instead"
        )
    segments = _segment_ids(kwargs, cache, seen)
    kwargs["segment_ids"] = segments
    if documents and segments is not None and not seen and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = position_ids_from_segment_ids(segments)
    if all(isinstance(site.attention, ConvertedAttention) for site in attention_sites(decoder)):
        # Decoders pass a four-dimensional mask to their layers without changing it.
        kwargs["attention_mask"] = torch.empty(0, 0, 0, 0)
    elif documents and (cache is not None or kwargs.get("attention_mask") is not None):
        raise ValueError(
            f"{documents[0]}: expected neither attention_mask nor past_key_values with it, because "
            "layers that kept their attention separate documents by positions alone; leave them "
            "out, or convert all layers"
        )
    elif segments is not None and kwargs.get("attention_mask") is None:
        kwargs["use_cache"] = False  # with one, unconverted layers would not separate documents
    return (), kwargs


def _segment_ids(kwargs: dict[str, Any], cache: Any, seen: int) -> Tensor | None:
    """The segment ids of a call, `[B, T]`; None if every row continues without padding."""
    inputs = kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        return None  # the decoder raises the error
    mask = kwargs.get("attention_mask")
    # As in transformers, positions separate documents only without a mask and a cache.
    packed = mask is None and cache is None
    layer_cache = first_state_layer(cache)
    return call_segments(
        (inputs.shape[0], inputs.shape[1]),
        None if layer_cache is None else layer_cache.state.segment,
        seen,
        attention_mask=mask,
        position_ids=kwargs.get("position_ids") if packed else None,
        segment_ids=kwargs.get("segment_ids"),
        seq_idx=kwargs.get("seq_idx"),
        cu_seq_lens=kwargs.get("cu_seq_lens_q"),
        pads=None if layer_cache is None else layer_cache.pads,
    )
