"""Converted models compute the same as the original with a window, and work with transformers."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs the extra `hf`")
from support.pretrained_models import FAMILIES as PRETRAINED
from support.pretrained_models import WIDE, exact, pretrained, with_window
from transformers import AutoModelForCausalLM, DynamicCache, Phi3Config

from longctx_layers.convert import ConvertedAttention, convert_attention, load_converted
from longctx_layers.convert.families import FAMILIES, Family, Projections
from longctx_layers.hf import LongCtxCache
from longctx_layers.testing import MemoryMeter, assert_within_budget, parameter_dtypes, rates

WINDOW = 12
FAMILY = pytest.mark.parametrize("family", PRETRAINED)
LAYERS = pytest.mark.parametrize("layers", [None, [0, -1]], ids=["all", "two"])
OPTIONS = {"window_size": WINDOW, "ssm_state_dim": 4}


def ids_of(batch, length):
    return torch.randint(5, 61, (batch, length), generator=torch.Generator().manual_seed(length))


def converted(model, block_type="dpassm", **options):
    """Convert a copy of a model."""
    return convert_attention(deepcopy(model), block_type, **{**OPTIONS, **options})


def awake(model):
    """Give the state-space path a nonzero scale, as training does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm_s.weight"):
                parameter.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    return model


def left_padded(ids, pads=5):
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    return mask


def assert_same(actual, reference, oracle, mask=None):
    real = slice(None) if mask is None else mask.bool()
    assert_within_budget(actual[real], reference[real], oracle[real])


# ---- Equality with the original


@FAMILY
@LAYERS
@torch.no_grad()
def test_equals_the_original_within_the_window(family, layers):
    original = pretrained(family)
    model, oracle = converted(original, layers=layers), exact(original)
    ids = ids_of(3, WINDOW)
    assert_same(model(ids).logits, original(ids).logits, oracle(ids).logits)
    mask = left_padded(ids)
    logits = [m(ids, attention_mask=mask).logits for m in (model, original, oracle)]
    assert_same(*logits, mask)


@FAMILY
@torch.no_grad()
def test_equals_the_original_in_bfloat16(family):
    original, ids = pretrained(family).bfloat16(), ids_of(3, WINDOW)
    model = converted(original)
    assert parameter_dtypes(model) == ({torch.float32}, {torch.bfloat16})
    assert_same(*[m(ids).logits for m in (model, original, exact(original))])


@FAMILY
@LAYERS
@torch.no_grad()
def test_equals_the_original_with_a_window_beyond_it(family, layers):
    original, ids = pretrained(family), ids_of(2, 50)
    model = converted(original, layers=layers)
    windowed = [with_window(m, WINDOW, layers) for m in (original, exact(original))]
    assert_same(model(ids).logits, *[m(ids).logits for m in windowed])
    assert (model(ids).logits - original(ids).logits).abs().max() > 1e-3, "the window is no limit"


@torch.no_grad()
def test_linear_scaling_of_the_rotary_embedding():
    rope = {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}
    original, ids = pretrained("llama", rope_parameters=rope), ids_of(2, WINDOW)
    model = converted(original)
    assert_same(*[m(ids).logits for m in (model, original, exact(original))])
    plain = converted(pretrained("llama"))
    assert (plain(ids).logits - model(ids).logits).abs().max() > 1e-3, (
        "the scaling is no difference"
    )


@pytest.mark.parametrize("block_type", ["window", "vanilla", "baseline_longformer"])
@torch.no_grad()
def test_other_blocks_equal_the_original_too(block_type):
    original, options = pretrained("qwen3"), {}
    if block_type != "vanilla":
        options = {"window_size": WINDOW}
    model = convert_attention(deepcopy(original), block_type, **options)
    ids = ids_of(2, 40 if block_type == "vanilla" else WINDOW)
    assert_same(*[m(ids).logits for m in (model, original, exact(original))])
    if block_type == "baseline_longformer":
        layer = model.model.layers[0].self_attn.layer
        assert_close(layer.global_k_proj.weight, layer.k_proj.weight)
        assert layer.global_k_proj.weight is not layer.k_proj.weight


@FAMILY
@LAYERS
@torch.no_grad()
def test_attention_implementations(family, layers):
    """Unconverted layers may use any attention implementation."""
    original, ids = pretrained(family), ids_of(3, WINDOW)
    original.set_attn_implementation("eager")
    mask, model = left_padded(ids), converted(original, layers=layers)
    logits = [m(ids, attention_mask=mask).logits for m in (model, original, exact(original))]
    assert_same(*logits, mask)


