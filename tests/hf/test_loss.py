"""The loss of rows with padding and several documents is the mean over each document's labels."""

import pytest
import torch
import torch.nn.functional as F
from support.hf_models import hf_model, some_ids
from torch import Tensor

from longctx_layers.hf import LongCtxForCausalLM


def by_hand(model: LongCtxForCausalLM, documents: list[Tensor]) -> Tensor:
    """The mean over the labels of all documents, each read alone."""
    losses = [
        F.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:], reduction="none")
        for row in documents
    ]
    return torch.cat(losses).mean()


def test_pads_are_no_targets_and_predict_nothing() -> None:
    """Labels are the ids themselves, as callers pass them; padding is anywhere."""
    model, ids, mask = hf_model("dpassm", "blade"), some_ids(4, 9), torch.ones(4, 9).long()
    mask[0, 6:], mask[1, :3], mask[2, 3:5], mask[3] = 0, 0, 0, 0
    rows = [row[real.bool()] for row, real in zip(ids[:3], mask, strict=False)]
    loss = model(ids, attention_mask=mask, labels=ids).loss
    torch.testing.assert_close(loss, by_hand(model, rows), check_dtype=False)
    # The same as the loss of LongContextLM.
    segments = mask - 1
    shifted = torch.full_like(ids, -100)
    shifted[:2, :-1] = torch.where(mask[:2, 1:] == 1, ids[:2, 1:], -100)
    native = model.model.loss(ids[:2], shifted[:2], segment_ids=segments[:2])
    part = model(ids[:2], attention_mask=mask[:2], labels=ids[:2]).loss
    torch.testing.assert_close(part, native, check_dtype=False)


@pytest.mark.parametrize("told", ["segment_ids", "seq_idx", "cu_seq_lens_q", "position_ids"])
def test_a_documents_first_token_is_no_target(told: str) -> None:
    model, ids = hf_model("dpassm"), some_ids(1, 12)
    lengths = [5, 1, 6]
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    arguments = {
        "segment_ids": number,
        "seq_idx": number,
        "cu_seq_lens_q": torch.tensor([0, 5, 6, 12], dtype=torch.int32),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    loss = model(ids, labels=ids, **{told: arguments[told]}).loss
    expected = by_hand(model, [part for part in ids[0].split(lengths) if len(part) > 1])
    torch.testing.assert_close(loss, expected, check_dtype=False)


@pytest.mark.parametrize("n", [None, 0, 7])
def test_no_label_is_a_loss_of_zero(n: int | None) -> None:
    model, ids = hf_model("dpassm"), some_ids(2, 6)
    items = {} if n is None else {"num_items_in_batch": torch.tensor(n)}
    for labels, mask in ((torch.full_like(ids, -100), None), (ids, torch.zeros_like(ids))):
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels, **items).loss
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.model.loss(ids, torch.full_like(ids, -100)) == 0


def test_shifted_labels_of_the_caller() -> None:
    model, ids = hf_model("dpassm"), some_ids(1, 6)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    loss = model(ids, labels=ids, shift_labels=shifted).loss
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)


def test_labels_outside_the_vocabulary() -> None:
    model, ids = hf_model("dpassm"), some_ids(1, 6)
    labels = ids.clone()
    labels[0, 3] = 13
    with pytest.raises(ValueError, match=r"labels: expected -100 or ids in \[0, 13\), got ids"):
        model(ids, labels=labels)
