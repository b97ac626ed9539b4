"""The examples in examples/integrations preserve the function of a model, or learn their task."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

FOLDER = Path(__file__).parents[2] / "examples/integrations"
EXACT = {"rtol": 1e-9, "atol": 1e-9}
RESIDUAL = {"ssm_state_dim": 4, "fuse": "residual"}


def example(name):
    return runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def encoder(**options):
    options = {"batch_first": True, "dropout": 0.0, **options}
    layer = nn.TransformerEncoderLayer(16, 4, 32, **options)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.3)
    return stack


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_encoder_stack_keeps_its_function(norm_first, bias):
    stack, x = encoder(norm_first=norm_first, bias=bias), torch.randn(2, 11, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(11)
    expected = stack(x, mask=mask, is_causal=True)
    changed = example("encoder_stack")["replace_attention"](
        stack, "dpassm", window_size=11, **RESIDUAL
    )
    assert_close(changed(x), expected, **EXACT)


def test_encoder_stack_leaves_pads_out():
    stack = example("encoder_stack")["replace_attention"](encoder(), "blade", chunk_size=4)
    x = torch.randn(2, 11, 16)
    pads = torch.zeros(2, 11, dtype=torch.bool)
    pads[0, 7:] = True
    y = stack(x, src_key_padding_mask=pads)
    assert_close(y[0, :7], stack(x[:1, :7])[0], **EXACT)
    assert_close(y[1], stack(x[1:])[0], **EXACT)


def test_encoder_stack_refuses_what_it_cannot_take_over():
    replace = example("encoder_stack")["replace_attention"]
    with pytest.raises(ValueError, match="batch_first=True"):
        replace(encoder(batch_first=False), "window")
    with pytest.raises(ValueError, match="without bias_kv"):
        example("encoder_stack")["layer_from"](
            nn.MultiheadAttention(16, 4, add_bias_kv=True), "window"
        )


@pytest.mark.parametrize("block", ["dpassm", "window"])
def test_nanogpt_generates_what_it_predicts(block):
    gpt = example("nanogpt")
    model = gpt["GPT"](gpt["GPTConfig"](13, 2, 4, 16, block=block, window_size=4))
    ids = torch.randint(0, 13, (2, 9))
    whole = gpt["generate"](model, ids, 12, temperature=0)
    logits, _, _ = model(whole[:, :-1])
    assert_close(whole[:, 9:], logits[:, 8:].argmax(-1), rtol=0, atol=0)
    _, loss, _ = model(whole[:, :-1], whole[:, 1:])
    expected = -logits.log_softmax(-1).gather(-1, whole[:, 1:, None]).mean()
    assert_close(loss, expected, **EXACT)


def test_nanogpt_generates_for_prompts_of_different_lengths():
    gpt = example("nanogpt")
    model = gpt["GPT"](gpt["GPTConfig"](13, 2, 4, 16, window_size=4))
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    for prompt, whole in zip(
        prompts, gpt["generate"](model, prompts, 7, temperature=0), strict=True
    ):
        alone = gpt["generate"](model, torch.tensor(prompt), 7, temperature=0)
        assert_close(whole, alone, rtol=0, atol=0)


def test_nanogpt_learns(capsys):
    torch.set_default_dtype(torch.float32)
    example("nanogpt")["main"]()
    assert "quick brown fox. the quick brown fox. the" in capsys.readouterr().out


@pytest.fixture
def x_transformers():
    reason = "needs the package x-transformers"
    return pytest.importorskip("x_transformers", reason=reason)


def decoder(x_transformers, **options):
    stack = x_transformers.Decoder(dim=16, depth=2, heads=4, attn_dim_head=6, **options)
    return x_transformers.TransformerWrapper(
        num_tokens=13, max_seq_len=64, attn_layers=stack
    ).eval()


def test_x_transformers_model_keeps_its_function(x_transformers):
    model, ids = decoder(x_transformers, attn_kv_heads=2), torch.randint(0, 13, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :6] = False
    expected = model(ids), model(ids, mask=mask)
    example("x_transformers_decoder")["replace_attention"](
        model, "dpassm", window_size=20, **RESIDUAL
    )
    # x-transformers computes the softmax in float32.
    assert_close(model(ids), expected[0], rtol=1e-6, atol=1e-6)
    assert_close(model(ids, mask=mask)[mask], expected[1][mask], rtol=1e-6, atol=1e-6)


def test_x_transformers_generation_with_a_cache(x_transformers):
    model = decoder(x_transformers)
    example("x_transformers_decoder")["replace_attention"](model, "dpassm", window_size=4)
    wrapper = x_transformers.AutoregressiveWrapper(model)
    ids = torch.randint(0, 13, (2, 10))
    cached, plain = (
        wrapper.generate(ids, 15, temperature=0.0, cache_kv=cache) for cache in (True, False)
    )
    assert_close(cached, plain, rtol=0, atol=0)
    cached, plain = (
        wrapper.beam_search(ids, 8, beams=3, cache_kv=cache) for cache in (True, False)
    )
    assert_close(cached, plain, rtol=0, atol=0)


def test_lightning_module_learns():
    pytest.importorskip("lightning", reason="needs the extra `train`")
    torch.set_default_dtype(torch.float32)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    module = example("lightning_module")
    model = module["main"](**quiet).eval()
    votes, labels = (torch.cat(parts, 1) for parts in zip(*module["Votes"](), strict=True))
    with torch.no_grad():
        states = [model(votes)[0], torch.cat([model(x)[0] for x in votes.split(8, 1)], 1)]
    whole, forgetful = (((y.argmax(-1) == labels)[:, 64:]).double().mean() for y in states)
    assert whole > 0.7  # chance level: 0.5
    assert forgetful < whole - 0.1, "the window alone will do: the state has not been used"


def test_encoder_decoder_decodes_what_it_predicts():
    model = example("encoder_decoder")["EncoderDecoder"](13, 16, window_size=3, ssm_state_dim=4)
    model.eval()
    source = torch.randint(1, 13, (3, 7))
    target = model.generate(source, begin=0, length=15)
    shifted = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1]], 1)
    logits, _ = model.decode(shifted, model.encode(source))
    assert_close(target, logits.argmax(-1), rtol=0, atol=0)
    # The encoder's output matters, except at padding.
    pads = torch.zeros(3, 9, dtype=torch.bool)
    pads[:, 7:] = True
    longer = torch.cat([source, torch.randint(1, 13, (3, 2))], 1)
    padded, _ = model.decode(shifted, model.encode(longer, pads), pads)
    assert_close(padded, logits, **EXACT)
    other, _ = model.decode(shifted, model.encode(source.flip(1)))
    assert (other - logits).abs().max() > 1e-3
