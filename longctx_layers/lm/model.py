"""A decoder-only language model over any of the layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longctx_layers.layers import build_layer
from longctx_layers.layers.init import draw_linear, draw_own, mark_drawn
from longctx_layers.layers.parameters import FULL_PRECISION, is_activation_dtype, weight_of
from longctx_layers.layers.plain_modules import works_by_token
from longctx_layers.lm import generation, pretrained
from longctx_layers.lm.block import Block
from longctx_layers.lm.config import ModelConfig
from longctx_layers.ops.checks import (
    expect_choice,
    expect_positive,
    expect_shape,
    expect_tensor,
)
from longctx_layers.weight_decay import no_weight_decay

IGNORED_LABEL = -100

ModelState = tuple[Any, ...]  # one state of its layer for each block


class LongContextLM(nn.Module):
    """Embedding, blocks, norm, head: a language model over any of the layers.

    `logits = model(ids)`, ids `[B, T]`, logits `[B, T, vocab_size]`. Its state is a tuple with the
    state of each block's layer, and what the layers promise (streaming is exact, segments are
    apart, pads are no-ops) holds for the model.

    Args:
        config: the shape of the model.
        device, dtype: of the parameters.

    Attributes:
        gradient_checkpointing: whether a block's activations are computed again in the backward
            pass instead of being kept. May be set at any time.
    """

    generate = generation.generate
    save_pretrained = pretrained.save_pretrained
    from_pretrained = classmethod(pretrained.from_pretrained)
    no_weight_decay = no_weight_decay  # by this name timm asks a model
    # Where a model of transformers contains this one, it reads the name here.
    _keep_in_fp32_modules_strict = FULL_PRECISION

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        common: dict[str, Any] = {"dropout": config.dropout, "norm_eps": config.norm_eps, **where}
        width = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, width, **where)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList()
        for i, name in enumerate(config.block_names):
            mixer = build_layer(name, width, config.n_heads, **config.layer_options(i), **where)
            self.blocks.append(Block(mixer, config.ffn_dim, **common))
        self.norm = nn.RMSNorm(width, config.norm_eps, **where)
        # Tied, the head is no parameter of its own: nothing to tie again after loading or sharding.
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(width, config.vocab_size, bias=False, **where)
        self.cross_entropy: Callable[..., Tensor] = F.cross_entropy
        for end in (self.embedding, self.head):
            if end is not None:
                end.first_scale = 1.0  # type: ignore[assignment]
        for projection in self._into_residual():
            projection.first_scale = (2 * len(self.blocks)) ** -0.5
        self._init_ends()

    def reset_parameters(self) -> None:
        """Draw all weights anew, e.g. after `to_empty`.

        Weights are normal with std 1 / sqrt(inputs), those of the embedding with 1 / sqrt(d_model);
        in the projections back into the residual stream, a sum over 2 n_layers branches, the std
        is divided by sqrt(2 n_layers). What else a layer has is the layer's affair.
        """
        for block in self._blocks():
            block.reset_parameters()
        self.norm.reset_parameters()
        self._init_ends()

    def _init_ends(self) -> None:
        # Both ends of the model and of each branch; the rest has initialised itself.
        for end in (self.embedding, self.head):
            if end is not None:
                draw_own(end)
        for projection in self._into_residual():
            draw_linear(projection)
        mark_drawn(self)

    def _into_residual(self) -> list[nn.Linear]:
        """The projections whose outputs are summed in the residual stream."""
        projections: list[nn.Linear] = []
        for block in self._blocks():
            name = block.mixer.output_projection
            if name is not None:
                projections.append(getattr(block.mixer, name))
            projections.append(block.ffn.down_proj)
        return projections

    def forward(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        return_state: bool = False,
        last_only: bool = False,
    ) -> Any:
        """Logits of the next token.

        Args:
            ids: `[B, T]` integers, token ids; at pads any valid id.
            state: what an earlier call returned, or `init_state`; never changed. None to begin.
            segment_ids: `[B, T]` integers: tokens see only their own segment, negative ids are
                pads, whose logits mean nothing. None for one segment.
            return_state: whether to return the state behind the call as well.
            last_only: whether to compute the logits of the last column only, `[B, 1, vocab_size]`.

        Returns:
            Logits `[B, T, vocab_size]`, or `(logits, state)`.

        Raises:
            ValueError, TypeError: for shapes, dtypes, ids or states that do not fit.
        """
        hidden, state = self.backbone(ids, state, segment_ids=segment_ids)
        logits = self.project(hidden[:, -1:] if last_only else hidden)
        return (logits, state) if return_state else logits

    def backbone(
        self, ids: Tensor, state: ModelState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """What the head gets, `[B, T, D]`, and the new state; arguments as for the model."""
        if state is not None:
            given: Any = state
            found = len(given) if isinstance(given, (tuple, list)) else type(given).__name__
            if found != len(self.blocks):
                raise ValueError(
                    f"state: expected one for each of {len(self.blocks)} blocks, got {found}; "
                    "pass what this model returned"
                )
        return self.run_blocks(self.embed(ids), state, segment_ids)

    def embed(self, ids: Tensor, *, name: str = "ids") -> Tensor:
        """What the first block gets, `[B, T, D]`; `name` is what errors call the ids."""
        expect_shape(name, ids, (None, None), "[B, T]")
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected int64 or int32, got {ids.dtype}; use .long()")
        try:
            return cast(Tensor, self.dropout(self.embedding(ids)))
        except IndexError as error:  # costs nothing, but is raised on the CPU only
            raise ValueError(
                f"{name}: expected token ids in [0, {self.config.vocab_size}), got ids from "
                f"{int(ids.min())} to {int(ids.max())}; use the tokenizer of this vocabulary"
            ) from error

    def run_blocks(
        self,
        x: Tensor,
        state: ModelState | None = None,
        segment_ids: Tensor | None = None,
        *,
        call: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, ModelState]:
        """What the head gets for embedded tokens x `[B, T, D]`, and the new state.

        Args:
            call: called as `call(block, x, state, segment_ids)`, to return what the block does; by
                default the block itself, checkpointed where `gradient_checkpointing` says so.
        """
        if call is None:
            recompute = self.gradient_checkpointing and torch.is_grad_enabled()
            call = partial(checkpoint, use_reentrant=False) if recompute else nn.Module.__call__
        states = []
        for i, block in enumerate(self.blocks):
            x, after = call(block, x, None if state is None else state[i], segment_ids)
            states.append(after)
        return self.norm(x), tuple(states)

    def project(self, hidden: Tensor) -> Tensor:
        """The head: `[..., D]` to logits `[..., vocab_size]`."""
        if self.head is not None:
            return cast(Tensor, self.head(hidden))
        weight = weight_of(self.embedding)
        if weight is None or not is_activation_dtype(weight.dtype):
            found = type(self.embedding).__name__ if weight is None else weight.dtype
            raise TypeError(
                "embedding: expected a floating-point weight, which a tied head multiplies by, got "
                f"{found}; leave the embedding as it is, or build the model with "
                "tie_embeddings=False"
            )
        return F.linear(hidden, weight)

    def loss(
        self,
        ids: Tensor,
        labels: Tensor,
        state: ModelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        return_state: bool = False,
        tokens_at_once: int = 1024,
    ) -> Any:
        """Cross-entropy of the labels, without the logits of the whole sequence at any time.

        The logits of a few tokens at a time are computed, and again in the backward pass. Where
        something could notice (hooks on the head, another module in its place), the head is called
        once with whole rows instead.

        Args:
            ids, state, segment_ids: as for the model. For truncated back-propagation pass the
                state on through `detach_state`.
            labels: `[B, T]` integers; `labels[t]` is the token to predict at t (already shifted).
                -100 is ignored, and so are pads.
            reduction: `"mean"` over the labels that count (0 without any), `"sum"`, or `"none"`.
            return_state: whether to return the state behind the call as well.
            tokens_at_once: of how many tokens logits exist at once.

        Returns:
            The loss, a scalar, or `[B, T]` with 0 at ignored labels for `"none"`; float32, or
            float64 for a float64 model. With `return_state`, `(loss, state)`.

        Raises:
            ValueError, TypeError: for shapes, dtypes or options that do not fit.
        """
        expect_choice("reduction", reduction, ("mean", "sum", "none"))
        expect_positive("tokens_at_once", tokens_at_once)
        expect_tensor("ids", ids, "[B, T]")
        expect_shape("labels", labels, tuple(ids.shape), "the shape of ids")
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels: expected int64, got {labels.dtype}; convert with .long()")
        hidden, state = self.backbone(ids, state, segment_ids=segment_ids)
        labels = labels.long()
        if segment_ids is not None:
            labels = labels.masked_fill(segment_ids < 0, IGNORED_LABEL)
        if self.head is not None and not works_by_token(self.head):
            pieces = [self._token_losses(hidden, labels)]
        else:
            pieces = self._losses_in_pieces(hidden, labels, tokens_at_once)
        loss = torch.cat(pieces).view_as(labels)
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            loss = loss / (labels != IGNORED_LABEL).sum().clamp(min=1)
        return (loss, state) if return_state else loss

    def _losses_in_pieces(self, hidden: Tensor, labels: Tensor, size: int) -> list[Tensor]:
        rows = zip(hidden.flatten(0, 1).split(size), labels.flatten().split(size), strict=True)
        # No random state to preserve: the head draws nothing.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        return [checkpoint(self._token_losses, h, y, **options) for h, y in rows]

    def _token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits, labels = self.project(hidden).flatten(0, -2), labels.flatten()
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        try:
            return self.cross_entropy(precise, labels, ignore_index=IGNORED_LABEL, reduction="none")
        except IndexError as error:  # as for ids
            real = labels[labels != IGNORED_LABEL]
            raise ValueError(
                f"labels: expected {IGNORED_LABEL} or ids in [0, {self.config.vocab_size}), got "
                f"{int(real.min())} to {int(real.max())}; use the tokenizer of this vocabulary"
            ) from error

    def init_state(self, batch_size: int) -> ModelState:
        """An empty state of a batch: the same as passing none."""
        return tuple(block.mixer.init_state(batch_size) for block in self._blocks())

    def state_size(self, length: int) -> int:
        """Bytes of one sequence's state after `length` tokens: the sum over the layers."""
        return sum(block.mixer.state_size(length) for block in self._blocks())

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters by part; a tied head has none of its own."""
        counts = dict.fromkeys(("embedding", "mixers", "ffn", "norms", "head"), 0)
        for name, parameter in self.named_parameters():
            part = name.split(".")[2 if name.startswith("blocks.") else 0]
            part = {"mixer": "mixers"}.get(part, "norms" if part.endswith("norm") else part)
            counts[part] += parameter.numel()
        return counts

    def describe(self) -> str:
        """The model in three lines: its pattern, its sizes with the FFN's width, its parameters."""
        c, counts = self.config, self.parameter_counts()
        parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
        return (
            f"{c.n_layers} layers of {' + '.join(c.pattern)}\n"
            f"d_model {c.d_model}, n_heads {c.n_heads}, ffn_dim {c.ffn_dim}, "
            f"vocab_size {c.vocab_size:,} ({'tied' if c.tie_embeddings else 'untied'})\n"
            f"{sum(counts.values()):,} parameters: {parts}"
        )

    def extra_repr(self) -> str:
        """`describe`, as the first lines of the module's repr."""
        return self.describe()

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))