@FAMILY
def test_begins_with_the_original_gradients_and_learns(family):
    original, ids = exact(pretrained(family)), ids_of(2, WINDOW)
    model = converted(original)
    for m in (model, original):
        m(ids, labels=ids).loss.backward()
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert_close(*[getattr(m, part)().weight.grad for m in (model, original)])
    fresh = {n: p for n, p in model.named_parameters() if "state_space" in n or "norm_s" in n}
    assert {n for n, p in fresh.items() if p.grad.any()} == {n for n in fresh if "norm_s" in n}
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model(ids, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if not p.grad.any()] == []


def test_projections_stay_the_same_modules():
    model = pretrained("qwen2")
    before = {n: p for n, p in model.named_parameters() if "_proj." in n}
    convert_attention(model, **OPTIONS)
    after = {n.replace("self_attn.layer", "self_attn"): p for n, p in model.named_parameters()}
    assert all(after[name] is parameter for name, parameter in before.items())
    assert model.model.layers[0].self_attn.layer.dropout == 0
    assert not model.model.layers[0].self_attn.layer.training


# ---- Caches and generation


@FAMILY
@LAYERS
@torch.no_grad()
def test_pieces_with_a_cache_equal_one_call(family, layers):
    model, ids = awake(converted(pretrained(family), layers=layers)), ids_of(2, 40)
    mask, pieces = left_padded(ids, 20), []
    cache, begin = DynamicCache(config=model.config), 0
    for size in (17, 1, 1, 9, 12):
        end = begin + size
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
        out = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        pieces.append(out.logits)
        begin = end
    assert cache.get_seq_length() == 40
    whole = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    logits = [m(ids, **whole, use_cache=False).logits for m in (model, exact(model))]
    assert_same(torch.cat(pieces, 1), *logits, mask)


def generations(model, ids, mask=None, new=6, **options):
    options = {"max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None, **options}
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=mask, **options)


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 7, "num_return_sequences": 2},
}


@FAMILY
@pytest.mark.parametrize("way", WAYS)
def test_generates_what_the_original_does_within_the_window(family, way):
    original, ids = pretrained(family), ids_of(2, 6)
    mask = left_padded(ids, 2)
    model = converted(original, layers=[1] if way == "beams" else None)
    expected = generations(original, ids, mask, **WAYS[way])
    assert_close(generations(model, ids, mask, **WAYS[way]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["greedy", "beams"])
@LAYERS
def test_generates_the_same_with_and_without_a_cache(way, layers):
    model, ids = awake(converted(pretrained("llama"), layers=layers)), ids_of(2, 18)
    mask = left_padded(ids, 3)
    cached, plain = (
        generations(model, ids, mask, new=10, use_cache=use, **WAYS[way]) for use in (True, False)
    )
    assert_close(cached, plain, rtol=0, atol=0)
    if way == "greedy":
        alone = generations(model, ids[:1, 3:], new=10, **WAYS[way])
        assert_close(cached[:1, 3:], alone, rtol=0, atol=0)


@torch.no_grad()
def test_cache_has_a_constant_size():
    model = converted(pretrained("qwen3"))
    sizes = []
    for length in (20, 60):
        cache = model(ids_of(1, length), use_cache=True).past_key_values
        sizes.append(sum(t.nbytes for layer in cache.layers for t in layer.state))
    assert sizes[0] == sizes[1] > 0


@torch.no_grad()
def test_cache_rows():
    """Rows are repeated, selected and reset, as in contrastive search."""
    model, ids = awake(converted(pretrained("llama"))), ids_of(2, 20)
    cache = model(ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([False, True, True, False]))
    new = ids_of(2, 3)
    actual = model(new, past_key_values=cache).logits
    whole = [m(torch.cat([ids, new], 1)).logits[:, -3:] for m in (model, exact(model))]
    assert_same(actual, *whole)
    cache.reset()
    assert cache.get_seq_length() == 0
    logits = [m(new).logits for m in (model, exact(model))]
    assert_same(model(new, past_key_values=cache).logits, *logits)


@torch.no_grad()
def test_no_tensor_grows_with_the_square_of_the_length():
    model, ids = converted(pretrained("llama")), ids_of(1, 2048)
    for mask in (None, left_padded(ids)):
        with MemoryMeter() as meter:
            model(ids, attention_mask=mask)
        assert meter.largest < 2048 * 2048 / 8


# ---- Training


@torch.no_grad()
def test_packed_rows_are_separate():
    model, parts = awake(converted(pretrained("mistral"))), [ids_of(1, n) for n in (7, 20, 5)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    packed = model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
    alone, oracle = (torch.cat([m(p).logits for p in parts], 1) for m in (model, exact(model)))
    assert_same(packed, alone, oracle)


@LAYERS
def test_gradient_checkpointing(layers):
    model, ids = awake(converted(pretrained("llama"), layers=layers)).train(), ids_of(2, 30)
    mask = left_padded(ids)
    expected = torch.autograd.grad(
        model(ids, attention_mask=mask, labels=ids).loss, list(model.parameters())
    )
    model.gradient_checkpointing_enable()
    model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    assert_close([p.grad for p in model.parameters()], list(expected))


@pytest.mark.parametrize("first", ["convert", "adapt"])
def test_lora(first):
    """Adapters added to a converted model, and adapters that a conversion keeps."""
    peft = pytest.importorskip("peft", reason="needs the package peft")
    model, ids = pretrained("llama"), ids_of(2, 30)
    lora = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    if first == "convert":
        convert_attention(model, **OPTIONS)
        before = model(ids).logits
        lora["modules_to_save"] = ["layer.state_space", "layer.gate_proj", "layer.norm_s"]
        model = peft.get_peft_model(model, peft.LoraConfig(**lora))
        with model.disable_adapter():
            assert_close(model(ids).logits, before, rtol=0, atol=0)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(**lora)).eval()
        short = ids[:, :WINDOW]
        before = model(short).logits
        convert_attention(model, **OPTIONS)
        assert_close(model(short).logits, before)
    assert (model(ids).logits - pretrained("llama")(ids).logits).abs().max() > 1e-3
    losses, trained = [], [p for p in model.parameters() if p.requires_grad]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("state_space" in name for name in names)
    assert not any("mlp" in name or "embed" in name for name in names)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        whole = model(ids).logits
        head = model(ids[:, :20], use_cache=True)
        tail = model(ids[:, 20:], past_key_values=head.past_key_values).logits
        assert_close(torch.cat([head.logits, tail], 1), whole, rtol=1e-4, atol=1e-4)
        tokens = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        assert_close(tokens[:, 30], whole[:, -1].argmax(-1), rtol=0, atol=0)


@pytest.mark.slow
def test_compiles():
    torch._dynamo.reset()
    model, ids = converted(pretrained("llama")), ids_of(2, 30)
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)


