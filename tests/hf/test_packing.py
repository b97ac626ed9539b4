"""Training on packed or padded documents equals training on each document alone."""

from typing import Any

import pytest
import torch
from support.hf_models import every_pattern
from torch import Tensor
from transformers import DataCollatorWithFlattening

from longctx_layers.hf import LongCtxCache, LongCtxForCausalLM
from longctx_layers.testing import small_model

COLLATORS: dict[str, dict[str, bool]] = {
    "position_ids": {},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "all": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}


def hf_model(*pattern: str, **config: Any) -> LongCtxForCausalLM:
    return LongCtxForCausalLM.from_native(small_model(*pattern, **config).train())


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 13, (n,), generator=generator) for n in (7, 2, 11, 1, 6)]


def gradients(model: LongCtxForCausalLM, *losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        # transformers computes the loss in float32.
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=name)


def each_alone(model: LongCtxForCausalLM, rows: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the mean over the labels of all rows."""
    n = torch.tensor(sum(len(row) - 1 for row in rows))
    losses = [
        model(row[None], labels=row[None], num_items_in_batch=n).loss
        for row in rows
        if len(row) > 1
    ]
    return torch.stack(losses).sum(), gradients(model, *losses)


@pytest.mark.parametrize("kind", COLLATORS)
@every_pattern
def test_flattened_batch_equals_each_alone(pattern: tuple[str, ...], kind: str) -> None:
    model, rows = hf_model(*pattern), documents()
    expected, by_row = each_alone(model, rows)
    batch = DataCollatorWithFlattening(**COLLATORS[kind])([{"input_ids": row} for row in rows])
    assert batch["input_ids"].shape == (1, 27)
    named = {"position_ids", "seq_idx", "cu_seq_lens_q"} & set(batch)
    assert len(named) == (3 if kind == "all" else 1)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    assert_same(gradients(model, loss), by_row)


@pytest.mark.parametrize("side", ["right", "left"])
@every_pattern
def test_padded_batch_equals_each_alone(pattern: tuple[str, ...], side: str) -> None:
    model, rows = hf_model(*pattern), documents()
    expected, by_row = each_alone(model, rows)
    ids, mask = torch.full((5, 11), 3), torch.zeros(5, 11, dtype=torch.int64)
    labels = torch.full((5, 11), -100)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(11 - len(row), None)
        ids[i, place], mask[i, place], labels[i, place] = row, 1, row
    # After padding, the first token of a row is not a target.
    labels[mask.cumsum(1) == 1] = -100
    loss = model(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    assert_same(gradients(model, loss), by_row)


def test_packed_rows_with_pads_and_a_cache_that_goes_on() -> None:
    """A packed row in pieces, split anywhere, including at the start of a document."""
    model = hf_model("dpassm", "blade").eval()
    batch = DataCollatorWithFlattening()([{"input_ids": row} for row in documents()])
    ids, positions = batch["input_ids"], batch["position_ids"]
    mask = torch.ones_like(ids)
    mask[:, 4] = 0
    expected = model(ids, position_ids=positions, attention_mask=mask).logits
    assert not torch.allclose(expected, model(ids, attention_mask=mask).logits)
    for sizes in ([7, 20], [9, 18], [3, 1, 3, 2, 18], [1] * 27):
        cache, logits, first = LongCtxCache(), [], 0
        for n in sizes:
            piece = slice(first, first + n)
            output = model(
                ids[:, piece],
                position_ids=positions[:, piece],
                attention_mask=mask[:, : first + n],
                past_key_values=cache,
            )
            logits.append(output.logits)
            first += n
        actual = torch.cat(logits, 1)
        torch.testing.assert_close(actual[mask == 1], expected[mask == 1])


def test_cu_seq_lens_begin_new_documents_behind_a_cache() -> None:
    model = hf_model("dpassm").eval()
    rows = documents()
    cache = model(rows[0][None]).past_key_values
    bounds = torch.tensor([0, 2, 13], dtype=torch.int32)
    ids = torch.cat(rows[1:3])[None]
    actual = model(ids, cu_seq_lens_q=bounds, past_key_values=cache).logits
    torch.testing.assert_close(actual, model(ids, cu_seq_lens_q=bounds).logits)


def test_segment_ids_are_ours() -> None:
    native = small_model("blade").eval()
    ids = torch.randint(0, 13, (2, 9))
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [-1, 4, 4, 4, 2, 2, 2, 2, 2]])
    model = LongCtxForCausalLM.from_native(native)
    actual = model(ids, segment_ids=segments).logits
    torch.testing.assert_close(actual, native(ids, segment_ids=segments))
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    both = model(ids, segment_ids=segments, attention_mask=mask).logits
    expected = native(ids, segment_ids=segments.masked_fill(mask == 0, -1))
    torch.testing.assert_close(both, expected)


def test_positions_that_only_rise_are_one_document() -> None:
    model = hf_model("dpassm").eval()
    ids = torch.randint(0, 13, (2, 9))
    expected = model(ids).logits
    assert torch.equal(model(ids, position_ids=torch.arange(9)[None]).logits, expected)
    assert torch.equal(model(ids, position_ids=torch.arange(5, 14)[None]).logits, expected)


def test_mistakes_are_named() -> None:
    model, ids = hf_model("dpassm"), torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected a single packed row, .* got 2 rows"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"segment_ids: expected \[B, T\] of the call"):
        model(ids, segment_ids=torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"position_ids: expected \[B, T\] of the call"):
        model(ids, position_ids=torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="segment_ids: expected integers"):
        model(ids, segment_ids=torch.zeros(2, 6))
