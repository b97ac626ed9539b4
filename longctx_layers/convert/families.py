"""The model families that can be converted: where their attention is, and what is special about it.

A family whose attention has the four projections of Llama is one entry in `FAMILIES`. One with
fused or scaled projections is an entry with a function that splits them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from longctx_layers.layers import RopeScaling
from longctx_layers.layers.plain_modules import has_hooks


class Projections(NamedTuple):
    """The projections of an attention module, as linear layers under a layer's names for them."""

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any


class Rope(NamedTuple):
    """The rotary embedding of a model; a base of None means that it has none."""

    base: float | None
    scaling: RopeScaling | None


# ---- What the families do differently


def separate_projections(attention: Any) -> Projections:
    """The modules themselves, where an attention has the four linear layers of Llama."""
    return Projections(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)


def conv1d_projections(attention: Any) -> Projections:
    """New linear layers from GPT-2's `c_attn`, which holds q, k and v, and `c_proj`."""
    for name in ("c_attn", "c_proj"):
        module = getattr(attention, name)
        if type(module) is not Conv1D or has_hooks(module):
            got = type(module).__name__ + (" with hooks" if has_hooks(module) else "")
            raise ValueError(
                f"{name}: expected the model's own Conv1D, got a {got}, which would be lost when "
                "the weight is split; merge adapters first (merge_and_unload) and remove hooks, or "
                "add both after converting"
            )
    size = attention.c_attn.weight.shape[0]
    weights = attention.c_attn.weight.split(size, 1)
    biases = attention.c_attn.bias.split(size)
    # These layers divide scores by sqrt(head_dim): any other scale goes into the queries.
    scale = attention.scaling * math.sqrt(attention.head_dim)
    scales = (1.0 if math.isclose(scale, 1.0) else scale, 1.0, 1.0)
    q, k, v = map(_linear, weights, biases, scales)
    return Projections(q, k, v, _linear(attention.c_proj.weight, attention.c_proj.bias, 1.0))


def rope_of_config(config: Any) -> Rope:
    """The rotary embedding that a config describes in `rope_parameters`."""
    rope = config.rope_parameters
    return Rope(float(rope["rope_theta"]), _rope_scaling(rope))


def no_rope(config: Any) -> Rope:
    """No rotary embedding, as in GPT-2, which embeds positions before the first block."""
    return Rope(None, None)


def weights_dropout(attention: Any) -> tuple[float, float]:
    """Dropout of the attention weights only."""
    return attention.attention_dropout, 0.0


def gpt2_dropout(attention: Any) -> tuple[float, float]:
    """Dropout of the attention weights and of the output."""
    return attention.attn_dropout.p, attention.resid_dropout.p


@torch.no_grad()
def _linear(weight: Tensor, bias: Tensor, scale: float) -> nn.Linear:
    """A linear layer from a Conv1D's weight `[inputs, outputs]` and bias, times `scale`."""
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter((scale * weight.T).contiguous(), weight.requires_grad)
    linear.bias = nn.Parameter((scale * bias).clone(), bias.requires_grad)
    return linear


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            rope["factor"],
            rope["original_max_position_embeddings"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
        )
    raise ValueError(
        f"model: expected a rotary embedding of type 'default', 'linear' or 'llama3', got "
        f"{kind or rope!r}; convert the version of the model before its context was extended"
    )


# ---- The families


@dataclass(frozen=True)
class Family:
    """How to find and read the attention of one family of decoders.

    Attributes:
        layers: the decoder's attribute for its list of layers.
        attention: a layer's attribute for its attention module.
        split: returns the projections of an attention module. If the module divides its scores by
            something other than sqrt(head_dim), the difference must be in the queries.
        rope: returns the rotary embedding that a config describes.
        dropout: returns an attention module's dropout of the weights and of the output.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    split: Callable[[Any], Projections] = separate_projections
    rope: Callable[[Any], Rope] = rope_of_config
    dropout: Callable[[Any], tuple[float, float]] = weights_dropout


# By the class of the decoder; subclasses belong to the same family.
FAMILIES = {
    "LlamaModel": Family(),
    "MistralModel": Family(),
    "Qwen2Model": Family(),
    "Qwen3Model": Family(),
    "GPT2Model": Family("h", "attn", conv1d_projections, no_rope, gpt2_dropout),
}

# ---- Finding the attention of a model


class Site(NamedTuple):
    """Where a decoder holds the attention of one layer: `getattr(parent, name)`."""

    parent: nn.Module
    name: str
    layer_idx: int
    family: Family

    @property
    def attention(self) -> Any:
        """The attention module."""
        return getattr(self.parent, self.name)


def family_of(module: nn.Module) -> Family | None:
    """Return the family of a decoder; None if the module is not a supported decoder."""
    names = (cls.__name__ for cls in type(module).__mro__)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


def find_decoder(model: nn.Module) -> Any:
    """Return the decoder inside a transformers model.

    Raises:
        TypeError: if the model is not a module.
        ValueError: if it contains no supported decoder, or several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a transformers model, got a {type(model).__name__}; load one with "
            "AutoModelForCausalLM.from_pretrained"
        )
    decoders = [module for module in model.modules() if family_of(module)]
    if len(decoders) != 1:
        config = getattr(model, "config", None)
        raise ValueError(
            f"model: expected a model with exactly one decoder of {list(FAMILIES)}, got "
            f"{len(decoders)} in a {type(model).__name__} (model_type "
            f"{getattr(config, 'model_type', None)!r}); to put layers into other models by hand, "
            "see docs/integration.md"
        )
    return decoders[0]


def attention_sites(decoder: Any) -> list[Site]:
    """Return where the decoder holds the attention of each layer, in order."""
    family = family_of(decoder)
    assert family is not None, "find_decoder returns supported decoders only"
    layers = getattr(decoder, family.layers)
    return [Site(layer, family.attention, i, family) for i, layer in enumerate(layers)]
