"""The layers are good modules: autocast, checkpoint, copies, functional calls, dtypes, devices."""

from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from longctx_layers import detach_state
from longctx_layers.layers import LAYERS, build_layer
from longctx_layers.testing import (
    LAYER_CASES,
    assert_within_budget,
    parameter_dtypes,
    small_layer,
)

CASES = pytest.mark.parametrize("case", LAYER_CASES)


@pytest.fixture
def x():
    return torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))


@CASES
def test_autocast(case, x):
    """Recurrent parts stay float32, and streaming is as precise as bfloat16 allows."""
    layer = small_layer(case, dtype=torch.float32)
    x = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, final = layer(x)
        pieces, state = [], layer.init_state(2)
        for part in x.split([1, 7, 16, 0, 15, 1], 1):
            piece, state = layer(part, state)
            pieces.append(piece)
    streamed, exact = torch.cat(pieces, 1), layer(x)[0]
    assert y.dtype == streamed.dtype == torch.bfloat16
    assert_within_budget(streamed, y, exact)
    for name, field in layer.fields().items():
        if field.kind == "accumulator":
            assert getattr(final, name).dtype == getattr(state, name).dtype == torch.float32
    streamed.float().sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad.dtype == torch.float32
        assert torch.isfinite(tensor.grad).all()


@CASES
def test_backward_inside_autocast(case, x):
    """Not what torch advises, but it has to work: hand-written passes keep their precision."""
    layer = small_layer(case, dtype=torch.float32)
    gradients = []
    for inside in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x)[0].float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    eps = torch.finfo(torch.bfloat16).eps
    for outer, inner in zip(*gradients, strict=True):
        assert (inner - outer).abs().max() <= 8 * eps * outer.abs().max()


@CASES
def test_autocast_leaves_float64_alone(case, x):
    layer, x = small_layer(case), x.double()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer(x), expected)


@CASES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(case, use_reentrant, x):
    layer = small_layer(case, dtype=torch.float32)
    x = x.requires_grad_()
    state = detach_state(layer(x[:, :9])[1])
    expected = torch.autograd.grad(layer(x, state)[0].sum(), [x, *layer.parameters()])
    y, _ = checkpoint(layer, x, state, use_reentrant=use_reentrant)
    y.sum().backward()
    assert_close((x.grad, *(p.grad for p in layer.parameters())), expected)


@CASES
def test_copies_and_state_dicts(case, x):
    layer, other = (small_layer(case, dtype=torch.float32, seed=seed) for seed in (0, 1))
    expected = layer(x)
    assert (other(x)[0] != expected[0]).any()
    missing = other.load_state_dict(layer.state_dict())
    assert missing.missing_keys == missing.unexpected_keys == []
    assert_close(other(x), expected, rtol=0, atol=0)
    copy = deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert_close(copy(x), expected, rtol=0, atol=0)


@CASES
def test_functional_call(case, x):
    layer, other = (small_layer(case, dtype=torch.float32, seed=seed) for seed in (0, 1))
    result = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert_close(result, other(x), rtol=0, atol=0)


@CASES
def test_every_parameter_gets_a_gradient_from_one_token(case):
    """Zero rather than None where a short input leaves a parameter unused: DDP needs it."""
    layer = small_layer(case)
    layer(torch.randn(1, 1, 16, dtype=torch.float64))[0].sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None] == []


@CASES
def test_construction_on_the_meta_device(case):
    """Nothing is computed there; `to_empty` and `reset_parameters` make a layer of it."""
    name, options = LAYER_CASES[case]
    torch.manual_seed(3)
    plain = build_layer(name, 16, 4, **options)
    with torch.device("meta"):
        implicit = build_layer(name, 16, 4, **options)
    for layer in (implicit, build_layer(name, 16, 4, device="meta", **options)):
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        layer.to_empty(device="cpu")
        torch.manual_seed(3)
        layer.reset_parameters()
        first, expected = dict(layer.named_parameters()), dict(plain.named_parameters())
        assert first.keys() == expected.keys()
        for key, parameter in first.items():
            assert torch.isfinite(parameter).all()
            assert parameter.shape == expected[key].shape


@CASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_argument(case, dtype, x):
    name, options = LAYER_CASES[case]
    layer = build_layer(name, 16, 4, dtype=dtype, device="cpu", **options)
    assert parameter_dtypes(layer)[1] == {dtype}
    y, state = layer(x.to(dtype))
    assert y.dtype == dtype
    for field, before, after in zip(state._fields, layer.init_state(2), state, strict=True):
        assert before.dtype == after.dtype, field
    assert build_layer(name, 16, 4, **options).to(dtype)(x.to(dtype))[0].dtype == dtype


@CASES
def test_repr_shows_the_options(case):
    name, options = LAYER_CASES[case]
    shown = repr(build_layer(name, 16, 4, n_kv_heads=2, **options))
    assert "d_model=16, n_heads=4, n_kv_heads=2" in shown
    for option, value in options.items():
        assert f"{option}={value!r}" in shown


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_acts_in_training_only(name, x):
    layer = build_layer(name, 16, 4, dropout=0.5)
    assert_close(layer.eval()(x)[0], layer(x)[0], rtol=0, atol=0)
    layer.train()
    torch.manual_seed(0)
    first = layer(x)[0]
    assert (first != layer(x)[0]).any()
    assert first.eq(0).any()


@pytest.mark.parametrize("case", ["dpassm", "vanilla"])
def test_training_goes_on_from_what_inference_mode_has_kept(case):
    """Rotary tables are kept between calls; tensors of inference mode could not be saved."""
    layer, x = small_layer(case, rope_base=777.0), torch.randn(1, 37, 16, dtype=torch.float64)
    with torch.inference_mode():
        expected, _ = layer(x)
    y, _ = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected)
