"""A layer of ours behind the interface that transformers' decoders give their attention."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache

from longctx_layers.convert.cache import cache_layer, state_layer
from longctx_layers.convert.families import attention_sites
from longctx_layers.layers import AttentionLayer
from longctx_layers.packing import position_ids_from_segment_ids
from longctx_layers.transformers_calls.arguments import expect_known, given_cache
from longctx_layers.transformers_calls.documents import DOCUMENTS, call_segments

# What `hand_over_segments` reads.
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
# What decoders hand on to their attention, and a layer has no need of: what it must know of it is
# in segment_ids.
_DONE = frozenset(
    {
        "attention_mask",
        "position_ids",
        "position_embeddings",
        "output_hidden_states",
        "return_dict",
        *DOCUMENTS,
        # Of the loss, in calls with labels.
        "num_items_in_batch",
        "ignore_index",
        "shift_labels",
    }
)


class ConvertedAttention(nn.Module):
    """Takes what a decoder of transformers passes to its attention, and returns what it expects.

    Attributes:
        layer: the layer of this library.
        layer_idx: its place in the model and in the cache.
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
        """`[B, T, D]` to the same, and None for the attention weights, which never exist.

        Args:
            hidden_states: normalised activations.
            past_key_values: a cache of transformers, which keeps the layer's state; or None.
            cache: the same, by its name in transformers 5.24 and later.
            use_cache: whether there must be a cache.
            segment_ids: `[B, T]`, from `hand_over_segments`.
            others: masks, positions and the like, which the layer has no need of.

        Raises:
            TypeError: for an argument that the layer doesn't know.
            ValueError: if `use_cache` comes without a cache.
        """
        name = type(self).__name__
        expect_known(name, others, _DONE)
        held = given_cache(name, {"past_key_values": past_key_values, "cache": cache})
        if held is None:
            if use_cache:
                raise ValueError(
                    f"{name}: expected a cache with use_cache=True, got none from transformers "
                    f"{transformers.__version__}, so that the layer would forget all earlier "
                    "tokens; pass use_cache=False. If the model was given a cache, this version "
                    "is newer than this library knows: install an older one"
                )
            y, _ = self.layer(hidden_states, segment_ids=segment_ids)
            return y, None
        place = cache_layer(held, self.layer_idx)
        y, state = self.layer(hidden_states, place.state, segment_ids=segment_ids)
        place.advance(state, hidden_states.shape[1], segment_ids)
        return y, None


def hand_over_segments(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a decoder's forward: what its masks say, as segment ids for the converted layers.

    Where all layers are converted, no mask is made: it would grow with the square of the length.
    """
    if args:
        kwargs = {**inspect.signature(decoder.forward).bind_partial(*args).arguments, **kwargs}
    if kwargs.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
        raise ValueError(
            "output_attentions: expected False for a converted model, got True; its layers never "
            "form the matrix of attention weights"
        )
    where = f"converted {type(decoder).__name__}"
    expect_known(where, kwargs, _READ | _DONE)
    documents = [name for name in DOCUMENTS if kwargs.get(name) is not None]
    cache = given_cache(where, kwargs)
    seen = cache.get_seq_length() if isinstance(cache, Cache) else 0
    if seen and kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError(
            f"cu_seq_lens_q: expected an empty cache, got one with {seen} tokens, whose document "
            "may go on or not; pass segment_ids"
        )
    kwargs["segment_ids"] = segments = _segment_ids(kwargs, cache, seen)
    if documents and segments is not None and not seen and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = position_ids_from_segment_ids(segments)
    if all(isinstance(site.attention, ConvertedAttention) for site in attention_sites(decoder)):
        # Decoders hand a mask of four dimensions to their layers as it is.
        kwargs["attention_mask"] = torch.empty(0, 0, 0, 0)
    elif documents and (cache is not None or kwargs.get("attention_mask") is not None):
        raise ValueError(
            f"{documents[0]}: expected neither attention_mask nor past_key_values beside it, since "
            "layers that kept their attention know documents by positions alone; leave them out, "
            "or convert all layers"
        )
    elif segments is not None and kwargs.get("attention_mask") is None:
        kwargs["use_cache"] = False  # with one, the kept layers would not look for documents
    return (), kwargs


def _segment_ids(kwargs: dict[str, Any], cache: Any, seen: int) -> Tensor | None:
    """`[B, T]`: documents of packed rows, -1 at pads; None for one segment in each row."""
    ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    inputs = embeddings if ids is None else ids
    if inputs is None:
        return None  # the decoder itself has an error for it
    mask = kwargs.get("attention_mask")
    # As in transformers, where positions tell documents if there is neither a mask nor a cache.
    packed = mask is None and cache is None
    before = state_layer(cache)
    return call_segments(
        (inputs.shape[0], inputs.shape[1]),
        None if before is None else before.state.segment,
        seen,
        attention_mask=mask,
        position_ids=kwargs.get("position_ids") if packed else None,
        segment_ids=kwargs.get("segment_ids"),
        seq_idx=kwargs.get("seq_idx"),
        cu_seq_lens=kwargs.get("cu_seq_lens_q"),
        pads=None if before is None else before.pads,
    )
