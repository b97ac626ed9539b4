"""`LongContextLM` as a causal language model of transformers: its call, and `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longctx_layers.hf.cache import (
    LongCtxCache,
    check_cache_implementation,
    expect_cache,
)
from longctx_layers.hf.loss import LOSS_ARGUMENTS, next_token_loss
from longctx_layers.hf.pretrained import LongCtxPreTrainedModel
from longctx_layers.lm.pretrained import MODEL_TYPE
from longctx_layers.ops.checks import expect_shape
from longctx_layers.transformers_calls.arguments import CACHE_NAME, expect_known, given_cache
from longctx_layers.transformers_calls.documents import DOCUMENTS, call_segments
from longctx_layers.transformers_calls.generation import GeneratesWithPads, refuse_right_pads


class LongCtxForCausalLM(  # type: ignore[misc]  # _sample takes what transformers' own takes
    GeneratesWithPads, LongCtxPreTrainedModel, GenerationMixin
):
    """A `LongContextLM` that transformers, PEFT, accelerate and lm-eval can work with.

    The model itself is `self.model`: `logits, state = hf.model(ids, state, return_state=True)`
    streams as ever.

    Args:
        config: the shape of the model.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register_as_language_model(cls.__name__, cls)  # they share the model type

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LongCtxCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        segment_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: LongCtxCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, and what was asked for besides.

        Args:
            input_ids: `[B, T]` token ids.
            attention_mask: `[B, S]`, 0 at pads, which may stand anywhere, and 1 elsewhere; of the
                whole sequence so far, or of these T tokens. For columns that the cache has read it
                must say what it said then.
            position_ids: `[B, T]`: a document begins where those of real tokens do not go up by
                one, pads between them counted or not. The layers find positions themselves, and a
                document's first value says nothing.
            past_key_values: a `LongCtxCache`, which moves on by T tokens.
            inputs_embeds: `[B, T, hidden_size]`, in place of input_ids.
            labels: `[B, T]` token ids, those of input_ids; -100 is ignored.
            use_cache: whether to make a cache where none is given; `config.use_cache` by default,
                and False in training.
            output_attentions: must be false: the layers form no attention weights.
            output_hidden_states: whether to return the inputs of all blocks, and the last output.
            return_dict: whether to return a `CausalLMOutputWithPast`, or else its tuple.
            logits_to_keep: compute the logits of the last n columns only; 0 for all of them. Or
                the indices of the columns.
            segment_ids, seq_idx: `[B, T]` integers, equal in a document, negative at pads.
            cu_seq_lens_q: `[n + 1]`, where the documents of one row begin and end. These three and
                position_ids are what `DataCollatorWithFlattening` can make; one will do.
            cache: past_key_values by its name in transformers 5.24 and later.
            kwargs: for the loss, the arguments of `self.loss_function`, e.g. `num_items_in_batch`.
                Any other name is an error, unless its value is None or False.

        Raises:
            ValueError, TypeError: for arguments that do not fit each other or the model.
        """
        config = self.config
        given = {"past_key_values": past_key_values, "cache": cache}
        if others := kwargs.keys() - LOSS_ARGUMENTS:
            known = inspect.signature(self.loss_function).parameters
            expect_known(type(self).__name__, {name: kwargs[name] for name in others}, known)
        if output_attentions or (output_attentions is None and config.output_attentions):
            raise ValueError(
                "output_attentions: expected False, got True; these layers never form the "
                "attention weights: leave it out"
            )
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        tokens = self._tokens(input_ids, inputs_embeds)
        cache = self._cache(given_cache(type(self).__name__, given), use_cache)
        ids = call_segments(
            (tokens.shape[0], tokens.shape[1]),
            None if cache is None else cache.held_segment(),
            0 if cache is None else cache.get_seq_length(),
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            seq_idx=seq_idx,
            cu_seq_lens=cu_seq_lens_q,
            pads=None if cache is None else cache.pads,
        )
        kept: Any = logits_to_keep
        if isinstance(kept, int):
            if kept < 0:
                raise ValueError(
                    f"logits_to_keep: expected at least 0, got {kept}; pass 0 for all columns"
                )
            kept = slice(-kept, None)
        run = partial(self._run, keep_hidden=bool(output_hidden_states))
        hidden: list[Tensor] = []

        def logits_of(tokens: Tensor) -> Tensor:
            x = self._embedded(tokens)
            hidden.extend(run(x, None, ids)[0] if cache is None else cache.advance(run, x, ids))
            return self.model.project(hidden[-1][:, kept])

        logits: Tensor = self.model(tokens, within=logits_of)
        loss = None
        if labels is not None:
            expect_shape("labels", labels, tuple(tokens.shape[:2]), "[B, T] of the call")
            if logits.shape[1] != tokens.shape[1]:
                raise ValueError(
                    f"labels: expected logits of all {tokens.shape[1]} columns for a loss, got "
                    f"{logits.shape[1]}; leave logits_to_keep out"
                )
            loss = next_token_loss(
                self.loss_function, logits, labels, ids, config.vocab_size, **kwargs
            )
        named: dict[str, Any] = {CACHE_NAME: cache}
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            **named,
        )
        as_dict = config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """What was given, ids `[B, T]` or their embeddings `[B, T, hidden_size]`."""
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"expected input_ids or inputs_embeds, got {given}; pass one of them")
        if input_ids is None:
            assert inputs_embeds is not None
            width = self.config.hidden_size
            expect_shape("inputs_embeds", inputs_embeds, (None, None, width), "[B, T, hidden_size]")
            return inputs_embeds
        expect_shape("input_ids", input_ids, (None, None), "[B, T]")
        return input_ids

    def _embedded(self, tokens: Tensor) -> Tensor:
        if tokens.dim() == 3:
            return cast("Tensor", self.model.dropout(tokens))
        return self.model.embed(tokens, name="input_ids")

    def _cache(self, given: Any, use_cache: bool | None) -> LongCtxCache | None:
        if given is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            return LongCtxCache() if use_cache else None
        cache = expect_cache(given)
        cache.settle(self._run)
        if len(cache) not in (0, len(self.model.blocks)):
            raise ValueError(
                f"past_key_values: expected states of {len(self.model.blocks)} blocks, got "
                f"{len(cache)}; pass a cache of this model, or an empty LongCtxCache()"
            )
        return cache

    def _run(
        self, x: Tensor, state: Any, segment_ids: Tensor | None, keep_hidden: bool = False
    ) -> tuple[list[Tensor], Any]:
        """What goes into each block, if kept, and what comes out last; and the new state."""
        model, hidden = self.model, []
        run: Callable[..., Any] = nn.Module.__call__
        if model.gradient_checkpointing and torch.is_grad_enabled():
            run = getattr(model, "_gradient_checkpointing_func", None) or partial(
                checkpoint, use_reentrant=False
            )

        def call(block: nn.Module, x: Tensor, *rest: Any) -> Any:
            if keep_hidden:
                hidden.append(x)
            return run(block, x, *rest)

        last, after = model.run_blocks(x, state, segment_ids, call=call)
        return [*hidden, last], after

    # ---- What generate asks of a model

    def _prepare_cache_for_generation(  # type: ignore[override]  # what else it gets has changed
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        check_cache_implementation(
            generation_config.cache_implementation,
            constant=self.model.state_size(1) == self.model.state_size(0),
        )
        for name in DOCUMENTS:
            if (ids := model_kwargs.get(name)) is not None:
                raise ValueError(
                    f"generate: expected one prompt a row, got {name} {list(ids.shape)}; pad the "
                    "prompts at the left, and pass attention_mask"
                )
        refuse_right_pads(model_kwargs.get("attention_mask"))
        cache = model_kwargs.get(CACHE_NAME)
        given = cache is not None
        if not given and generation_config.use_cache is False:
            return
        model_kwargs[CACHE_NAME] = expect_cache(cache) if given else LongCtxCache()
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        model_kwargs[CACHE_NAME].begin_generation(
            given=given, assisted=assisted or generation_config.is_assistant
        )

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: the mask says where the pads are, and the layers find positions themselves."""


def _register_as_language_model(key: str, cls: type) -> None:
    """Make transformers treat a class as a causal language model wherever it goes by class names.

    Its Trainer shifts the labels for label smoothing only for these names, and would otherwise
    train a model to repeat its input. Pipelines, model cards and lm-eval look the names up too.
    `AutoModelForCausalLM.register` leaves the table as it is.
    """
    if cls.__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[key] = cls.__name__


_register_as_language_model(MODEL_TYPE, LongCtxForCausalLM)
