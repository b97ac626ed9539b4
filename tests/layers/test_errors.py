"""Every wrong argument gets an error that says what was expected, what came, and the remedy."""

import pytest
import torch

from longctx_layers.layers import LAYERS, Projection, RopeScaling, build_layer, layer_options
from longctx_layers.testing import LAYER_CASES, small_layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((16, 3), {}, r"n_heads: expected a divisor of d_model = 16, got 3; change"),
        ((0, 1), {}, r"d_model: expected at least 1, got 0; pass"),
        ((16, 0), {}, r"n_heads: expected at least 1, got 0; pass"),
        (
            (16, 4),
            {"n_kv_heads": 3},
            r"n_kv_heads: expected a divisor of n_heads = 4, got 3; every",
        ),
        ((16, 4), {"n_kv_heads": 0}, r"n_kv_heads: expected at least 1, got 0; pass"),
        ((12, 4), {}, r"head_dim: expected an even number.*got 3; change.*rope_base=None"),
        ((16, 4), {"rope_base": -1.0}, r"rope_base: expected a number above 0 or None, got -1.0"),
        (
            (16, 4),
            {"rope_base": None, "projection": Projection(rope_scaling=RopeScaling(8.0))},
            r"rope_scaling: expected None without rotary embedding .*pass a rope_base",
        ),
        ((16, 4), {"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_shared_hyperparameters(name, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        build_layer(name, *sizes, **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0,), "factor: expected a number above 0, got 0.0"),
        ((8.0, -1), "original_length: expected a number above 0, got -1"),
        ((8.0, 64, 4.0, 4.0), "high_freq_factor: expected more than low_freq_factor = 4.0, got 4"),
    ],
)
def test_wrong_scaling_of_rotary_embedding(values, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(*values)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("window", {"window_size": 0}, ValueError, "window_size: expected at least 1, got 0; pass"),
        ("dpassm", {"window_size": 0}, ValueError, "window_size: expected at least 1, got 0; pass"),
        (
            "dpassm",
            {"window_size": 2.0},
            TypeError,
            "window_size: expected an integer, got 2.0; pass",
        ),
        ("dpassm", {"ssm_state_dim": 0}, ValueError, "ssm_state_dim: expected at least 1, got 0"),
        ("dpassm", {"ssm": "mamba"}, ValueError, r"ssm: expected one of .*selective.*got 'mamba'"),
        ("dpassm", {"fuse": "sum"}, ValueError, r"fuse: expected one of .*residual.*got 'sum'"),
        (
            "dpassm",
            {"n_global_tokens": -1},
            ValueError,
            "n_global_tokens: expected at least 0, got -1",
        ),
        ("blade", {"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0; pass"),
        ("blade", {"state_dim": 0}, ValueError, "state_dim: expected at least 1, got 0; pass"),
        ("blade", {"state_update": "rnn"}, ValueError, "state_update: expected one of .*got 'rnn'"),
        (
            "blade",
            {"n_memory_tokens": -1},
            ValueError,
            "n_memory_tokens: expected at least 0, got -1",
        ),
        (
            "blade",
            {"chunk_size": 4, "chunk_shift": 4},
            ValueError,
            "chunk_shift: expected less than chunk_size = 4, got 4; take",
        ),
        ("blade", {"chunk_shift": -1}, ValueError, "chunk_shift: expected at least 0, got -1"),
        ("baseline_longformer", {"window_size": 0}, ValueError, "window_size: expected at least 1"),
        ("baseline_bigbird", {"window_size": 0}, ValueError, "window_size: expected at least 1"),
        ("baseline_bigbird", {"n_random_tokens": -1}, ValueError, "n_random_tokens: .*0, got -1"),
        ("baseline_bigbird", {"seed": 1.5}, TypeError, "seed: expected an integer, got 1.5; pass"),
        ("vanilla", {"rope_base": True}, TypeError, "rope_base: expected a number, got True; pass"),
        ("vanilla", {"dropout": None}, TypeError, "dropout: expected a number, got None; pass"),
    ],
)
def test_wrong_hyperparameters(name, options, error, message):
    with pytest.raises(error, match=message):
        build_layer(name, 16, 4, **options)


@pytest.mark.parametrize("name", LAYERS)
def test_a_misspelt_option_lists_the_valid_ones(name):
    message = r"no options \['windowsize'\]"
    if "window_size" in layer_options(name):
        message += "; did you mean 'window_size'"
    with pytest.raises(ValueError, match=message) as raised:
        build_layer(name, 16, 4, windowsize=4)
    assert all(option in str(raised.value) for option in layer_options(name))


