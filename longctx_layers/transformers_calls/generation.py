"""What `generate` must tell layers with a state: which of the columns that it feeds are pads.

Keys and values of pads can be masked in a later call. A state cannot take anything back, so it must
know of a pad when it reads it.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteriaList

from longctx_layers.transformers_calls.arguments import CACHE_NAME


class FinishedRows(StoppingCriteriaList):
    """The criteria of a call of `generate`, which record which of the new tokens are pads."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self._ended: Tensor | None = None
        self._columns: list[Tensor] = []
        self._any = False
        # As in transformers: without an end-of-text token, rows that are stopped by another
        # criterion are continued with tokens, which are part of the text that is returned.
        self._appends_pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which rows end with these ids, `[B]`."""
        ends = super().__call__(input_ids, scores, **kwargs)
        if self._appends_pads and len(input_ids) > 1:  # a row alone is never fed pads
            ended = torch.zeros_like(ends) if self._ended is None else self._ended
            self._columns.append(ended)
            self._any = self._any or bool(ended.any())
            self._ended = ended | ends
        return ends

    @property
    def pads(self) -> Tensor | None:
        """`[B, n]` bool for the n new tokens, True at what transformers appends to ended rows."""
        return torch.stack(self._columns, 1) if self._any else None


class GeneratesWithPads:
    """Mixin before a model of transformers: its `generate` marks all pads in the attention mask."""

    def _sample(
        self, input_ids: Tensor, *args: Any, stopping_criteria: StoppingCriteriaList, **kwargs: Any
    ) -> Any:
        # The one way of decoding that feeds rows on after their end.
        finished = FinishedRows(stopping_criteria)
        return super()._sample(  # type: ignore[misc]
            input_ids, *args, stopping_criteria=finished, finished_rows=finished, **kwargs
        )

    # With the signature of transformers' own, which `generate` looks at.
    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers has it, with 0 in the mask where a finished row is fed a pad."""
        finished = kwargs.pop("finished_rows", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        cache, mask = inputs.get(CACHE_NAME), inputs.get("attention_mask")
        pads = None if finished is None else finished.pads
        if cache is None or (pads is None and (mask is not None or recorded_pads(cache) is None)):
            return inputs
        if mask is None:  # transformers leaves out a mask of ones
            read = inputs.get("input_ids")
            read = inputs["inputs_embeds"] if read is None else read
            length = cache.get_seq_length() + read.shape[1]
            mask = torch.ones(len(read), length, dtype=torch.int64, device=read.device)
        if pads is not None:
            before, new = mask.split([mask.shape[1] - pads.shape[1], pads.shape[1]], 1)
            mask = torch.cat([before, new.masked_fill(pads.to(new.device), 0)], 1)
        return {**inputs, "attention_mask": mask}

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        refuse_right_pads(model_kwargs.get("attention_mask"))
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )


def recorded_pads(cache: Any) -> Tensor | None:
    """Which columns a cache knows to be pads, `[B, n]`; None for none."""
    holders = [cache, *getattr(cache, "layers", [])]
    found = (getattr(holder, "pads", None) for holder in holders)
    return next((pads for pads in found if pads is not None), None)


def refuse_right_pads(attention_mask: Any) -> None:
    """Raise ValueError for prompts that end in pads, where there is nothing to continue."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return
    rows = (attention_mask[:, -1:] == 0).flatten().nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"generate: expected a token in the last column of every prompt, got pads in rows "
            f"{rows}; pad at the left: tokenizer.padding_side = 'left'"
        )
