"""The small training loop, against the same steps written out."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from longctx_layers.training.loop import ProgressBar, fit

STEPS = 12


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(STEPS, 16, 4)
    y = torch.randn(STEPS, 16, 2)
    return model, lambda step: 9 * (model(x[step]) - y[step]).square().mean()


def groups(model):
    return [
        {"params": [model[0].weight, model[2].weight], "lr": 2e-2, "weight_decay": 0.1},
        {"params": [model[0].bias, model[2].bias]},
    ]


def test_same_bits_as_the_steps_written_out():
    model, loss_of_step = problem()
    losses = fit(
        groups(model),
        loss_of_step,
        STEPS,
        learning_rate=1e-2,
        weight_decay=0.05,
        clipped=model.parameters(),
        max_norm=0.5,
        schedule=lambda step: 1 / (step + 1),
    )
    other, loss_of_step = problem()
    optimizer = torch.optim.AdamW(groups(other), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(STEPS):
        loss = loss_of_step(step)
        assert loss.item() == losses[step]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_default_schedule_rises_and_falls_to_a_tenth():
    model, loss_of_step = problem()
    weights = [model[0].bias.detach().clone()]

    def remember(step, loss):
        weights.append(model[0].bias.detach().clone())

    fit(model.parameters(), loss_of_step, STEPS, learning_rate=1e-3, progress=remember)
    moved = [(b - a).abs().max().item() for a, b in pairwise(weights)]
    # Each element moves by no more than about the learning rate in a step of Adam.
    assert moved[0] == pytest.approx(1e-3, rel=0.01)
    assert moved[-1] < 0.3e-3


def test_a_loss_that_is_not_finite_ends_it():
    model, loss_of_step = problem()
    with pytest.raises(ValueError, match="step 3: the loss is nan; try a smaller --learning_rate"):
        fit(
            model.parameters(),
            lambda step: loss_of_step(step) * (math.nan if step == 3 else 1),
            STEPS,
        )


def test_progress_in_lines(capsys):
    progress = ProgressBar("tiny", STEPS, tokens=64, lines=3)
    model, loss_of_step = problem()
    losses = fit(model.parameters(), loss_of_step, STEPS, progress=progress)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[1].split(":")[0] for line in lines] == [
        " step 4",
        " step 8",
        " step 12",
    ]
    assert f"loss {losses[-1]:.3f}" in lines[-1]
    assert lines[-1].endswith("tokens/s")
    assert progress.tokens_per_second > 0
