"""A task of one's own: one class, registered by a decorator, is known to program and reports."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from longctx_layers import LongContextLM
from longctx_layers.evals import TASKS, Batch, Passkey, Task, evaluate, register_task, token_losses
from longctx_layers.evals.program.models import build
from longctx_layers.evals.program.task_training import for_training
from longctx_layers.evals.synthetic import main
from longctx_layers.lm.loss import IGNORED_LABEL
from longctx_layers.reports import results
from longctx_layers.reports.checkpoint import Checkpoint
from longctx_layers.reports.sections import evaluation
from longctx_layers.testing import small_model


@dataclass(frozen=True, kw_only=True)
class Echo(Task):
    """Which symbol stood at the beginning?"""

    name: ClassVar[str] = "echo"
    knobs: ClassVar[dict[str, str]] = {**Task.knobs, "share": "of the symbols that are used"}
    drawn_by_place: ClassVar[bool] = True

    share: float = 1.0

    @property
    def shortest(self):
        return 2 + self.distance

    def write(self, batch, length, generator):
        pool = self.symbols(0, int(self.share * self.n_symbols))
        first = self.drawn(pool, batch, generator=generator)
        ids = torch.full((batch, length), self.vocabulary.filler)
        labels = torch.full_like(ids, IGNORED_LABEL)
        ids[:, 0] = first
        ids[:, -1] = self.vocabulary.asked[0]
        labels[:, -1] = first
        return Batch(ids, labels, length - 1)


@pytest.fixture
def echo(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    register_task(Echo)
    yield
    del TASKS["echo"]


def test_a_registered_task_is_evaluated_trained_on_and_reported(echo, capsys):
    flags = "--task echo --seq_len 64 --n 3 --window_size 8 --share 0.5 --output_dir rows"
    (row,) = main([*flags.split(), "--train_steps", "2", "--device", "cpu"])
    assert row["task"] == "echo"
    assert row["chance"] == 1 / 32
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--task", "passkey", "--share", "0.5"])
    assert "--share: passkey has the options ['distance'" in capsys.readouterr().err
    (folder,) = Path("rows/models").iterdir()
    checkpoint = Checkpoint(folder, LongContextLM.from_pretrained(folder), None, label="a model")
    found = results.find(checkpoint, Path("rows"))
    assert found.by_length == {"echo": [row]}
    section = evaluation.section([checkpoint], [found])
    names = [part.name for part in section.parts if hasattr(part, "png")]
    assert names == ["echo", "echo_places"]
    assert section.numbers["a model"]["echo"] == [row]


def test_a_registered_task_has_more_questions_in_training_by_default():
    assert for_training(Echo(), 3, 2).extra_questions == 6
    score = evaluate(build("window", {"window_size": 8}), Echo(share=0.5), 20, n=2)
    assert list(score.by_place) == [19]


def test_names_are_taken_once(echo):
    register_task(Echo)  # the same again
    for name in ("echo", "passkey", "needle", "streaming_ppl"):
        with pytest.raises(ValueError, match=f"the name '{name}' is taken"):
            register_task(type("Other", (Echo,), {"name": name}))
    with pytest.raises(ValueError, match="expected a class attribute `name`"):
        register_task(type("Nameless", (Echo,), {"name": ""}))
    assert TASKS["passkey"] is Passkey


@pytest.mark.parametrize(
    ("old", "names"),
    [
        ("recall", "Recall Passkey CopyRecall"),
        ("distances", "DriftCurve ChunkTransfer"),
        ("associative", "Mqar"),
        ("tasks", "Batch Task put"),
        ("vocabulary", "Vocabulary SYNTHETIC text_vocabulary MOST_SYMBOLS"),
        ("prefill", "Answers read answer reach memory has_memory zero_memory"),
        ("perplexity", "Stream stream Slope drift rotations accuracy_interval buckets"),
        ("scoring", "Score evaluate wilson needle_grid effective_length Z"),
    ],
)
@pytest.mark.filterwarnings("ignore:longctx_layers:DeprecationWarning")
def test_what_earlier_modules_had_is_importable_from_them(old, names):
    module = importlib.import_module(f"longctx_layers.evals.{old}")
    for name in names.split():
        assert hasattr(module, name), name


def test_token_losses_are_the_models_own():
    model = small_model("window").eval()
    ids = torch.arange(2 * 33).view(2, 33) % 13
    whole = token_losses(model, ids)
    expected = model.loss(ids[:, :-1], ids[:, 1:], reduction="none")
    torch.testing.assert_close(whole, expected.float().detach())
    for at_once in (1, 8, 10_000):
        short = token_losses(model, ids, length=8, tokens_at_once=at_once)
        torch.testing.assert_close(short[:, :8], whole[:, :8])
        assert (short - whole).abs().max() > 0.01
    with pytest.raises(ValueError, match="expected a divisor of the 32 tokens"):
        token_losses(model, ids, length=7)
