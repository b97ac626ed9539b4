"""A loss that is NaN or infinite ends the run with the place where it began."""

import pytest
import torch
from support.program import SMALL, fit, merged

from longctx_layers.testing import small_model
from longctx_layers.training.inspection import first_non_finite
from longctx_layers.training.module import NonFiniteError


def test_run_stops_with_step_place_and_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = merged(
        *SMALL, "--model.learning_rate=1e30", "--model.warmup_steps=0", "--trainer.max_steps=5",
        "--checkpoint.every_n_steps=1",
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        fit(*flags)
    message = str(ended.value)
    assert "error: step 1: the loss is nan: it began in blocks.0." in message
    assert "Last good checkpoint: " in message
    assert "logs/checkpoints/step=00000001.ckpt" in message
    assert not (tmp_path / "logs/checkpoints/step=00000002.ckpt").exists()


def test_run_stops_before_bad_gradients_reach_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from longctx_layers.training.module import LanguageModel

    def poisoned(self):
        if self.global_step == 1:
            self.model.blocks[2].ffn.up_proj.weight.grad[0, 0] = float("nan")

    monkeypatch.setattr(LanguageModel, "on_after_backward", poisoned)
    with pytest.raises(SystemExit) as ended:
        fit(*merged(*SMALL, "--trainer.max_steps=5"))
    message = str(ended.value)
    assert "step 1: the gradient's norm is nan" in message
    assert "blocks.2.ffn.up_proj.weight" in message


@pytest.fixture
def batch():
    ids = torch.zeros(1, 8, dtype=torch.int64)
    return {"ids": ids, "labels": ids, "segment_ids": ids}


def test_place_is_a_parameter(batch):
    model = small_model("dpassm", "blade")
    with torch.no_grad():
        model.blocks[1].mixer.state_space.A_log[0] = float("inf")
    where = "the parameter blocks.1.mixer.state_space.A_log is not finite"
    assert first_non_finite(model, batch, None) == where


def test_place_is_a_module(batch):
    model = small_model("dpassm", "window", dtype=torch.float32)
    with torch.no_grad():
        model.blocks[1].ffn.down_proj.weight.fill_(3e38)
    assert first_non_finite(model, batch, None) == "it began in blocks.1.ffn.down_proj"


def test_nothing_is_wrong(batch):
    assert (
        first_non_finite(small_model("window"), batch, None) == "it began in the head or the loss"
    )
    assert issubclass(NonFiniteError, RuntimeError)
