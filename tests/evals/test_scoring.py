"""Reading in pieces, the state probe, and what a score is made of."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx_layers import LAYERS
from longctx_layers.evals import (
    SYNTHETIC,
    CopyRecall,
    DriftCurve,
    Passkey,
    answer,
    effective_length,
    evaluate,
    has_memory,
    reach,
    read,
    wilson,
    zero_memory,
)
from longctx_layers.lm.loss import IGNORED_LABEL
from longctx_layers.testing import MemoryMeter, small_model

MEMORIES = ("dpassm", "blade")


def model_of(*pattern, **config):
    return small_model(*pattern, **{"vocab_size": SYNTHETIC.size, **config}).eval()


def some(task, batch=3, length=90):
    return task.draw(batch, length, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("at_once", [1, 40, 10_000])
def test_answers_in_pieces_are_those_of_one_call(name, at_once):
    model, batch = model_of(name), some(CopyRecall(distance=20))
    answers, without = answer(model, batch, tokens_at_once=at_once)
    assert without is None
    with torch.no_grad():
        logits = model(batch.ids)
    row, place = (batch.labels != IGNORED_LABEL).nonzero(as_tuple=True)
    order = (answers.row * 1000 + answers.place).argsort()
    assert torch.equal(answers.row[order], row)
    assert torch.equal(answers.place[order], place)
    expected = torch.nn.functional.cross_entropy(
        logits[row, place], batch.labels[row, place], reduction="none"
    )
    torch.testing.assert_close(answers.loss[order], expected.float())
    right = logits[row, place].argmax(-1) == batch.labels[row, place]
    assert torch.equal(answers.right[order], right)


@pytest.mark.parametrize("name", LAYERS)
def test_zeroing_empties_the_memory_and_nothing_else(name):
    model = model_of(name)
    state = read(model, torch.randint(0, 100, (2, 30)))
    zeroed = zero_memory(model, state)
    emptied = set()
    for before, after in zip(state, zeroed, strict=True):
        for field in before._fields:
            old, new = getattr(before, field), getattr(after, field)
            if not torch.equal(old, new):
                assert not new.any()
                emptied.add(field)
    expected = {"dpassm": {"h"}, "blade": {"readable", "pending"}}.get(name, set())
    assert emptied == expected
    assert has_memory(model) == bool(expected)


def test_a_layer_without_state_path_has_no_memory():
    for name, option in (("dpassm", {"ssm": None}), ("blade", {"state_update": None})):
        model = small_model(name, block_kwargs={name: option})
        assert not has_memory(model)


@pytest.mark.parametrize("name", MEMORIES)
def test_probe_empties_the_state_a_reach_before_the_question_and_at_it(name):
    model, batch = model_of(name), some(DriftCurve(distance=30))
    answers, without = answer(model, batch, probe=True, tokens_at_once=50)
    plain, _ = answer(model, batch)
    torch.testing.assert_close(answers.loss.sum(), plain.loss.sum())
    cut = batch.asked - reach(model)
    with torch.no_grad():
        _, state = model(batch.ids[:, :cut], return_state=True)
        near = batch.ids[:, cut : batch.asked]
        _, state = model(near, zero_memory(model, state), return_state=True)
        logits = model(batch.ids[:, batch.asked :], zero_memory(model, state))
    row, place = (batch.labels != IGNORED_LABEL).nonzero(as_tuple=True)
    expected = torch.nn.functional.cross_entropy(
        logits[row, place - batch.asked], batch.labels[row, place], reduction="none"
    )
    torch.testing.assert_close(without.loss.sum(), expected.float().sum())
    assert (without.loss.sum() - answers.loss.sum()).abs() > 1e-3


@pytest.mark.parametrize("name", MEMORIES)
def test_probe_hides_what_was_told(name):
    """Another value changes answers, but none of the probe's: one layer has no other way."""
    model = model_of(name, n_layers=1)
    batch = some(Passkey(distance=40, depth=0.0))
    other = batch.ids.clone()
    other[:, 1] = (other[:, 1] + 1) % 32
    for wanted, probe in ((False, 0), (True, 1)):
        first = answer(model, batch, probe=True)[probe]
        second = answer(model, batch._replace(ids=other), probe=True)[probe]
        assert torch.equal(first.loss, second.loss) == wanted


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("window", {"window_size": 5}),
        ("dpassm", {"window_size": 5, "ssm": None}),
        ("blade", {"chunk_size": 6, "state_update": None}),
    ],
)
def test_reach_is_the_furthest_token_that_windows_and_chunks_see(name, options):
    model = model_of(name, block_kwargs={name: options})
    ids = torch.randint(0, 100, (1, 60), generator=torch.Generator().manual_seed(0))
    furthest = 0
    with torch.no_grad():
        before = model(ids)
        for place in range(20, 40):
            changed = ids.clone()
            changed[0, place] += 1
            differs = (model(changed) != before).any(-1)[0].nonzero()
            furthest = max(furthest, int(differs.max()) - place)
    # Chunks of two layers, half a chunk apart, end together at best a little earlier.
    slack = 0 if name != "blade" else model.blocks[0].mixer.chunk_size // 2
    assert reach(model) - slack <= furthest <= reach(model)


