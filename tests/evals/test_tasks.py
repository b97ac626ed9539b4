"""The tasks: their questions can be answered from what was told, and from nothing nearer."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx_layers.evals import (
    SYNTHETIC,
    TASKS,
    ChunkTransfer,
    CopyRecall,
    DriftCurve,
    Mqar,
    Passkey,
    Vocabulary,
    needle_grid,
    text_vocabulary,
)
from longctx_layers.lm.loss import IGNORED_LABEL

TOLD, OTHER, ASKED, FILLER = 128, 129, 130, 131
# Marks of several tokens, as a text's are.
SENTENCES = Vocabulary(90, tuple(range(70)), (80, 81, 82), (80, 83), (80, 84, 82), 85)


def draw(task, batch=5, length=200, seed=0):
    return task.draw(batch, length, torch.Generator().manual_seed(seed))


def answers(labels):
    """Places and labels of a row, in order."""
    places = (labels != IGNORED_LABEL).nonzero().flatten().tolist()
    return [(place, int(labels[place])) for place in places]


def find(row, mark):
    """Where a mark begins."""
    row, mark = row.tolist(), list(mark)
    return [i for i in range(len(row) - len(mark) + 1) if row[i : i + len(mark)] == mark]


RECALLS = (Passkey, CopyRecall, DriftCurve, ChunkTransfer)


@pytest.mark.parametrize("kind", RECALLS)
@given(
    vocabulary=st.sampled_from([SYNTHETIC, SENTENCES]),
    distance=st.integers(0, 40),
    digits=st.integers(1, 3),
    extra=st.integers(0, 4),
    spare=st.integers(0, 100),
    seed=st.integers(0, 10),
)
def test_value_is_told_once_and_asked_at_a_distance(
    kind, vocabulary, distance, digits, extra, spare, seed
):
    knobs = {"chunk_size": 16} if kind is ChunkTransfer else {}
    if kind is ChunkTransfer:
        extra = 0  # it asks in every chunk already
    task = kind(
        vocabulary=vocabulary, distance=distance, digits=digits, extra_questions=extra, **knobs
    )
    batch = draw(task, length=task.shortest + spare, seed=seed)
    assert batch.ids.shape == batch.labels.shape == (5, task.shortest + spare)
    assert 0 <= batch.ids.min() <= batch.ids.max() < vocabulary.size
    for ids, labels in zip(batch.ids, batch.labels, strict=True):
        (told,) = find(ids, vocabulary.told)
        end = told + len(vocabulary.told) + digits
        value = ids[end - digits : end].tolist()
        questions = find(ids, vocabulary.asked)
        asked = [q + len(vocabulary.asked) - 1 for q in questions]
        # Every question is answered digit by digit, with the digits before it given.
        assert answers(labels) == [(a + i, v) for a in asked for i, v in enumerate(value)]
        for a in asked:
            assert ids[a + 1 : a + digits].tolist() == value[:-1]
        assert min(questions) >= end
        if not extra:
            assert min(questions) == batch.asked
            assert batch.asked - end >= distance


@given(
    pairs=st.integers(1, 32), distance=st.integers(0, 50), spare=st.integers(0, 60),
    seed=st.integers(0, 10),
)  # fmt: skip
def test_mqar_asks_each_key_once(pairs, distance, spare, seed):
    task = Mqar(pairs=pairs, distance=distance)
    batch = draw(task, length=task.shortest + spare, seed=seed)
    assert batch.asked == 2 * pairs + distance
    for ids, labels in zip(batch.ids.tolist(), batch.labels, strict=True):
        told = dict(zip(ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
        assert len(told) == pairs == len(set(told.values()))
        found = answers(labels)
        assert {ids[place]: value for place, value in found} == told
        assert len(found) == pairs
        assert min(place for place, _ in found) >= batch.asked
        rest = [i for i in range(2 * pairs, len(ids)) if i not in dict(found)]
        assert {ids[i] for i in rest} <= {FILLER}


@pytest.mark.parametrize("kind", TASKS.values())
def test_seed_decides_and_values_are_even(kind):
    task = kind(n_symbols=4, **({"pairs": 2} if kind is Mqar else {}))
    first, again, other = (draw(task, 400, 300, seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.ids, other.ids)
    values = first.labels[first.labels != IGNORED_LABEL]
    counts = torch.bincount(values).float()
    counts = counts[counts > 0] / len(values)
    assert len(counts) == 4
    # One answer in 400 independent sequences: within five standard deviations.
    assert (counts - 0.25).abs().max() < 5 * (0.25 * 0.75 / 400) ** 0.5
    assert task.chance == (1 / 2 if kind is Mqar else 1 / 4)


def test_noise_has_the_values_symbols_or_others():
    passkey, copy = draw(Passkey(n_symbols=8)), draw(CopyRecall(n_symbols=8))
    noise = set(passkey.ids.flatten().tolist()) - {TOLD, ASKED}
    assert noise == set(range(8))
    assert set(copy.ids[:, 5:-4].flatten().tolist()) == set(range(8, 16))


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth(depth):
    task = Passkey(depth=depth, distance=10)
    batch = draw(task, length=213)
    places = {int((row == TOLD).nonzero()) for row in batch.ids}
    assert places == {round(depth * 200)}


def test_needle_grid_spans_all_depths():
    grid = needle_grid(5, Passkey(distance=7))
    assert list(grid) == [0, 0.25, 0.5, 0.75, 1]
    assert all(task.depth == depth and task.distance == 7 for depth, task in grid.items())
    assert list(needle_grid(1, Passkey())) == [0]


def test_distractors_have_another_mark_and_leave_the_value_alone():
    batch = draw(Passkey(distractors=6), length=400)
    assert (batch.ids == OTHER).sum(1).min() >= 4
    assert ((batch.ids == TOLD).sum(1) == 1).all()
    told = (batch.ids == TOLD).nonzero()[:, 1]
    assert torch.equal(batch.ids[torch.arange(5), told + 1], batch.labels[:, -1])


def test_drift_curve_asks_ever_further_away():
    batch = draw(DriftCurve(distance=30, questions=8), length=4000)
    places = [place for place, _ in answers(batch.labels[0])]
    assert len(places) == 8
    assert places[0] == 32
    assert places[-1] == 3999
    ratios = [b / a for a, b in itertools.pairwise(places)]
    assert max(ratios) < 1.05 * min(ratios)


def test_chunk_transfer_tells_in_the_first_chunk_and_asks_at_the_end_of_later_ones():
    batch = draw(ChunkTransfer(chunk_size=16, distance=20), length=100)
    assert [place for place, _ in answers(batch.labels[0])] == [47, 63, 79, 95]
    assert max(int((row == TOLD).nonzero()) for row in batch.ids) < 15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: draw(Passkey(distance=300)), "passkey: expected a length of at least 303"),
        (
            lambda: Passkey(n_symbols=129),
            "n_symbols: expected 2 to 128, the number of symbols in the vocabulary",
        ),
        (lambda: Passkey(depth=1.5), "depth: expected a number from 0 to 1"),
        (lambda: Passkey(distance=-1), "distance: expected at least 0"),
        (lambda: CopyRecall(n_symbols=127), "n_symbols: expected at most 126"),
        (lambda: Mqar(pairs=65), "pairs: expected at most n_symbols = 64"),
        (
            lambda: Mqar(extra_questions=1),
            "extra_questions: expected 0, since mqar asks for every key",
        ),
        (lambda: ChunkTransfer(chunk_size=1), "chunk_size: expected at least the 2 tokens"),
        (lambda: Vocabulary(4, (0, 1), (2,), (3,), (4,), 0), "expected ids in \\[0, 4\\)"),
        (lambda: Vocabulary(4, (0, 0), (2,), (3,), (3,), 0), "expected distinct symbols"),
        (lambda: Vocabulary(4, (0, 1), (), (3,), (3,), 0), "marks of at least one id"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tasks_in_a_tokenizers_ids_are_text():
    from longctx_layers.data.tokenizers import ByteTokenizer, train_bpe

    words = " ".join("".join(chr(97 + (i * j) % 26) for j in range(1, 5)) for i in range(200))
    for tokenizer in (ByteTokenizer(), train_bpe([words + " The pass key is 5\n"] * 3, 400)):
        made = text_vocabulary(tokenizer.encode, tokenizer.decode, tokenizer.vocab_size)
        assert len(made.symbols) >= 32
        batch = draw(Passkey(vocabulary=made, n_symbols=16), batch=1, length=150)
        text = tokenizer.decode(batch.ids[0].tolist())
        assert text.count("\nThe pass key is ") == 2
        assert text.endswith("\nThe pass key is ")
        answer = tokenizer.decode([int(batch.labels[0, -1])])
        assert text.split("\nThe pass key is ")[1].startswith(answer)
        for symbol in made.symbols:
            assert list(tokenizer.encode(tokenizer.decode([symbol]))) == [symbol]
    with pytest.raises(ValueError, match="at least 8 tokens that are one word or one letter"):
        text_vocabulary(lambda text: [0], lambda ids: "?", 50)
