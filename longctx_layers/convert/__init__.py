"""Conversion of pretrained models: their attention becomes a layer of this library, in place.

from longctx_layers.convert import convert_attention
model = AutoModelForCausalLM.from_pretrained(...)
model = convert_attention(model, "dpassm", window_size=1024)
"""

from __future__ import annotations

import inspect
import operator
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

try:
    import transformers
    from transformers.cache_utils import DynamicLayer
except ImportError as error:
    raise ImportError(
        "longctx_layers.convert: expected the package transformers, which is not installed; "
        "pip install 'longctx-layers[hf]'"
    ) from error

from longctx_layers.convert.attention import ConvertedAttention, hand_over_segments
from longctx_layers.convert.families import Site, attention_sites, build_like, find_decoder
from longctx_layers.convert.model import adopt, converted_class
from longctx_layers.layers import layer_options
from longctx_layers.layers.init import mark_drawn
from longctx_layers.layers.parameters import FULL_PRECISION
from longctx_layers.ops.checks import expect_positive

RECORD = "longctx_attention"
# Arguments of from_pretrained that say where the files are.
WHERE = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
# The pretrained model decides these, or its weights do.
_GIVEN = ("n_kv_heads", "rope_base", "dropout", "projection", "device", "dtype")


def convert_attention(
    model: nn.Module,
    block_type: str = "dpassm",
    *,
    layers: Sequence[int] | None = None,
    dropout: float | None = None,
    **options: Any,
) -> nn.Module:
    """Replace the attention of a Llama, Mistral, Qwen2, Qwen3 or GPT-2 model, in place.

    The q, k, v and o projections stay (the very modules, where they are linear layers: with their
    biases, adapters and place in an optimizer), and so do grouped heads, head_dim, q/k norms and
    the rotary embedding, `linear` and `llama3` scaling included. With `dpassm` the state space
    joins by `fuse="residual"`: it adds nothing at first and still learns. So the converted model
    computes what the original does, up to rounding, for sequences that the window covers, and
    beyond them what the original does with a sliding window of that size. The same holds for
    `window`, `vanilla` and the two baselines (but for what these see outside their window). It does
    not for `blade` with a state, and for `fuse="gate"`, which begin as something new: they need
    more training.

    `generate`, caches, beams, attention masks `[B, T]` and packed rows (position_ids that start
    again, without a mask and a cache) go on working. The layers' states live in the cache that the
    model makes or is given, in place of keys and values. Tokens that a mask leaves out are no-ops
    and take no place in the window.

    Args:
        model: of transformers: a whole model (e.g. for causal language modelling) or its decoder.
            Convert before torch.compile, FSDP or DDP; it may be on the meta device.
        block_type: a name in `LAYERS`.
        layers: indices of the layers to convert, negative ones from the end; None for all. If some
            keep their attention, their keys, values and masks grow as before.
        dropout: of the attention weights and of the output, in training. None for that of the
            model, which must then be one number for both.
        options: of the layer, e.g. `window_size`, `ssm_state_dim`; see its class.

    Returns:
        The model itself. `model.config` now has the record `longctx_attention`, from which
        `load_converted` builds it again. The class of the model and of its decoder is now a
        subclass of the same name.

    Raises:
        ImportError: with transformers before 5.4.
        ValueError, TypeError: for models, layers or options that cannot be converted; what cannot
            be kept (rotary embeddings scaled otherwise, cross-attention, sinks, caps on scores) is
            refused before anything is changed.
    """
    _expect_new_transformers()
    decoder = find_decoder(model)
    sites = attention_sites(decoder)
    chosen = _chosen(layers, len(sites))
    done = [i for i, site in enumerate(sites) if isinstance(site.attention, ConvertedAttention)]
    if twice := sorted(set(done) & set(chosen)):
        raise ValueError(
            f"layers: expected layers with the model's own attention, got {twice}, which are "
            "converted already; leave them out"
        )
    options = _completed(block_type, options)
    # All are built before the first is replaced: an error leaves the model as it was.
    built = {
        index: build_like(
            sites[index], decoder.config, block_type, dropout, _varied(block_type, options, index)
        )
        for index in chosen
    }
    for index, layer in built.items():
        site: Site = sites[index]
        replacement = ConvertedAttention(layer, index).train(layer.training)
        mark_drawn(replacement)
        setattr(site.parent, site.name, replacement)
    adopt(model, decoder)
    record = {"block_type": block_type, "layers": chosen, "dropout": dropout, **options}
    before = getattr(decoder.config, RECORD) if done else []
    setattr(decoder.config, RECORD, [*before, record])
    # Loading and DeepSpeed read it from the model, which has its own list since its `post_init`.
    for owner in {model, decoder}:
        if isinstance(owner, transformers.PreTrainedModel):
            kept = set(owner._keep_in_fp32_modules_strict or ())
            owner._keep_in_fp32_modules_strict = kept | set(FULL_PRECISION)
    if not done:
        decoder.register_forward_pre_hook(hand_over_segments, with_kwargs=True)
    return model


