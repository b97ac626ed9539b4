"""`convert_attention` and `load_converted`: convert a pretrained model, and load it again."""

from __future__ import annotations

import inspect
import operator
import os
from collections.abc import Sequence
from typing import Any

import transformers
from torch import nn
from transformers.cache_utils import DynamicLayer

from longctx_layers.command_line import closest
from longctx_layers.convert.attention import ConvertedAttention, hand_over_segments
from longctx_layers.convert.build import build_like
from longctx_layers.convert.families import attention_sites, find_decoder
from longctx_layers.convert.model import adopt, converted_class
from longctx_layers.layers import layer_options
from longctx_layers.layers.init import mark_drawn
from longctx_layers.layers.parameters import FULL_PRECISION
from longctx_layers.ops.checks import expect_positive

RECORD = "longctx_attention"  # the field of a model's config that lists its conversions

# Arguments of from_pretrained that say where the files are.
LOCATION = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")

# Options of a layer that follow from the pretrained model.
FROM_MODEL = ("n_kv_heads", "rope_base", "dropout", "projection", "device", "dtype")


def convert_attention(
    model: nn.Module,
    block_type: str = "dpassm",
    *,
    layers: Sequence[int] | None = None,
    dropout: float | None = None,
    **options: Any,
) -> nn.Module:
    """Replace the attention of a Llama, Mistral, Qwen2, Qwen3 or GPT-2 model, in place.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from longctx_layers.convert import convert_attention
    >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes))
    >>> model = convert_attention(model, "dpassm", window_size=16)
    >>> model(torch.randint(256, (1, 100))).logits.shape
    torch.Size([1, 100, 256])

    The converted model computes the same as the original, up to rounding, for sequences that fit
    into the window, and beyond them the same as the original with a sliding window of that size.
    This holds for `dpassm`, whose state-space path is added with `fuse="residual"`, so that it
    contributes nothing at first and still learns; for `window` and `vanilla`; and for the two
    baselines, apart from what these see outside their window. It does not hold for `blade` with a
    state or for `fuse="gate"`, which change the function and need more training.

    The q, k, v and o projections are kept: if they are linear layers, they remain the same modules,
    with their biases, adapters and optimizer state. Grouped heads, head_dim, q/k norms and the
    rotary embedding are kept too, including `linear` and `llama3` scaling.

    `generate`, caches, beam search, attention masks `[B, T]` and packed rows (position_ids that
    restart, without a mask or a cache) still work. The states of the layers are kept in the cache
    that the model creates or is given, in place of keys and values. Tokens that a mask leaves out
    are skipped and do not count towards the window.

    Args:
        model: a transformers model, either whole (e.g. for causal language modelling) or only its
            decoder. Convert it before torch.compile, FSDP or DDP; it may be on the meta device.
        block_type: a name in `LAYERS`.
        layers: indices of the layers to convert, negative ones from the end; None for all. If some
            layers keep their attention, their keys, values and masks grow as before.
        dropout: for the attention weights and the output, in training. By default that of the
            model, which must then be the same for both.
        options: options of the layer, e.g. `window_size`, `ssm_state_dim`; see its class.

    Returns:
        The same model. `model.config` has a new field `longctx_attention`, from which
        `load_converted` rebuilds it. The classes of the model and of its decoder are replaced by
        subclasses of the same name.

    Raises:
        ImportError: for transformers before 5.4.
        ValueError, TypeError: for models, layers or options that cannot be converted, including
            what cannot be preserved: other scaling of the rotary embedding, cross-attention,
            attention sinks, caps on scores. The model is unchanged in this case.
    """
    _check_transformers()
    decoder = find_decoder(model)
    sites = attention_sites(decoder)
    chosen = _layer_indices(layers, len(sites))
    converted = [
        i for i, site in enumerate(sites) if isinstance(site.attention, ConvertedAttention)
    ]
    if twice := sorted(set(converted) & set(chosen)):
        raise ValueError(
            f"layers: expected layers that still have the model's attention, got {twice}, which "
            "are converted already; leave them out"
        )
    options = _check_options(block_type, options)
    # Build all layers before replacing the first, so that an error leaves the model unchanged.
    new_layers = {
        index: build_like(
            sites[index],
            decoder.config,
            block_type,
            dropout,
            _with_seed(block_type, options, index),
        )
        for index in chosen
    }
    for index, layer in new_layers.items():
        replacement = ConvertedAttention(layer, index).train(layer.training)
        mark_drawn(replacement)
        setattr(sites[index].parent, sites[index].name, replacement)
    adopt(model, decoder)
    record = {"block_type": block_type, "layers": chosen, "dropout": dropout, **options}
    earlier_records = getattr(decoder.config, RECORD) if converted else []
    setattr(decoder.config, RECORD, [*earlier_records, record])
    # transformers' loader and DeepSpeed ask the model, which made its own list in `post_init`.
    for owner in {model, decoder}:
        if isinstance(owner, transformers.PreTrainedModel):
            names = set(owner._keep_in_fp32_modules_strict or ())
            owner._keep_in_fp32_modules_strict = names | set(FULL_PRECISION)
    if not converted:
        decoder.register_forward_pre_hook(hand_over_segments, with_kwargs=True)
    return model


