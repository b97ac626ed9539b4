"""Parameter groups, optimizers, schedule, curricula, and that the loss weighs every token alike."""

import pytest
import torch
from support.program import SMALL, fit, merged, scalars
from torch.testing import assert_close

from longctx_layers import LAYERS, build_layer, create_model
from longctx_layers.testing import small_model
from longctx_layers.training import optimization
from longctx_layers.training.curriculum import WindowCurriculum, drawn_length, fold, stage


def groups(model):
    found = optimization.parameter_groups(
        model, learning_rate=1.0, gate_learning_rate=3.0, weight_decay=0.1
    )
    names = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: ({names[id(p)] for p in g["params"]}, g) for g in found}


@pytest.mark.parametrize("block", LAYERS)
def test_every_parameter_is_in_one_group(block):
    model = small_model(block)
    found = [name for names, _ in groups(model).values() for name in names]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())


def test_what_decays_and_what_does_not():
    found = groups(small_model("dpassm", "blade", tie_embeddings=False))
    first = "blocks.0.mixer."
    decays, quiet, gates = (found[name][0] for name in ("decay", "no_decay", "gates"))
    assert {f"{first}q_proj.weight", f"{first}state_space.conv", "embedding.weight"} <= decays
    assert {"blocks.0.ffn.gate_proj.weight", "head.weight"} <= decays
    assert {f"{first}state_space.{n}" for n in ("A_log", "dt_bias")} <= quiet
    assert {f"{first}state_space.skip", f"{first}norm_s.weight", "norm.weight"} <= quiet
    assert gates == {f"blocks.{i}.mixer.gate_proj.{n}" for i in (0, 1) for n in ("weight", "bias")}
    assert {name: (g["lr"], g["weight_decay"]) for name, (_, g) in found.items()} == {
        "decay": (1.0, 0.1),
        "no_decay": (1.0, 0.0),
        "gates": (3.0, 0.0),
    }


@pytest.mark.parametrize("name", [*optimization.OPTIMIZERS, "adamw"])
def test_every_optimizer_takes_a_step(name):
    model = small_model("dpassm", dtype=torch.float32)
    made = optimization.build_optimizer(
        name, [group for _, group in groups(model).values()], fused=True
    )
    before = model.embedding.weight.clone()
    ids = torch.arange(8)[None]
    model.loss(ids, ids).backward()
    made.step()
    assert not torch.equal(model.embedding.weight, before)
    if name in ("AdamW", "adamw"):
        assert isinstance(made, torch.optim.AdamW)
        assert all(g["fused"] and g["betas"] == (0.9, 0.95) for g in made.param_groups)


