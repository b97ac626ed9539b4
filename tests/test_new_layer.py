"""A layer of one's own, registered with one line, is taken by all that takes the library's."""

import json

import pytest
import torch
from support.program import SMALL, fit, merged, scalars
from torch.testing import assert_close

from benchmarks.speed import targets
from longctx_layers import (
    DPASSM,
    LAYERS,
    CausalAttention,
    Layer,
    WindowAttention,
    build_layer,
    create_model,
    no_weight_decay,
    register_layer,
)
from longctx_layers.evals.synthetic import main as evaluate
from longctx_layers.layers import layer_options
from longctx_layers.reports.__main__ import main as report
from longctx_layers.reports.figures import SERIES, style_of
from longctx_layers.testing import (
    assert_causal,
    assert_packs,
    assert_streams,
    layer_cases,
    small_layer,
)
from longctx_layers.training.flops import forward_flops


@pytest.fixture(scope="module", autouse=True)
def ema():
    """The layer's class; its name is free again afterwards."""
    from support.ema_layer import EMA

    LAYERS.setdefault("ema", EMA)
    yield EMA
    del LAYERS["ema"]


@pytest.fixture
def x():
    return torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- The registry


def test_it_is_built_by_its_name(ema):
    layer = build_layer("ema", 16, 4)
    assert type(layer) is ema
    assert repr(layer).startswith("EMA(\n  d_model=16\n")
    assert layer_options("ema") == ["dropout", "device", "dtype"]
    assert layer_cases()["ema"] == ("ema", {})
    with pytest.raises(ValueError, match=r"no options \['droput'\]; did you mean 'dropout'"):
        build_layer("ema", 16, 4, droput=0.1)


@pytest.mark.parametrize("name", ["ema", "dpassm", "longformer"])
def test_a_name_is_given_once(ema, name):
    with pytest.raises(ValueError, match=f"'{name}' is the name of .* already; register under"):
        register_layer(name, ema)


@pytest.mark.parametrize("cls", [torch.nn.Linear, "EMA", lambda d_model, n_heads: None])
def test_only_layers_are_registered(cls):
    with pytest.raises(TypeError, match="mine: expected a subclass of longctx_layers.Layer"):
        register_layer("mine", cls)
    assert "mine" not in LAYERS


def test_options_that_a_class_passes_on_are_known():
    class Positionless(CausalAttention):
        def __init__(self, d_model, n_heads, **options):
            super().__init__(d_model, n_heads, rope_base=None, **options)

    register_layer("positionless", Positionless)
    try:
        assert layer_options("positionless") == layer_options("vanilla")
        model = create_model(64, "tiny", "positionless", dropout=0.1)
        assert {block.mixer.dropout for block in model.blocks} == {0.1}
    finally:
        del LAYERS["positionless"]


@pytest.mark.parametrize("alias", ["longformer", "bigbird"])
def test_short_names_mean_the_same_layer(alias):
    name = f"baseline_{alias}"
    assert alias not in LAYERS
    assert type(build_layer(alias, 16, 4)) is LAYERS[name]
    model = create_model(64, "tiny", alias, {alias: {"window_size": 4}})
    assert model.config.pattern == (name,)
    assert model.blocks[0].mixer.window_size == 4


def test_window_attention_is_a_class_of_its_own():
    layer = build_layer("window", 16, 4)
    assert type(layer) is WindowAttention
    assert repr(layer).startswith("WindowAttention(")
    assert layer.n_global_tokens == 0
    assert issubclass(LAYERS["baseline_longformer"], WindowAttention)


# ---- The promises of every layer, by the checks that the library's own layers pass


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [7, 0, 20, 13]])
@pytest.mark.parametrize("packed", [False, True])
def test_it_streams(x, pieces, packed):
    ids = torch.tensor([0, 0, 1, -1, 1, 1, 1, 2]).repeat_interleave(5).expand(2, -1)
    assert_streams(small_layer("ema"), x, pieces, ids if packed else None)


def test_it_is_causal_and_packs(x):
    layer = small_layer("ema")
    assert_causal(layer, x, 17)
    assert_packs(layer, x[:1], [3, 1, 30, 6])


def test_large_calls_are_split(x, monkeypatch):
    layer = small_layer("ema")
    whole = layer(x)
    lengths = []
    mix = layer.mix
    monkeypatch.setattr(layer, "mix", lambda x, *rest: lengths.append(x.shape[1]) or mix(x, *rest))
    monkeypatch.setattr("longctx_layers.layers.splitting.TOKENS_AT_ONCE", 8)
    assert_close(layer(x), whole)
    assert lengths == [8] * 10


def test_its_state_is_saved_without_a_list_of_types(ema, x, tmp_path):
    layer = small_layer("ema")
    y, state = layer(x[:, :9])
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert type(loaded) is ema.state_type
    assert_close(layer(x[:, 9:], loaded), layer(x[:, 9:], state), rtol=0, atol=0)
    assert layer.state_size(5) == sum(t[0].nbytes for t in state)


# ---- Models and programs


def test_a_model_learns_with_it():
    torch.manual_seed(0)
    model = create_model(64, "tiny", pattern=("ema", "dpassm"))
    assert isinstance(model.blocks[1].mixer, DPASSM)
    ids = torch.arange(64).repeat(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert "blocks.0.mixer.rate" in no_weight_decay(model)
    assert model.generate(ids[:, :5], 3).shape == (2, 8)
    alone = create_model(64, "tiny", "ema")
    matrices = sum(p.numel() for p in alone.parameters() if p.dim() == 2)
    assert forward_flops(alone, 10) == 2 * matrices + 4 * 3 * 128  # layers, operations, width


def test_the_programs_take_it(tmp_path, monkeypatch):
    """Training, an evaluation and a report on the checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("longctx_layers.reports.sections.speed.ROUNDS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = "--trainer.default_root_dir=logs"
    fit(*merged(*SMALL, "--model.block=ema", "--data.dataset_config=60", root))
    assert len(scalars(tmp_path / "logs")) == 2
    checkpoint = "logs/checkpoints/step=00000002.ckpt"
    common = ["--checkpoint_path", checkpoint, "--seq_len", "64"]
    (row,) = evaluate(["--task", "passkey", "--n", "2", *common, "--output_dir", "evaluated"])
    assert (row["block"], row["length"], row["reach"]) == ("ema", 64, None)
    quick = ["--max_len=64", "--documents=2", "--samples=1", "--new_tokens=2"]
    report([*common, *quick, "--output_dir", "reported", "--results", "evaluated"])
    page = (tmp_path / "reported/report.md").read_text()
    assert page.startswith("# Report on ema\n")
    assert "passkey" in page


def test_figures_and_tables_take_it(tmp_path):
    colour, mark, label = style_of("ema")
    assert label == "ema"
    assert (colour, mark) in SERIES
    assert (colour, mark) not in [cls.style for cls in LAYERS.values()]
    assert style_of("dpassm") == ("#0072B2", "o", "DPASSM")
    small = ["--d-model", "32", "--n-heads", "4", "--rounds", "2", "--seconds", "0", "--no-memory"]
    targets.main(["floor", *small, "--length", "16", "--layers", "ema", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "targets.json").read_text())["floor"]["rows"]
    assert [row["what"] for row in rows] == [
        "ema / its linears, forward",
        "ema / its linears, forward+backward",
    ]
    assert issubclass(LAYERS["ema"], Layer)