def load_converted(directory: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a converted model that `model.save_pretrained(directory)` wrote, in evaluation mode.

    >>> import tempfile
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from longctx_layers.convert import convert_attention, load_converted
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4))
    >>> model = convert_attention(model, "window", window_size=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder)
    ...     model = load_converted(folder)

    Args:
        directory: the folder.
        kwargs: arguments of `from_pretrained` of the model's class, e.g. `dtype` or `device_map`.

    Raises:
        ValueError: if the folder's config has no record of a conversion, or if its model class is
            not one of transformers.
    """
    location = {name: kwargs[name] for name in LOCATION if name in kwargs}
    config = transformers.AutoConfig.from_pretrained(directory, **location)
    records = getattr(config.get_text_config(decoder=True), RECORD, None)
    if not records:
        raise ValueError(
            f"{directory}: expected the config of a converted model, with the field {RECORD!r}, "
            "got one without it; load the model with from_pretrained of transformers"
        )
    class_name = config.architectures[0]
    base = getattr(transformers, class_name, None)
    if base is None:
        raise ValueError(
            f"{directory}: expected a model class of transformers, got {class_name!r}; build the "
            f"model yourself, convert it as its config's {RECORD!r} says, and load the weights"
        )

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        for record in records:
            convert_attention(self, **record)

    converted = converted_class(base)
    # It has the name of the original class, which transformers writes to files and messages.
    members = {"__init__": init, "__module__": base.__module__}
    loader: Any = type(base.__name__, (converted,), members)
    result = loader.from_pretrained(directory, config=config, **kwargs)
    model = result[0] if isinstance(result, tuple) else result  # with output_loading_info, a pair
    model.__class__ = converted
    return result


def _check_transformers() -> None:
    # Before 5.4, a cache is asked for the columns of a mask in another way, and GPT-2 drops the
    # arguments that separate documents.
    if "query_length" not in inspect.signature(DynamicLayer.get_mask_sizes).parameters:
        raise ImportError(
            "convert_attention: expected transformers 5.6 or newer, got "
            f"{transformers.__version__}; pip install 'longctx-layers[hf]'"
        )


def _layer_indices(layers: Sequence[int] | None, count: int) -> list[int]:
    """Check `layers`, and return them as sorted indices from 0 on."""
    if layers is None:
        return list(range(count))
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers: expected a list of layer indices, got {layers!r}; pass e.g. [0]")
    if wrong := [i for i in layers if isinstance(i, bool) or not hasattr(i, "__index__")]:
        raise TypeError(f"layers: expected integers, got {wrong}; pass indices, e.g. [0, -1]")
    indices = sorted({i % count for i in map(operator.index, layers) if -count <= i < count})
    if len(indices) < len(layers) or not indices:
        raise ValueError(
            f"layers: expected different indices in [-{count}, {count}), got {list(layers)}; the "
            f"model has {count} layers"
        )
    return indices


def _check_options(block_type: str, options: dict[str, Any]) -> dict[str, Any]:
    """Check the options of a conversion, and return them with the default of `fuse`."""
    if fixed := [name for name in options if name in FROM_MODEL]:
        raise ValueError(
            f"convert_attention: {fixed} are taken from the pretrained model and cannot be set "
            "here; leave them out"
        )
    valid = [name for name in layer_options(block_type) if name not in FROM_MODEL]
    if unknown := [name for name in options if name not in valid]:
        raise ValueError(
            f"convert_attention: unknown options {unknown} of {block_type!r}; valid options are "
            f"{valid}{closest(unknown[0], valid)}"
        )
    if "window_size" in options:
        expect_positive("window_size", options["window_size"])
    return {"fuse": "residual", **options} if "fuse" in valid else options


def _with_seed(block_type: str, options: dict[str, Any], index: int) -> dict[str, Any]:
    """Give each layer its own seed, so that no two layers draw the same random keys."""
    return {"seed": index, **options} if "seed" in layer_options(block_type) else options
