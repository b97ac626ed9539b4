"""Training on tasks: what a step sees, and the gate: a small model learns to remember."""

import itertools

import pytest
import torch

from longctx_layers import LongContextLM, ModelConfig
from longctx_layers.evals import CopyRecall, Mqar, Passkey, evaluate
from longctx_layers.evals.program import task_training
from longctx_layers.evals.program.models import build
from longctx_layers.evals.program.task_training import Recipe, episodes, train
from longctx_layers.lm.loss import IGNORED_LABEL


def test_lengths_grow_and_then_mix():
    recipe = Recipe(steps=100, length=256, longest=8)
    lengths, steps = [], 0
    for length in episodes(recipe, 40, seed=0):
        lengths.append(length)
        steps += -(-length // 256)
        if steps > 1000:
            break
    ramp = lengths[:30]
    assert ramp[0] == 64
    assert ramp == sorted(ramp)
    assert max(ramp) <= 256
    mixed = lengths[30:]
    assert 128 <= min(mixed) < 160
    assert 1700 < max(mixed) <= 2048
    again = episodes(recipe, 40, seed=0)
    assert [next(again) for _ in range(50)] == lengths[:50]
    assert min(next(episodes(recipe, 90, seed=0)) for _ in range(3)) == 90


def test_long_sequences_pass_the_state_on_in_pieces(monkeypatch):
    """A step a piece, asking in every one; the first has no state, later ones have."""
    monkeypatch.setattr(task_training, "episodes", lambda *_: iter([64, 300]))
    model = build("dpassm", {"window_size": 8})
    seen, real = [], model.backbone

    def watched(ids, state=None, **options):
        seen.append((ids.shape[1], state is not None, torch.is_grad_enabled()))
        if state is not None:
            assert not any(t.requires_grad for layer in state for t in layer)
        return real(ids, state, **options)

    model.backbone = watched
    result = train(model, Passkey(distance=15), Recipe(steps=6, length=64, tokens=256))
    pieces = [(size, carried) for size, carried, _ in seen]
    assert pieces == [(64, False), (64, False), *[(64, True)] * 3, (44, True)]
    assert 0 <= result["accuracy"] <= 1
    assert not model.training


def test_of_a_long_sequence_a_few_pieces_are_trained_on(monkeypatch):
    monkeypatch.setattr(task_training, "episodes", lambda *_: itertools.repeat(64 * 40))
    model = build("dpassm", {"window_size": 8})
    modes, real = [], model.backbone

    def watched(ids, state=None, **options):
        modes.append(torch.is_grad_enabled())
        return real(ids, state, **options)

    model.backbone = watched
    recipe = Recipe(steps=6, length=64, tokens=512, most_pieces=3)
    train(model, Passkey(distance=15), recipe)
    assert modes.count(True) == 6
    assert modes.count(False) > 20


def test_every_piece_is_asked_about():
    task = task_training.for_training(Passkey(distance=15), pieces=10)
    batch = task.draw(20, 640, torch.Generator().manual_seed(0))
    asked = (batch.labels != IGNORED_LABEL).view(20, 10, 64).sum(-1)
    told = (batch.ids == 128).nonzero()[:, 1]
    for row, place in zip(asked, told.tolist(), strict=True):
        assert (row[place // 64 + 1 :] >= 1).all()
    for task in (Mqar(), CopyRecall()):  # these ask already, or would give the answer away
        assert task_training.for_training(task, 3) == task


def test_same_seed_same_weights():
    def trained(seed):
        model = build("blade", {"chunk_size": 8}, seed=0)
        train(model, [Passkey(distance=15), Mqar(pairs=2)], Recipe(3, 64, 128), seed=seed)
        return model.embedding.weight

    first, again, other = trained(1), trained(1), trained(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_too_short_a_length():
    with pytest.raises(ValueError, match="train_len: expected at least the 103 tokens"):
        train(build("window", {}), Passkey(distance=100), Recipe(steps=1, length=64))


EASY = {"n_symbols": 16}  # sooner learnt than 32


def learnt(block, steps, **options):
    """A model of width 32 and windows or chunks of 8, trained on passkey at 128 tokens."""
    config = ModelConfig(
        vocab_size=132, d_model=32, n_layers=2, n_heads=2, ffn_dim=96, pattern=(block,),
        block_kwargs=options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LongContextLM(config)
    recipe = Recipe(steps, 128, tokens=2048, learning_rate=1e-2, curriculum=0.5, longest=1)
    train(model, Passkey(distance=15, **EASY), recipe)
    return evaluate(model, Passkey(distance=64, **EASY), 128, n=128)


def test_gate_a_state_remembers_what_windows_cannot():
    score = learnt("dpassm", 220, window_size=8, ssm_state_dim=16)
    assert score.reach == 14
    assert score.accuracy >= 0.99
    assert score.accuracy_state_zeroed < 0.15


@pytest.mark.slow
def test_blade_remembers_too():
    score = learnt("blade", 600, chunk_size=8, state_dim=16)
    assert score.accuracy >= 0.99
    assert score.accuracy_state_zeroed < 0.15


def test_without_the_state_path_it_is_chance():
    score = learnt("dpassm", 60, window_size=8, ssm=None)
    assert score.low <= score.chance
    assert score.accuracy < 0.15