def test_warmup_and_cosine():
    def rate(step):
        return optimization.warmup_cosine(step, warmup=10, total=110, final=0.1)

    assert [rate(0), rate(4), rate(9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(10) == 1.0
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == rate(1000) == pytest.approx(0.1)
    assert all(rate(s + 1) <= rate(s) for s in range(10, 200))


def test_accumulated_batches_weigh_as_one(tmp_path, monkeypatch):
    """Documents end anywhere, so the number of labels differs from batch to batch."""
    monkeypatch.chdir(tmp_path)
    exact = merged(*SMALL, "--trainer.precision=64-true", "--data.dataset_config=100")
    fit(*merged(*exact, "--data.batch_size=4"), "--trainer.default_root_dir=one")
    twice = "--trainer.accumulate_grad_batches=2"
    fit(*exact, twice, "--trainer.default_root_dir=two")
    expected = scalars(tmp_path / "one")
    eps = torch.finfo(torch.float32).eps  # TensorBoard's
    assert scalars(tmp_path / "two") == pytest.approx(expected, rel=eps)


def test_checkpointing_and_clipping(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exact = merged(*SMALL, "--trainer.precision=64-true")
    fit(*exact, "--trainer.default_root_dir=plain")
    fit(*exact, "--trainer.default_root_dir=again", "--model.gradient_checkpointing=True")
    eps = torch.finfo(torch.float32).eps
    assert scalars(tmp_path / "again") == pytest.approx(scalars(tmp_path / "plain"), rel=eps)
    norms = []

    def keep(self, optimizer):
        norms.append(optimization.gradient_norm(self.model).item())

    from longctx_layers.training.module import LanguageModel

    monkeypatch.setattr(LanguageModel, "on_before_zero_grad", keep)
    for flag in ("--model.gradient_clip_val=0.01", "--trainer.gradient_clip_val=0.01"):
        norms.clear()
        fit(*exact, flag)
        assert norms[-1] == pytest.approx(0.01, rel=1e-4)


# ---- Curricula


def test_stage():
    schedule = {0: 8, 10: 16, 20: 4}
    assert [stage(schedule, s) for s in (0, 9, 10, 19, 20, 99)] == [8, 8, 16, 16, 4, 4]


def test_fold_keeps_every_token_in_its_order():
    batch = {"ids": torch.arange(24).view(2, 12)}
    assert fold(batch, 4)["ids"].tolist() == torch.arange(24).view(6, 4).tolist()


def test_drawn_lengths_are_a_function_of_the_step():
    lengths = [drawn_length([8, 16], 3, step) for step in range(200)]
    assert lengths == [drawn_length([8, 16], 3, step) for step in range(200)]
    assert 60 < lengths.count(8) < 140
    assert lengths != [drawn_length([8, 16], 4, step) for step in range(200)]


def test_windows_and_chunks_are_set():
    options = {"window_size": 16}
    model = create_model(257, "tiny", "dpassm", options)
    windows = WindowCurriculum(model, {0: 4, 5: 16})
    assert windows.set(0)
    assert not windows.set(4)
    assert {block.mixer.window_size for block in model.blocks} == {4}
    ids = torch.arange(30)[None]
    narrow = create_model(257, "tiny", "dpassm", {"window_size": 4})
    narrow.load_state_dict(model.state_dict())
    assert torch.equal(model(ids), narrow(ids))
    assert windows.set(5)
    assert {block.mixer.window_size for block in model.blocks} == {16}


def test_chunk_shifts_keep_their_proportion():
    model = create_model(257, "tiny", "blade", {"chunk_size": 16})
    WindowCurriculum(model, {0: 4, 5: 16}).set(0)
    assert [(b.mixer.chunk_size, b.mixer.chunk_shift) for b in model.blocks] == [(4, 0), (4, 2)] * 2


def test_large_calls_are_split_at_the_chunks_that_are_set(monkeypatch):
    """A part of a call must begin where one of the narrower chunks begins."""
    torch.manual_seed(0)
    options = {"chunk_size": 16, "chunk_shift": 8, "state_dim": 8}
    layer = build_layer("blade", 16, 2, **options)
    layer.set_reach(6)
    assert (layer.chunk_size, layer.chunk_shift) == (6, 3)
    x = torch.randn(1, 60, 16)
    whole = layer(x)
    monkeypatch.setattr("longctx_layers.layers.splitting.TOKENS_AT_ONCE", 16)
    assert_close(layer(x), whole)
    layer.set_reach(16)
    assert (layer.chunk_size, layer.chunk_shift) == (16, 8)


def test_layers_without_a_window_refuse_another():
    layer = build_layer("vanilla", 16, 2)
    assert layer.reach is None
    with pytest.raises(TypeError, match="CausalAttention has no window or chunk"):
        layer.set_reach(4)


def test_last_window_is_the_models_own():
    model = create_model(257, "tiny", "window", {"window_size": 16})
    with pytest.raises(ValueError, match="expected its last size to be the layers' own"):
        WindowCurriculum(model, {0: 4, 5: 8})


def test_lengths_change_in_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from longctx_layers import LongContextLM

    shapes, loss = [], LongContextLM.loss

    def watch(self, ids, *args, **kwargs):
        if self.training:
            shapes.append(tuple(ids.shape))
        return loss(self, ids, *args, **kwargs)

    monkeypatch.setattr(LongContextLM, "loss", watch)
    flags = merged(*SMALL, "--trainer.max_steps=3")
    fit(*flags, "--model.length_curriculum={0: 16, 2: 64}")
    assert shapes[-3:] == [(8, 16), (8, 16), (2, 64)]
    shapes.clear()
    fit(*flags, "--model.mixed_lengths=[16, 32, 64]")
    assert [t for _, t in shapes[-3:]] == [drawn_length([16, 32, 64], 0, s) for s in range(3)]


def test_state_is_carried_and_detached(tmp_path, monkeypatch):
    """Two pieces with the state between them give the loss of the whole, without its gradients."""
    monkeypatch.chdir(tmp_path)
    flags = merged(
        *SMALL, "--trainer.precision=64-true", "--model.learning_rate=0", "--data.carry_state=True",
        "--data.batch_size=1", "--data.validation_fraction=0",
    )  # fmt: skip
    pieces = fit(*merged(*flags, "--data.seq_len=64"), "--trainer.default_root_dir=pieces")
    fit(
        *merged(*flags, "--data.seq_len=128"),
        "--trainer.max_steps=1",
        "--trainer.default_root_dir=whole",
    )
    counts = 64  # both pieces lie in the first document, so they weigh alike
    a, b = (scalars(tmp_path / "pieces")[s] for s in (1, 2))
    assert counts == 64
    assert (a + b) / 2 == pytest.approx(scalars(tmp_path / "whole")[1], rel=1e-5)
    tensors = [x for layer in pieces.model.carried for x in layer]
    assert tensors
    assert not any(x.requires_grad for x in tensors)
