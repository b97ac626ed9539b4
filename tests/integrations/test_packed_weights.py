"""transformers models whose linear layers torch has packed for int8 products."""

from __future__ import annotations

import pytest
import torch
from support.hf_models import every_pattern, hf_model
from support.pretrained_models import pretrained
from torch import nn

from longctx_layers.convert import convert_attention
from longctx_layers.transformers_calls.arguments import CACHE_NAME

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning"),
]


def packed(model):
    return torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)


def ids_of(vocab_size):
    return torch.randint(3, vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))


@every_pattern
@torch.no_grad()
def test_models(pattern):
    """Logits are close to those of the float32 model, in one call and step by step."""
    model = hf_model(*pattern, dtype=torch.float32)
    quantized, ids = packed(model), ids_of(13)
    expected = model(ids).logits
    first = quantized(ids[:, :12], use_cache=True)
    second = quantized(ids[:, 12:], past_key_values=first[CACHE_NAME])
    for found in (quantized(ids).logits, torch.cat([first.logits, second.logits], 1)):
        assert 0 < (found - expected).norm() < 0.25 * expected.norm()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert quantized.generate(ids, **options).shape == (2, 23)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_conversion_of_packed_models(family):
    """Converting preserves the function, both before and after packing."""
    model, ids = packed(pretrained(family)), ids_of(61)
    expected = model(ids).logits
    after = packed(convert_attention(pretrained(family), "dpassm", window_size=32))
    before = convert_attention(model, "dpassm", window_size=32)
    for converted in (before, after):
        assert (converted(ids).logits - expected).norm() < 0.02 * expected.norm()
        projection = converted.model.layers[0].self_attn.layer.projection
        assert (projection.bias, projection.out_bias) == (True, family == "llama")
