"""Streaming perplexity: the loss of a stream, its drift, and memory that stays flat."""

import pytest
import torch

from longctx_layers.evals import accuracy_interval, drift, rotations, stream, wilson
from longctx_layers.testing import MemoryMeter, small_model

NAMES = ("window", "dpassm", "blade", "baseline_longformer")


def text(length, vocab=13, seed=0):
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_stream_is_the_models_loss(name):
    model, ids = small_model(name).eval(), text(2 * 61).view(2, 61)
    read = stream(model, ids, piece=7)
    expected = model.loss(ids[:, :-1], ids[:, 1:], reduction="none")
    torch.testing.assert_close(read.loss, expected.float().detach())
    right = model(ids[:, :-1]).argmax(-1) == ids[:, 1:]
    assert torch.equal(read.right, right)
    assert read.state_bytes == model.state_size(60)


@pytest.mark.parametrize("name", NAMES)
def test_forgetting_costs_a_memory_and_nothing_else(name):
    model, ids = small_model(name).eval(), text(65)[None]
    plain, forgetful = (stream(model, ids, piece=8, forget_every=n) for n in (None, 16))
    same = plain.loss == forgetful.loss
    assert same[:, :16].all()
    assert same.all() == (name not in ("dpassm", "blade"))


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_flat(name):
    model = small_model(name, dtype=torch.float32).eval()
    peaks = []
    for length in (2_000, 8_000):
        ids = text(length)[None]
        with MemoryMeter() as meter:
            stream(model, ids, piece=250)
        # What comes back is a loss and a truth value a token, held once in parts and once whole.
        peaks.append(meter.peak - 2 * (4 + 1) * length)
    assert peaks[1] <= 1.02 * peaks[0]


def test_rotations_put_each_part_at_as_many_places():
    turned = rotations(torch.arange(25), 4, 3)
    assert turned.shape == (4, 24)
    assert turned[:, 0].tolist() == [0, 6, 12, 18]
    assert all(sorted(row.tolist()) == list(range(24)) for row in turned)
    with pytest.raises(ValueError, match="expected at least 12 tokens for 4 rotations"):
        rotations(torch.arange(11), 4, 3)


def losses_with(slope, seed=0, rows=4, parts=40, part=50, noise=0.1):
    """Losses of a text whose parts differ a lot, with a slope per 1000 positions."""
    generator = torch.Generator().manual_seed(seed)
    length = parts * part
    content = 2 + torch.randn(parts, generator=generator).repeat_interleave(part)
    turned = rotations(content, rows, part)
    place = torch.arange(length) / 1000
    return turned + slope * place + noise * torch.randn(rows, length, generator=generator)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.3])
def test_drift_finds_a_planted_slope(slope):
    found = drift(losses_with(slope), part=50)
    assert found.mean == pytest.approx(slope, abs=0.02)
    assert found.low < slope < found.high
    assert found.high - found.low < 0.1


def test_intervals_cover_no_drift_about_as_often_as_they_say():
    covered = 0
    for seed in range(200):
        found = drift(losses_with(0.0, seed, noise=1.0), part=50)
        covered += found.low <= 0 <= found.high
    assert 175 <= covered <= 200


def test_beginning_is_left_out():
    losses = losses_with(0.0)
    losses[:, :100] += 5
    assert drift(losses, part=50).high < 0
    assert abs(drift(losses, part=50, skip=100).mean) < 0.02


def test_errors():
    with pytest.raises(ValueError, match="got 1 rotations and 40 parts"):
        drift(losses_with(0.0)[:1], part=50)
    with pytest.raises(ValueError, match="got 4 rotations and 8 parts"):
        drift(losses_with(0.0), part=250)


def test_interval_is_over_stretches_of_the_text():
    right = torch.zeros(2, 640, dtype=torch.bool)
    whole = slice(0, 640)
    assert accuracy_interval(right, whole) == pytest.approx(wilson(0, 640))
    alike = right.clone()
    alike[0, :320] = alike[1, 320:] = True  # the same half of the text, twice
    low, high = accuracy_interval(alike, whole)
    assert high - low > 0.6
    draw = torch.Generator().manual_seed(0)
    one = torch.rand(640, generator=draw) < 0.5
    low, high = accuracy_interval(torch.stack([one, one.roll(-320)]), whole)
    assert 0.07 < high - low < 0.13  # of 640 tokens, not 1280