def test_reach_of_full_attention_has_no_end():
    assert reach(model_of("vanilla")) is None
    assert reach(model_of("dpassm", "vanilla")) is None
    assert reach(model_of("dpassm")) == 8


@pytest.mark.parametrize("name", ["window", *MEMORIES])
def test_reading_takes_no_more_memory_for_more_tokens(name):
    model = model_of(name, dtype=torch.float32)
    peaks = []
    for length in (2_000, 8_000):
        ids = torch.randint(0, 100, (1, length))
        with MemoryMeter() as meter:
            read(model, ids, tokens_at_once=500)
        peaks.append(meter.peak)
    assert peaks[1] <= 1.01 * peaks[0]


def test_score_of_known_answers(monkeypatch):
    model, task = model_of("dpassm"), Passkey(distance=20)
    score = evaluate(model, task, 64, n=20, batch_size=7)
    again = evaluate(model, task, 64, n=20, batch_size=20, tokens_at_once=100)
    assert score.accuracy == again.accuracy
    assert score.loss == pytest.approx(again.loss)
    assert score.n == 20
    assert (score.low, score.high) == wilson(score.accuracy * 20, 20)
    assert score.reach == 8
    assert list(score.by_place) == [63]
    assert score.by_place[63][0] == score.accuracy
    assert evaluate(model, task, 64, n=2, probe=False).accuracy_state_zeroed is None
    assert evaluate(model_of("window"), task, 64, n=2).accuracy_state_zeroed is None
    model.train()
    evaluate(model, task, 64, n=1)
    assert model.training


def test_a_model_that_knows_scores_one():
    """A model of one layer whose output is made to be the label's own embedding."""
    model, task = model_of("window"), Passkey(distance=20)
    batch = task.draw(4, 64, torch.Generator().manual_seed(0))
    model.project = lambda hidden: torch.nn.functional.one_hot(batch.labels[:, -1], 132).float()
    assert evaluate(model, task, 64, n=4, batch_size=4).accuracy == 1


def test_errors():
    model, task = small_model("window"), Passkey()
    with pytest.raises(ValueError, match="at most the model's 13 ids, got 132"):
        evaluate(model, task, 64)
    with pytest.raises(ValueError, match="n: expected at least 1"):
        evaluate(model_of("window"), task, 64, n=0)
    with pytest.raises(ValueError, match="right: expected a number from 0 to n = 3"):
        wilson(4, 3)


def test_wilson_against_published_values():
    # Brown, Cai and DasGupta 2001 and Newcombe 1998.
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson(29, 29)[1] == 1


@given(p=st.floats(0.05, 0.95), n=st.integers(20, 200))
def test_wilson_covers_what_it_says(p, n):
    covered = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if wilson(k, n)[0] <= p <= wilson(k, n)[1]
    )
    assert covered > 0.9


def test_effective_length():
    assert effective_length({256: 1.0, 512: 0.95, 1024: 0.5, 2048: 1.0}) == 512
    assert effective_length({256: 0.3}) is None
    assert effective_length({512: 1.0, 256: 1.0}) == 512
