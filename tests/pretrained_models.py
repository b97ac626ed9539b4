"""Small random models of transformers, and exact versions of them to measure rounding by."""

from copy import deepcopy

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}

# What differs between the families, and within them: biases, head_dim, norms, bases, scaling.
FAMILIES = {
    "llama": lambda **options: LlamaConfig(**WIDE, **{"attention_bias": True, **options}),
    "mistral": lambda **options: MistralConfig(**WIDE, head_dim=6, **options),
    "qwen2": lambda **options: Qwen2Config(**WIDE, tie_word_embeddings=True, **options),
    "qwen3": lambda **options: Qwen3Config(
        **WIDE, head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **options
    ),
    "gpt2": lambda **options: GPT2Config(
        **SHAPE,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        **{"scale_attn_by_inverse_layer_idx": True, **options},
    ),
}


def pretrained(family, **options):
    """A random model in evaluation mode, with weights large enough that attention is no mean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](**options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class _Rotary(nn.Module):
    """Rotary tables in float64; transformers' own are of float32 in every model."""

    def __init__(self, base, dim):
        super().__init__()
        self.frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def forward(self, x, position_ids):
        angle = position_ids[..., None] * self.frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()


def exact(model):
    """The model in float64 throughout: its norms and rotary tables are of float32 otherwise."""
    model = deepcopy(model).double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, nn.RMSNorm):
                norm = nn.RMSNorm(len(child.weight), child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
            elif name == "rotary_emb":
                base = model.config.rope_parameters["rope_theta"]
                setattr(module, name, _Rotary(base, 2 * len(child.inv_freq)))
    return model


def with_window(model, size, layers=None):
    """A copy in which the attention of these layers gets a sliding window as its mask."""
    model = deepcopy(model)
    decoder = model.base_model
    blocks = decoder.h if hasattr(decoder, "h") else decoder.layers

    def narrow(module, args, kwargs):
        length = (args[0] if args else kwargs["hidden_states"]).shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        kwargs["attention_mask"] = ((distance >= 0) & (distance < size))[None, None]
        return args, kwargs

    for i in range(len(blocks)) if layers is None else layers:
        attention = blocks[i].attn if hasattr(blocks[i], "attn") else blocks[i].self_attn
        attention.register_forward_pre_hook(narrow, with_kwargs=True)
    return model
