"""Batched conversations: padding of finished rows, and masks that must agree with the cache."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from support.hf_models import every_pattern, hf_model
from support.pretrained_models import pretrained
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from longctx_layers.convert import convert_attention
from longctx_layers.hf import LongCtxCache

PAD = 0
CONVERTED = {
    "dpassm": ("dpassm", {"window_size": 6, "ssm_state_dim": 4}),
    "vanilla": ("vanilla", {}),
    "hybrid": ("window", {"window_size": 6, "layers": [1]}),
}


def some_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 13, shape, generator=torch.Generator().manual_seed(seed))


def converted(kind: str, family: str = "llama") -> Any:
    block, options = CONVERTED[kind]
    return convert_attention(pretrained(family).double(), block, **options).eval()


def any_model(kind: str) -> tuple[Any, Any]:
    """A converted model, or a model of one layer, with its empty cache."""
    if kind in CONVERTED:
        model = converted(kind)
        return model, DynamicCache(config=model.config)
    return hf_model(kind), LongCtxCache()


every_kind = pytest.mark.parametrize("kind", ["blade", *CONVERTED])


def first_scores(model: Any, ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
    made = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=1,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return made.logits[0]


class Conversation:
    """A batch whose rows end at different times, and its attention mask."""

    def __init__(self, model: Any, cache: Any, pad: int | None = None, **options: Any) -> None:
        self.model, self.cache, self.options = model, cache, options
        prompt = some_ids(3, 7)
        self.ids, self.mask = prompt, torch.ones_like(prompt)
        self.mask[2, :3] = 0  # padding on the left
        torch.manual_seed(0)
        free = model.generate(
            prompt,
            attention_mask=self.mask,
            max_new_tokens=8,
            pad_token_id=PAD,
            eos_token_id=None,
            past_key_values=deepcopy(cache),
            **options,
        )[:, 7:]
        self.eos = [int(free[0, 2]), int(free[1, 5])]
        self.pad = self.eos[0] if pad is None else pad
        self.turn()
        assert (self.mask[:, 7:] == 0).any(), "no row ended early"

    def turn(self) -> None:
        """Generate the next turn; tokens after the end of a row are padding."""
        length = self.ids.shape[1]
        torch.manual_seed(0)
        self.ids = self.model.generate(
            self.ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            max_new_tokens=8,
            pad_token_id=self.pad,
            eos_token_id=self.eos,
            **self.options,
        )
        new = self.ids[:, length:]
        ends = torch.isin(new, torch.tensor(self.eos))
        self.mask = torch.cat([self.mask, (ends.cumsum(1) - ends.long() == 0).long()], 1)

    def say(self, n: int, seed: int) -> None:
        """Append a message of n tokens to each row."""
        more = some_ids(3, n, seed=seed)
        self.ids = torch.cat([self.ids, more], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(more)], 1)

    def check(self) -> None:
        """The next token of each row has the same scores as in the row alone."""
        actual = first_scores(self.model, self.ids, self.mask, deepcopy(self.cache))
        for i, scores in enumerate(actual):
            alone = self.ids[i][self.mask[i].bool()][None]
            expected = first_scores(self.model, alone, torch.ones_like(alone))[0]
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@every_kind
def test_rows_that_ended_early_continue_as_alone(kind: str) -> None:
    talk = Conversation(*any_model(kind), pad=PAD, do_sample=False)
    for seed in (1, 2):
        talk.say(4, seed)
        talk.check()
        talk.turn()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 5},
        {"do_sample": False, "prefill_chunk_size": 3},
        {"do_sample": False, "stopping_criteria": "custom"},
    ],
    ids=["sampling", "chunks", "criteria"],
)
@pytest.mark.parametrize("kind", ["dpassm-ours", "dpassm"])
def test_however_rows_end(kind: str, options: dict[str, Any]) -> None:
    class SeenTwice(StoppingCriteria):
        """Ends no row itself; transformers adds its own criterion for the end-of-text token."""

        def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.zeros(len(ids), dtype=torch.bool)

    if options.get("stopping_criteria"):
        options = {**options, "stopping_criteria": StoppingCriteriaList([SeenTwice()])}
    if kind == "dpassm":
        model, cache = any_model(kind)
    else:
        model, cache = hf_model("dpassm"), LongCtxCache()
    talk = Conversation(model, cache, **options)  # padding is one of the end tokens
    talk.say(3, 1)
    talk.check()


@every_pattern
def test_our_models_of_every_pattern(pattern: tuple[str, ...]) -> None:
    talk = Conversation(hf_model(*pattern), LongCtxCache(), pad=PAD, do_sample=False)
    talk.say(4, 1)
    talk.check()


@every_kind
def test_a_mask_that_contradicts_the_cache_is_refused(kind: str) -> None:
    model, cache = any_model(kind)
    ids, mask = some_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :2] = 0
    with torch.no_grad():
        model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache, use_cache=True)
        for row, column, read in ((1, 4, "a token"), (0, 1, "padding")):
            wrong = mask.clone()
            wrong[row, column] = 1 - wrong[row, column]
            message = rf"column {column} of row {row}, which was read as {read}"
            with pytest.raises(ValueError, match=message):
                model(ids[:, 6:], attention_mask=wrong, past_key_values=cache, use_cache=True)
        # The right mask is accepted, and so is one of the new columns alone.
        other = deepcopy(cache)
        actual = [
            model(ids[:, 6:], attention_mask=m, past_key_values=c, use_cache=True).logits
            for m, c in ((mask, cache), (None if kind == "hybrid" else mask[:, 6:], other))
        ]
        if kind != "hybrid":  # the unconverted layers need the whole mask
            torch.testing.assert_close(*actual)


@every_kind
def test_a_second_turn_that_forgets_the_pads_is_refused(kind: str) -> None:
    talk = Conversation(*any_model(kind), do_sample=False)
    talk.say(3, 1)
    talk.mask[:] = 1
    with pytest.raises(ValueError, match="which was read as padding"):
        talk.turn()


@every_kind
def test_masks_follow_the_rows_of_a_cache(kind: str) -> None:
    model, cache = any_model(kind)
    ids, mask = some_ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    new = torch.ones(2, 1, dtype=torch.int64)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache.reorder_cache(torch.tensor([1, 0]))
        call = {"past_key_values": cache, "use_cache": True}
        with pytest.raises(ValueError, match="contradict|read as"):
            model(ids[:, :1], attention_mask=torch.cat([mask, new], 1), **call)
        model(ids[:, :1], attention_mask=torch.cat([mask.flip(0), new], 1), **call)


def test_a_mask_after_tokens_were_taken_back() -> None:
    model, cache = hf_model("dpassm"), LongCtxCache()
    cache.activate_past_recording()
    ids, mask = some_ids(1, 8), torch.ones(1, 8, dtype=torch.int64)
    mask[0, 4:6] = 0
    model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    cache.crop(-2)
    model(ids[:, 4:], attention_mask=torch.ones_like(mask), past_key_values=cache)
    assert cache.pads is not None
    assert not cache.pads.any()


@every_kind
def test_prompts_padded_at_the_right_are_refused(kind: str) -> None:
    model, _ = any_model(kind)
    ids, mask = some_ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        with pytest.raises(ValueError, match=r"last column of rows \[.*pad on the left"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0, **options)


@pytest.mark.parametrize("kind", ["dpassm", "blade"])
def test_masks_that_number_documents_are_refused(kind: str) -> None:
    model, _ = any_model(kind)
    ids, mask = some_ids(1, 6), torch.tensor([[1, 1, 2, 2, 3, 0]])
    with pytest.raises(ValueError, match=r"values from 0 to 3; .* pass segment_ids"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize("kind", ["dpassm", "vanilla"])
def test_a_row_does_not_feel_another_rows_pads(kind: str) -> None:
    """Also if the current segment of the cache is not the first."""
    model, _ = any_model(kind)
    ids, segments = some_ids(2, 9), torch.tensor([[0, 0, 1, 1, 1], [3, 3, 3, 5, 5]])
    actual = []
    for pads in (0, 2):
        cache = DynamicCache(config=model.config)
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[0, 5 : 5 + pads] = 0
        with torch.no_grad():
            model(ids[:, :5], segment_ids=segments, past_key_values=cache, use_cache=True)
            call = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
            actual.append(model(ids[:, 5:], **call).logits[1])
    torch.testing.assert_close(*actual)


# ---- Positions together with a mask


@pytest.mark.parametrize("counted", [False, True], ids=["pads uncounted", "pads counted"])
def test_positions_beside_a_mask_cut_nothing(counted: bool) -> None:
    model, ids = hf_model("dpassm", "blade", "vanilla"), some_ids(3, 14)
    mask = torch.ones_like(ids)
    mask[0, 5:9], mask[1, :4], mask[2, 12:] = 0, 0, 0
    positions = torch.arange(14).expand(3, -1) if counted else (mask.cumsum(1) - 1)
    positions = positions.masked_fill(mask == 0, 1)
    expected = model(ids, attention_mask=mask).logits
    for size in (14, 7, 6):
        cache, logits = LongCtxCache(), []
        for first in range(0, 14, size):
            piece = slice(first, first + size)
            output = model(
                ids[:, piece],
                attention_mask=mask[:, : first + size],
                position_ids=positions[:, piece],
                past_key_values=cache,
            )
            logits.append(output.logits)
        actual = torch.cat(logits, 1)
        torch.testing.assert_close(actual[mask == 1], expected[mask == 1])