# ---- Saving and loading


@FAMILY
@torch.no_grad()
def test_saved_and_loaded(family, tmp_path):
    model, ids = awake(converted(pretrained(family))), ids_of(2, 30)
    model.save_pretrained(tmp_path)
    loaded = load_converted(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.longctx_attention == model.config.longctx_attention
    assert loaded.config.architectures == [type(model).__name__]
    assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    half = load_converted(tmp_path, dtype=torch.bfloat16)
    assert parameter_dtypes(half) == ({torch.float32}, {torch.bfloat16})
    exact_rates = rates(loaded).values()
    assert all(torch.equal(*pair) for pair in zip(rates(half).values(), exact_rates, strict=True))
    # And again, from the loaded model.
    loaded.save_pretrained(tmp_path / "again")
    again = load_converted(tmp_path / "again")
    assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


@torch.no_grad()
def test_two_conversions_of_one_model(tmp_path):
    model = converted(pretrained("llama"), layers=[0])
    convert_attention(model, "blade", layers=[2], chunk_size=4, state_dim=4)
    model.save_pretrained(tmp_path)
    loaded, ids = load_converted(tmp_path), ids_of(2, 30)
    assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    for m in (model, loaded):
        kinds = [isinstance(b.self_attn, ConvertedAttention) for b in m.model.layers]
        assert kinds == [True, False, True]
    convert_attention(model, layers=[1], **OPTIONS)
    assert generations(model, ids[:, :5], do_sample=False).shape == (2, 11)


def test_copies_are_converted_models_too():
    model, ids = awake(converted(pretrained("gpt2"))), ids_of(2, 30)
    mask = left_padded(ids)
    logits = [m(ids, attention_mask=mask).logits for m in (model, deepcopy(model))]
    assert_close(*logits, rtol=0, atol=0)


def test_loading_with_information_and_of_foreign_classes(tmp_path):
    model = converted(pretrained("llama"))
    model.save_pretrained(tmp_path)
    loaded, info = load_converted(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not info["missing_keys"]
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MyLlama"))
    with pytest.raises(ValueError, match="expected a model class of transformers, got 'MyLlama'"):
        load_converted(tmp_path)
    model.save_pretrained(tmp_path / "within")
    ids = ids_of(1, 9)
    logits = load_converted(tmp_path, subfolder="within")(ids).logits
    assert_close(logits, model(ids).logits, rtol=0, atol=0)


@LAYERS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens_q", "seq_idx", "segment_ids"])
@torch.no_grad()
def test_documents_are_separate_however_they_are_marked(given, family, layers):
    """Also with the cache that transformers creates by default, and in unconverted layers."""
    original, ids = pretrained(family), ids_of(1, 12)
    model = converted(original, layers=layers)
    told = {
        "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None],
        "cu_seq_lens_q": torch.tensor([0, 5, 12], dtype=torch.int32),
        "seq_idx": torch.tensor([0] * 5 + [1] * 7)[None],
        "segment_ids": torch.tensor([3] * 5 + [1] * 7)[None],
    }
    parts = [ids[:, :5], ids[:, 5:]]
    apart = [torch.cat([m(p).logits for p in parts], 1) for m in (original, exact(original))]
    call = {given: told[given]}
    assert_same(model(ids, **call).logits, *apart)
    if given == "position_ids":
        return  # with a mask or a cache, positions do not separate documents, as in transformers
    for more in ({"attention_mask": torch.ones_like(ids)}, {"past_key_values": DynamicCache()}):
        if layers is None:
            assert_same(model(ids, **call, **more).logits, *apart)
        else:
            with pytest.raises(ValueError, match=f"{given}: expected neither attention_mask nor"):
                model(ids, **call, **more)


@FAMILY
@torch.no_grad()
def test_masks_wider_than_the_call_are_truncated(family):
    model, ids = converted(pretrained(family)), ids_of(2, 20)
    wide = F.pad(left_padded(ids), (0, 4))
    whole = model(ids, attention_mask=wide, use_cache=False).logits
    assert_close(whole, model(ids, attention_mask=wide[:, :20], use_cache=False).logits)
    head = model(ids[:, :15], attention_mask=wide[:, :15], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="or the 20 of the sequence so far, got 18"):
        model(ids[:, 15:], attention_mask=wide[:, :18], past_key_values=head)


def test_loading_a_folder_without_a_record(tmp_path):
    pretrained("llama").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match="expected the config of a converted model, with the field 'longctx_attention'",
    ):
        load_converted(tmp_path)


# ---- Errors

REFUSED = {
    "unknown option": (
        {},
        {"windowsize": 4},
        r"unknown options \['windowsize'\] of 'dpassm'.* did you mean 'window_size'",
    ),
    "what the model decides": (
        {},
        {"rope_base": 1e4},
        r"\[\'rope_base\'\] are taken from the pretrained model and cannot be set",
    ),
    "unknown layer": ({}, {"block_type": "mamba"}, "unknown layer 'mamba' \\(the layers are"),
    "index": ({}, {"layers": [0, 3]}, r"indices in \[-3, 3\)"),
    "twice the same": ({}, {"layers": [0, -3]}, "different indices"),
    "no list": ({}, {"layers": 1}, "expected a list of layer indices"),
    "no integers": ({}, {"layers": [True, 0.5]}, r"layers: expected integers, got \[True, 0.5\]"),
    "scaled rotary embedding": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
        {},
        "expected a rotary embedding of type 'default', 'linear' or 'llama3', got 'yarn'",
    ),
    "dropout": ({"attention_dropout": 0.1}, {}, "pass dropout="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_changed(case):
    config, options, message = REFUSED[case]
    model = pretrained("llama", **config)
    before = repr(model)
    with pytest.raises((ValueError, TypeError), match=message):
        convert_attention(model, **options)
    assert repr(model) == before
    assert not hasattr(model.config, "longctx_attention")


def test_adapters_of_gpt2_are_not_lost():
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(pretrained("gpt2"), config)
    with pytest.raises(ValueError, match="c_attn: expected the model's own Conv1D.*merge adapters"):
        convert_attention(adapted, **OPTIONS)
    assert convert_attention(adapted.merge_and_unload(), **OPTIONS) is not None


def test_projections_that_are_taken_apart_have_no_hooks_to_lose():
    hooks = [
        lambda module: module.register_forward_hook(lambda m, x, y: 2 * y),
        lambda module: parametrize.register_parametrization(module, "weight", nn.Softplus()),
    ]
    for hook in hooks:
        model = pretrained("gpt2")
        hook(model.transformer.h[1].attn.c_proj)
        with pytest.raises(ValueError, match="c_proj: expected the model's own Conv1D, got a "):
            convert_attention(model, "dpassm")


def test_refused_models():
    with pytest.raises(ValueError, match="expected a model with exactly one decoder of"):
        convert_attention(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cross-attention"):
        convert_attention(pretrained("gpt2", add_cross_attention=True))
    with pytest.raises(ValueError, match="at most 10, the sliding window"):
        convert_attention(pretrained("mistral", sliding_window=10), window_size=11)
    with pytest.raises(ValueError, match=r"\[0\], which are converted already"):
        convert_attention(converted(pretrained("llama"), layers=[0]))
    assert convert_attention(pretrained("llama", attention_dropout=0.1), dropout=0.1) is not None


def test_refused_calls():
    original, ids = pretrained("llama"), ids_of(1, 8)
    filled = original(ids, use_cache=True).past_key_values
    model = converted(original)
    with pytest.raises(ValueError, match="tokens from before its conversion"):
        model(ids, past_key_values=filled)
    with pytest.raises(ValueError, match=r"attention_mask: expected \[B, length\]"):
        model(ids, attention_mask=torch.ones(1, 1, 8, 8))
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(ids, output_attentions=True)
    with pytest.raises(
        (ValueError, TypeError),
        match="do not set cache_implementation",
    ):
        generations(model, ids, cache_implementation="static")
    with pytest.raises(TypeError, match="expected a Cache of transformers"):
        model.model.layers[0].self_attn(torch.zeros(1, 1, 32), past_key_values=())
    with pytest.raises(TypeError, match="without an entry for layer 0"):
        model(ids, past_key_values=LongCtxCache())
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(0)
    with pytest.raises(ValueError, match="state cannot be rewound"):
        cache.crop(-1)
    again = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected an empty cache, got one with 8"):
        model(ids, past_key_values=again, cu_seq_lens_q=torch.tensor([0, 8]))
    with pytest.raises(RuntimeError, match="new cache for each model"):
        original(ids, past_key_values=cache)


def test_sliding_layers_of_the_original_are_kept_within_theirs():
    """Qwen's hybrid models have windows in some layers and full attention in the others."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    options = {"use_sliding_window": True, "sliding_window": 7, "layer_types": kinds}
    original, ids = pretrained("qwen2", **options), ids_of(2, 30)
    with pytest.raises(ValueError, match="model's layer 0"):
        converted(original)
    model = converted(original, layers=[0, 2], window_size=7)
    with torch.no_grad():
        assert_same(*[m(ids).logits for m in (model, original, exact(original))])
    expected = generations(original, ids, new=5, do_sample=False)
    assert_close(generations(model, ids, new=5, do_sample=False), expected, rtol=0, atol=0)


@torch.no_grad()
def test_a_family_with_fused_projections_is_one_entry(monkeypatch):
    def split(attention):
        d, groups = attention.head_dim, attention.num_key_value_groups
        heads = groups * attention.num_key_value_heads
        sizes = [d * heads, d * attention.num_key_value_heads, d * attention.num_key_value_heads]
        weights = attention.qkv_proj.weight.split(sizes)
        parts = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
        for part, weight in zip(parts, weights, strict=True):
            part.weight.copy_(weight)
        return Projections(*parts, attention.o_proj)

    monkeypatch.setitem(FAMILIES, "Phi3Model", Family(split=split))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = AutoModelForCausalLM.from_config(Phi3Config(**WIDE, pad_token_id=0)).eval()
    ids = ids_of(3, WINDOW)
    model = converted(original)
    assert isinstance(model.model.layers[0].self_attn, ConvertedAttention)
    assert_same(*[m(ids).logits for m in (model, original, exact(original))])


def test_a_decoder_alone_is_converted_too():
    model, ids = pretrained("llama").model, ids_of(2, 9)
    mask = left_padded(ids)
    expected = model(ids, attention_mask=mask).last_hidden_state
    convert_attention(model, **OPTIONS)
    actual = model(ids, mask).last_hidden_state  # the mask as a positional argument
    assert_close(actual[mask.bool()], expected[mask.bool()])


def test_conversion_on_the_meta_device():
    config = pretrained("gpt2").config
    with torch.device("meta"):
        model = convert_attention(AutoModelForCausalLM.from_config(config), **OPTIONS)
    assert {p.device.type for p in model.parameters()} == {"meta"}