def load_converted(directory: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The converted model that `model.save_pretrained(directory)` wrote, in evaluation mode.

    Args:
        directory: the folder.
        kwargs: for the `from_pretrained` of the model's class, e.g. `dtype` and `device_map`.

    Raises:
        ValueError: if the folder's config has no record of a conversion.
    """
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    config = transformers.AutoConfig.from_pretrained(directory, **where)
    record = getattr(config.get_text_config(decoder=True), RECORD, None)
    if not record:
        raise ValueError(
            f"{directory}: expected a config with {RECORD!r}, as a converted model's has, found "
            "none; load it with transformers' from_pretrained"
        )
    base = getattr(transformers, name := config.architectures[0], None)
    if base is None:
        raise ValueError(
            f"{directory}: expected a model class of transformers, found {name!r}; build the model "
            f"yourself, convert it by its config's {RECORD!r}, and load the weights"
        )

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        for conversion in record:
            convert_attention(self, **conversion)

    # Under its own name, so that what transformers writes and prints names the model's class.
    made = converted_class(base)
    loader: Any = type(base.__name__, (made,), {"__init__": init, "__module__": base.__module__})
    loaded = loader.from_pretrained(directory, config=config, **kwargs)
    # With output_loading_info, a pair.
    (loaded[0] if isinstance(loaded, tuple) else loaded).__class__ = made
    return loaded


def _expect_new_transformers() -> None:
    # Before 5.4, a cache is asked for the columns of a mask in another way, and GPT-2 drops the
    # arguments that tell documents apart.
    if "query_length" not in inspect.signature(DynamicLayer.get_mask_sizes).parameters:
        raise ImportError(
            "convert_attention: expected transformers 5.6 or newer, got "
            f"{transformers.__version__}; pip install 'longctx-layers[hf]'"
        )


def _chosen(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers: expected a list of layer indices, got {layers!r}; pass e.g. [0]")
    if wrong := [i for i in layers if isinstance(i, bool) or not hasattr(i, "__index__")]:
        raise TypeError(f"layers: expected integers, got {wrong}; pass indices, e.g. [0, -1]")
    chosen = sorted({i % count for i in map(operator.index, layers) if -count <= i < count})
    if len(chosen) < len(layers) or not chosen:
        raise ValueError(
            f"layers: expected different indices in [-{count}, {count}), got {list(layers)}; the "
            f"model has {count} layers"
        )
    return chosen


def _completed(block_type: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a conversion, those for `fuse` included."""
    valid = [name for name in layer_options(block_type) if name not in _GIVEN]
    unknown = [name for name in options if name not in valid]
    if unknown:
        raise ValueError(
            f"convert_attention: expected options of {block_type!r} out of {valid}, got {unknown}; "
            f"check the spelling ({', '.join(_GIVEN)} are the pretrained model's affair)"
        )
    if "window_size" in options:
        expect_positive("window_size", options["window_size"])
    return {"fuse": "residual", **options} if "fuse" in valid else options


def _varied(block_type: str, options: dict[str, Any], index: int) -> dict[str, Any]:
    # No two layers draw the same random keys.
    return {"seed": index, **options} if "seed" in layer_options(block_type) else options


__all__ = ["ConvertedAttention", "convert_attention", "load_converted"]
