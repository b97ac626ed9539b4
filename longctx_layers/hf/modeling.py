"""`LongCtxForCausalLM`: the forward pass and `generate` of the transformers model."""

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
from longctx_layers.transformers_calls.arguments import CACHE_NAME, cache_argument, expect_known
from longctx_layers.transformers_calls.documents import DOCUMENTS, call_segments
from longctx_layers.transformers_calls.generation import GeneratesWithPads, refuse_right_pads


class LongCtxForCausalLM(  # type: ignore[misc]  # the signature of _sample differs
    GeneratesWithPads, LongCtxPreTrainedModel, GenerationMixin
):
    """A `LongContextLM` for transformers: `generate`, the Trainer, PEFT, accelerate, lm-eval.

    >>> from longctx_layers.hf import LongCtxConfig, LongCtxForCausalLM
    >>> model = LongCtxForCausalLM(LongCtxConfig(256, 64, 2, 4, block_type="dpassm"))
    >>> ids = torch.randint(256, (2, 10))
    >>> loss = model(ids, labels=ids).loss
    >>> model.eval().generate(ids, max_new_tokens=5, do_sample=False).shape
    torch.Size([2, 15])

    `self.model` is the `LongContextLM`, with its own streaming interface:
    `logits, state = model.model(ids, state, return_state=True)`.

    Args:
        config: the shape of the model.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register_as_language_model(cls.__name__, cls)  # all share one model type

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
        """Compute logits, and on request the loss, the cache and hidden states.

        Documents packed into one row are marked by segment_ids, seq_idx, cu_seq_lens_q or
        position_ids, whichever is given; `DataCollatorWithFlattening` makes the last three.

        Args:
            input_ids: `[B, T]` token ids.
            attention_mask: `[B, S]`, 0 at padding, which may be anywhere, and 1 elsewhere; for the
                whole sequence so far, or for these T tokens. It must agree with earlier calls about
                the columns that the cache has read.
            position_ids: `[B, T]`. A document starts wherever the positions of real tokens do not
                increase by one (padding between them may be counted or not). Otherwise they are not
                used: the layers count positions themselves.
            past_key_values: a `LongCtxCache`, which is updated in place.
            inputs_embeds: `[B, T, hidden_size]`, instead of input_ids.
            labels: `[B, T]` token ids, not shifted: those of input_ids; -100 is ignored.
            use_cache: whether to create a cache if none is given. By default `config.use_cache`,
                but False in training.
            output_attentions: must be false: the layers form no attention weights.
            output_hidden_states: whether to return the input of each block and the final output.
            return_dict: whether to return a `CausalLMOutputWithPast` instead of a tuple.
            logits_to_keep: compute logits for the last n columns only, or 0 for all; or the indices
                of the columns.
            segment_ids, seq_idx: `[B, T]` integers, same id within a document, negative at padding.
            cu_seq_lens_q: `[n + 1]`, cumulative document lengths of a single row.
            cache: the name of past_key_values in transformers 5.24 and later.
            kwargs: arguments of `self.loss_function`, e.g. `num_items_in_batch`. Any other name is
                an error, unless its value is None or False.

        Raises:
            ValueError, TypeError: for arguments that do not fit each other or the model.
        """
        config = self.config
        if others := kwargs.keys() - LOSS_ARGUMENTS:
            known = inspect.signature(self.loss_function).parameters
            expect_known(type(self).__name__, {name: kwargs[name] for name in others}, known)
        if output_attentions or (output_attentions is None and config.output_attentions):
            raise ValueError(
                "output_attentions: expected False, got True; leave it out: these layers never "
                "form the attention weights"
            )
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        tokens = self._tokens(input_ids, inputs_embeds)
        both_names = {"past_key_values": past_key_values, "cache": cache}
        cache = self._cache(cache_argument(type(self).__name__, both_names), use_cache)
        segments = call_segments(
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
        columns: Any = logits_to_keep
        if isinstance(columns, int):
            if columns < 0:
                raise ValueError(
                    f"logits_to_keep: expected at least 0, got {columns}; pass 0 for all columns"
                )
            columns = slice(-columns, None)
        hidden: list[Tensor] = []

        def compute_logits(tokens: Tensor) -> Tensor:
            x = self._embed(tokens)
            hidden.extend(self._read(x, segments, cache, keep_hidden=bool(output_hidden_states)))
            return self.model.project(hidden[-1][:, columns])

        # Inside the call of the inner model, for the sake of its hooks.
        logits: Tensor = self.model(tokens, within=compute_logits)
        loss = None
        if labels is not None:
            expect_shape("labels", labels, tuple(tokens.shape[:2]), "[B, T] of the call")
            if logits.shape[1] != tokens.shape[1]:
                raise ValueError(
                    f"labels: expected logits of all {tokens.shape[1]} columns to compute a loss, "
                    f"got {logits.shape[1]}; leave logits_to_keep out"
                )
            loss = next_token_loss(
                self.loss_function, logits, labels, segments, config.vocab_size, **kwargs
            )
        cache_output: dict[str, Any] = {CACHE_NAME: cache}
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            **cache_output,
        )
        as_dict = config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return the ids `[B, T]` or the embeddings `[B, T, hidden_size]`, whichever was passed."""
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"expected input_ids or inputs_embeds, got {got}; pass one of them")
        if input_ids is None:
            assert inputs_embeds is not None
            width = self.config.hidden_size
            expect_shape("inputs_embeds", inputs_embeds, (None, None, width), "[B, T, hidden_size]")
            return inputs_embeds
        expect_shape("input_ids", input_ids, (None, None), "[B, T]")
        return input_ids

    def _embed(self, tokens: Tensor) -> Tensor:
        if tokens.dim() == 3:
            return cast("Tensor", self.model.dropout(tokens))
        return self.model.embed(tokens, name="input_ids")

    def _cache(self, cache: Any, use_cache: bool | None) -> LongCtxCache | None:
        """Return the cache of a call, up to date: the given one, a new one or None."""
        if cache is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            return LongCtxCache() if use_cache else None
        cache = expect_cache(cache)
        if cache.unread is not None:
            _, state = self._run(cache.unread.x, cache.unread.state, cache.unread.segment_ids)
            cache.reread(state)
        if len(cache) not in (0, len(self.model.blocks)):
            raise ValueError(
                f"past_key_values: expected states of {len(self.model.blocks)} blocks, got "
                f"{len(cache)}; pass a cache of this model, or an empty LongCtxCache()"
            )
        return cache

    def _read(
        self, x: Tensor, segments: Tensor | None, cache: LongCtxCache | None, *, keep_hidden: bool
    ) -> list[Tensor]:
        """Run the blocks on embedded tokens `[B, T, D]`, from the cache on, and update the cache.

        Returns:
            The input of each block if `keep_hidden`, then the final output; each `[B, T, D]`.
        """
        if cache is None:
            hidden, _ = self._run(x, None, segments, keep_hidden=keep_hidden)
            return hidden
        parts = []
        for columns in cache.parts(x.shape[1]):
            part = x[:, columns]
            part_segments = None if segments is None else segments[:, columns]
            hidden, state = self._run(part, cache.state, part_segments, keep_hidden=keep_hidden)
            cache.record(part, part_segments, state)
            parts.append(hidden)
        if len(parts) == 1:
            return parts[0]
        return [torch.cat(same_depth, dim=1) for same_depth in zip(*parts, strict=True)]

    def _run(
        self, x: Tensor, state: Any, segment_ids: Tensor | None, *, keep_hidden: bool = False
    ) -> tuple[list[Tensor], Any]:
        """Run the blocks. Returns the input of each if `keep_hidden`, the output; the state."""
        model = self.model
        hidden: list[Tensor] = []
        run: Callable[..., Any] = nn.Module.__call__
        if model.gradient_checkpointing and torch.is_grad_enabled():
            run = getattr(model, "_gradient_checkpointing_func", None) or partial(
                checkpoint, use_reentrant=False
            )

        def call(block: nn.Module, x: Tensor, *rest: Any) -> Any:
            if keep_hidden:
                hidden.append(x)
            return run(block, x, *rest)

        output, state = model.run_blocks(x, state, segment_ids, call=call)
        return [*hidden, output], state

    # ---- Hooks of `generate`

    def _prepare_cache_for_generation(  # type: ignore[override]  # its arguments have changed
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
                    f"generate: expected one prompt per row, got {name} {list(ids.shape)}; pad the "
                    "prompts on the left, and pass attention_mask"
                )
        refuse_right_pads(model_kwargs.get("attention_mask"))
        cache = model_kwargs.get(CACHE_NAME)
        user_defined = cache is not None
        if not user_defined and generation_config.use_cache is False:
            return
        model_kwargs[CACHE_NAME] = expect_cache(cache) if user_defined else LongCtxCache()
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        model_kwargs[CACHE_NAME].begin_generation(
            user_defined=user_defined, assisted=assisted or generation_config.is_assistant
        )

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Make none: the mask marks padding, and the layers count positions themselves."""


def _register_as_language_model(key: str, cls: type) -> None:
    """Add a class to transformers' table of causal language models, which lists class names.

    With label smoothing, the Trainer shifts the labels only for classes in this table, and would
    otherwise train a model to repeat its input. Pipelines, model cards and lm-eval use the table
    too. `AutoModelForCausalLM.register` does not change it.
    """
    if cls.__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[key] = cls.__name__


_register_as_language_model(MODEL_TYPE, LongCtxForCausalLM)
