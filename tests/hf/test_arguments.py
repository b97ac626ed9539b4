"""Every argument is used, known to be harmless, or an error; none is ignored silently."""

from typing import Any

import pytest
import torch
import transformers
from support.hf_models import hf_model
from support.pretrained_models import pretrained
from transformers import DynamicCache

from longctx_layers.convert import ConvertedAttention, convert_attention
from longctx_layers.hf import LongCtxCache

IDS = torch.randint(2, 13, (2, 9), generator=torch.Generator().manual_seed(0))
FAMILY = pytest.mark.parametrize("family", ["llama", "gpt2"])


def converted(family: str = "llama", **options: Any) -> Any:
    return convert_attention(pretrained(family), "window", window_size=4, **options).eval()


def models() -> list[Any]:
    """A model of this library, and converted decoders (heads may accept any name themselves)."""
    decoders = [converted("llama"), converted("gpt2"), converted(layers=[0])]
    return [hf_model("dpassm"), *(model.base_model for model in decoders)]


@pytest.mark.parametrize("index", range(4))
def test_unknown_names_are_refused_with_the_version(index: int) -> None:
    model = models()[index]
    for value in (torch.ones(2, 9), "all", True, 0):
        with pytest.raises(TypeError) as error:
            model(IDS, state_cache=value)
        assert "state_cache" in str(error.value)
    expected = model(IDS)[0]
    for value in (None, False):
        assert torch.equal(model(IDS, state_cache=value)[0], expected)


def test_the_message_names_argument_kind_and_version() -> None:
    for model in (hf_model("dpassm"), converted()):
        with pytest.raises(TypeError, match=r"unknown argument memory \(a Tensor \[3\]\)") as error:
            model(IDS, memory=torch.ones(3))
        assert f"transformers {transformers.__version__}" in str(error.value)


@pytest.mark.parametrize("index", range(4))
def test_harmless_names(index: int) -> None:
    """Extra arguments that tokenizers, collators and some versions of transformers pass."""
    model = models()[index]
    expected = model(IDS)[0]
    extra = {"cache_position": torch.arange(9)}
    if not hasattr(model.config, "n_embd"):  # GPT-2 embeds token types
        extra["token_type_ids"] = torch.zeros_like(IDS)
    assert torch.equal(model(IDS, **extra)[0], expected)


@FAMILY
@torch.no_grad()
def test_both_names_of_the_cache(family: str) -> None:
    """Layers accept the cache under both names, whichever the installed transformers uses."""
    layer = next(m for m in converted(family).modules() if isinstance(m, ConvertedAttention))
    x = torch.randn(2, 9, 32)
    expected, _ = layer(x)
    for name in ("past_key_values", "cache"):
        cache = DynamicCache()
        parts = [layer(piece, **{name: cache})[0] for piece in x.split(3, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected)
    with pytest.raises(ValueError, match="expected one cache, got two"):
        layer(x, past_key_values=DynamicCache(), cache=DynamicCache())


def test_two_caches_of_our_model() -> None:
    model, cache = hf_model("dpassm"), LongCtxCache()
    with pytest.raises(ValueError, match="expected one cache, got two"):
        model(IDS, past_key_values=LongCtxCache(), cache=cache)
    model(IDS, past_key_values=cache, cache=cache)
    assert cache.get_seq_length() == 9


def test_use_cache_without_a_cache_is_refused() -> None:
    """A future version might rename the cache again and drop both of these names."""
    layer = ConvertedAttention(converted().model.layers[0].self_attn.layer, 0)
    x = torch.randn(2, 3, 32)
    with pytest.raises(ValueError, match=r"expected a cache with use_cache=True, got none from"):
        layer(x, use_cache=True)
    with pytest.raises(TypeError, match="unknown argument memory"):
        layer(x, use_cache=True, memory=DynamicCache())
    layer(x, use_cache=False)


@FAMILY
def test_checkpointing_in_training_drops_the_cache_by_itself(family: str) -> None:
    model = converted(family).train()
    model.gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()


@FAMILY
@torch.no_grad()
def test_arguments_by_place(family: str) -> None:
    decoder = converted(family).base_model
    expected = decoder(IDS).last_hidden_state
    assert torch.equal(decoder(IDS, None).last_hidden_state, expected)
    with pytest.raises(TypeError, match="too many positional arguments"):
        decoder(IDS, *[None] * 30)


def test_arguments_of_the_loss_are_known() -> None:
    model = hf_model("dpassm")
    n = torch.tensor(32)
    loss = model(IDS, labels=IDS, num_items_in_batch=n).loss
    torch.testing.assert_close(loss, model(IDS, labels=IDS).loss / 2)

    def mine(logits: Any, labels: Any, vocab_size: int, weight: float = 1.0, **_: Any) -> Any:
        return weight * logits.sum()

    model.loss_function = mine
    out = model(IDS, labels=IDS, weight=2.0)
    torch.testing.assert_close(out.loss, 2 * out.logits.sum())