def test_an_unknown_layer_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown layer 'dpasm'; did you mean 'dpassm'") as raised:
        build_layer("dpasm", 16, 4)
    assert all(name in str(raised.value) for name in LAYERS)


@pytest.mark.parametrize("case", LAYER_CASES)
@pytest.mark.parametrize(
    ("x", "ids", "error", "message"),
    [
        (
            torch.randn(2, 3, 15),
            None,
            ValueError,
            r"x: expected \[B, T, d_model\] .*16.*got \[2, 3, 15\]",
        ),
        (
            torch.randn(3, 16),
            None,
            ValueError,
            r"x: expected \[B, T, d_model\] .*got \[3, 16\]; resh",
        ),
        (
            torch.randn(2, 3, 16).double(),
            None,
            TypeError,
            r"x: expected torch.float32, got torch.float64; convert it with .to",
        ),
        (
            torch.randn(2, 3, 16, device="meta"),
            None,
            ValueError,
            r"x: expected a tensor on cpu.*got one on meta; move .*\.to",
        ),
        (
            torch.randn(2, 3, 16),
            torch.zeros(2, 3),
            TypeError,
            r"segment_ids: expected integers, got torch.float32; number",
        ),
        (
            torch.randn(2, 3, 16),
            torch.zeros(2, 3, dtype=torch.bool),
            TypeError,
            r"segment_ids: expected integers, got torch.bool; number",
        ),
        (
            torch.randn(2, 3, 16),
            torch.zeros(2, 4, dtype=torch.int64),
            ValueError,
            r"segment_ids: expected \[B, T\] = \[2, 3\], got \[2, 4\]; pass one id",
        ),
        (
            torch.randn(2, 3, 16),
            torch.zeros(2, 3, dtype=torch.int64, device="meta"),
            ValueError,
            r"segment_ids: expected a tensor on cpu.*got one on meta; move",
        ),
    ],
)
def test_wrong_inputs(case, x, ids, error, message):
    layer = small_layer(case, dtype=torch.float32)
    with pytest.raises(error, match=rf"^{type(layer).__name__}: {message}"):
        layer(x, segment_ids=ids)


@pytest.mark.parametrize("case", LAYER_CASES)
def test_wrong_states(case):
    layer, x = small_layer(case), torch.randn(2, 3, 16, dtype=torch.float64)
    name, state = type(layer).__name__, layer.init_state(2)
    other = small_layer("dpassm" if name == "BLADE" else "blade").init_state(2)
    expected = rf"state: expected a {layer.state_type.__name__}, got a {type(other).__name__}; pass"
    with pytest.raises(TypeError, match=expected):
        layer(x, other)
    with pytest.raises(TypeError, match=r"state: expected a .*got a tuple; pass.*init_state"):
        layer(x, tuple(state))
    with pytest.raises(ValueError, match=rf"{name}: state\.k: .*size 2.* got \[3, .*; choose"):
        layer(x, layer.init_state(3))
    with pytest.raises(ValueError, match=r"state\.k: expected .*on cpu.*on meta; move.*state_to"):
        layer(x, layer.init_state(2, device="meta"))
    with pytest.raises(ValueError, match=r"state\.position: expected batch size 2, .* got \[3\]"):
        layer(x, state._replace(position=torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(TypeError, match=r"state\.segment: expected torch.int64, got torch.float32"):
        layer(x, state._replace(segment=torch.zeros(2)))


@pytest.mark.parametrize(
    ("case", "field", "other"),
    [
        ("window", "k", {"window_size": 6}),
        ("dpassm", "conv", {"ssm_state_dim": 4}),
        ("dpassm-diagonal", "h", {"ssm_state_dim": 4}),
        ("dpassm", "global_k", {"n_global_tokens": 1}),
        ("blade-mlp", "readable", {"state_dim": 4}),
        ("blade", "k", {"chunk_size": 6}),
    ],
)
def test_a_state_of_a_layer_with_other_options(case, field, other):
    layer, x = small_layer(case), torch.randn(2, 3, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"state\.{field}: expected .* got \["):
        layer(x, small_layer(case, **other).init_state(2))


@pytest.mark.parametrize(("case", "field"), [("dpassm", "h"), ("blade", "pending")])
def test_accumulators_keep_their_precision(case, field):
    layer = small_layer(case, dtype=torch.bfloat16)
    state = layer.init_state(2)
    low = state._replace(**{field: getattr(state, field).bfloat16()})
    with pytest.raises(TypeError, match=rf"state\.{field}: expected torch.float32, got torch.bf"):
        layer(torch.randn(2, 3, 16, dtype=torch.bfloat16), low)
