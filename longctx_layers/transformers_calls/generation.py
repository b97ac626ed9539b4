"""Make `generate` mark padding, so that finished rows of a batch do not corrupt their state.

After a row has ended, transformers keeps feeding it padding while the other rows continue. A
key-value cache can mask those columns in a later call. A recurrent state cannot undo what it has
read, so it must know that a column is padding when it reads it.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteriaList

from longctx_layers.transformers_calls.arguments import CACHE_NAME


class FinishedRows(StoppingCriteriaList):
    """Stopping criteria of one `generate` call that also record which new tokens are padding."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self._ended: Tensor | None = None
        self._columns: list[Tensor] = []
        self._any = False
        # transformers appends padding only if there is an end-of-text token. Without one, rows that
        # another criterion stops get further tokens, which are part of the returned text.
        self._appends_pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Return which rows end with these ids, `[B]` bool."""
        ends = super().__call__(input_ids, scores, **kwargs)
        if self._appends_pads and len(input_ids) > 1:  # a single row is never padded
            ended = torch.zeros_like(ends) if self._ended is None else self._ended
            self._columns.append(ended)
            self._any = self._any or bool(ended.any())
            self._ended = ended | ends
        return ends

    @property
    def pads(self) -> Tensor | None:
        """`[B, n]` bool over the n new tokens, True at padding of rows that had ended."""
        return torch.stack(self._columns, 1) if self._any else None


class GeneratesWithPads:
    """Mixin, placed before a transformers model, whose `generate` marks padding in the mask."""

    def _sample(
        self, input_ids: Tensor, *args: Any, stopping_criteria: StoppingCriteriaList, **kwargs: Any
    ) -> Any:
        # The only decoding method that keeps feeding rows after their end.
        finished = FinishedRows(stopping_criteria)
        return super()._sample(  # type: ignore[misc]
            input_ids, *args, stopping_criteria=finished, finished_rows=finished, **kwargs
        )

    # `generate` inspects the signature, so it must be that of the original.
    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare the inputs of a step as transformers does, with padding of ended rows masked."""
        finished = kwargs.pop("finished_rows", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        cache = inputs.get(CACHE_NAME)
        mask = inputs.get("attention_mask")
        pads = None if finished is None else finished.pads
        if cache is None or (pads is None and (mask is not None or recorded_pads(cache) is None)):
            return inputs
        if mask is None:  # transformers omits a mask of ones
            tokens = inputs.get("input_ids")
            tokens = inputs["inputs_embeds"] if tokens is None else tokens
            length = cache.get_seq_length() + tokens.shape[1]
            mask = torch.ones(len(tokens), length, dtype=torch.int64, device=tokens.device)
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
    """Return which columns a cache has read as padding, `[B, n]` bool; None if there are none."""
    holders = [cache, *getattr(cache, "layers", [])]
    records = (getattr(holder, "pads", None) for holder in holders)
    return next((pads for pads in records if pads is not None), None)


def refuse_right_pads(attention_mask: Any) -> None:
    """Raise ValueError for prompts that end with padding, which cannot be continued."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return
    rows = (attention_mask[:, -1:] == 0).flatten().nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"generate: expected every prompt to end with a token, got padding in the last column "
            f"of rows {rows}; pad on the left: tokenizer.padding_side = 'left'"
        )
