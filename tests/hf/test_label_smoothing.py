"""The Trainer with label smoothing, which decides by the class name whether to shift labels."""

from __future__ import annotations

import pytest
import torch
from support.hf_models import hf_model
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longctx_layers.hf import LongCtxForCausalLM

FACTOR = 0.3


class Renamed(LongCtxForCausalLM):
    """A user's subclass, whose name transformers does not know."""


def plain(model):
    return model


def renamed(model):
    model.__class__ = Renamed
    return model


def with_adapters(model):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    return peft.get_peft_model(model, config)


def smoothed(logits, targets):
    """The smoothed loss of logits `[N, V]` and their targets `[N]`."""
    logs = logits.log_softmax(-1)
    own = -logs.gather(-1, targets[:, None])[:, 0]
    return ((1 - FACTOR) * own - FACTOR * logs.mean(-1)).mean()


@pytest.mark.parametrize("wrap", [plain, renamed, with_adapters])
def test_each_token_predicts_the_next_one_of_its_document(wrap, tmp_path):
    model = wrap(hf_model("dpassm", "vanilla", dtype=torch.float32))
    rows = [torch.randint(0, 13, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 12)]
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=FACTOR
    )
    trainer = Trainer(model=model, args=args)
    logits = torch.cat([model(row[None]).logits[0, :-1] for row in rows])
    expected = smoothed(logits, torch.cat([row[1:] for row in rows]))

    padded = torch.full((2, 12), -100)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    mask = (padded >= 0).long()
    packed = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    for batch in (
        {"input_ids": padded.clamp(min=0), "attention_mask": mask, "labels": padded},
        dict(packed),
    ):
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)


def test_tables_of_names():
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["longctx"] == "LongCtxForCausalLM"
    assert "Renamed" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert Renamed(hf_model("window").config).loss_type == "ForCausalLM"
