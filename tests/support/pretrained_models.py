"""Small random models of transformers, and exact versions of them to measure rounding by."""

import math
from copy import deepcopy

import torch
from torch import nn
from torch.testing import assert_close
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
    "llama3": lambda **options: LlamaConfig(
        **WIDE,
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e3,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        **options,
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

    def __init__(self, rope, dim):
        super().__init__()
        base = rope["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        self.frequency = torch.stack([_scaled(frequency, rope) for frequency in base])

    def forward(self, x, position_ids):
        angle = position_ids[..., None] * self.frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()


def _scaled(frequency, rope):
    """As the types of scaling are defined, one frequency at a time."""
    if rope["rope_type"] == "linear":
        return frequency / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        if turns < rope["low_freq_factor"]:
            return frequency / rope["factor"]
        if turns <= rope["high_freq_factor"]:
            span = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (turns - rope["low_freq_factor"]) / span
            return (1 - smooth) * frequency / rope["factor"] + smooth * frequency
    return frequency


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
                rope, dim = model.config.rope_parameters, 2 * len(child.inv_freq)
                setattr(module, name, _Rotary(rope, dim))
                # A bfloat16 model has rounded its own.
                own = child.inv_freq.double()
                assert_close(module.rotary_emb.frequency, own, rtol=5e-3, atol=0)
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
