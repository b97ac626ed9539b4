"""A decoder-only language model over any of the layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longctx_layers.layers import Layer, build_layer
from longctx_layers.layers.init import draw_linear, draw_own, mark_drawn
from longctx_layers.layers.parameters import (
    FULL_PRECISION,
    device_of,
    is_activation_dtype,
    weight_of,
)
from longctx_layers.layers.plain_modules import works_by_token
from longctx_layers.lm import generation, pretrained
from longctx_layers.lm.block import Block
from longctx_layers.lm.config import ModelConfig
from longctx_layers.lm.loss import IGNORED_LABEL, token_losses
from longctx_layers.ops.checks import (
    expect_choice,
    expect_positive,
    expect_shape,
    expect_tensor,
)
from longctx_layers.weight_decay import no_weight_decay

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

ModelState = tuple[Any, ...]  # the state of each block's layer


class LongContextLM(nn.Module):
    """A language model to train, stream and generate with: embedding, blocks, norm and head.

    `logits = model(ids)`, ids `[B, T]`, logits `[B, T, vocab_size]`. Its state is a tuple of the
    states of the blocks' layers, and the layers' promises hold for the whole model: streaming is
    exact, segments do not see each other, padding has no effect. `create_model` builds one of a
    named size.

    Args:
        config: the shape of the model.
        device, dtype: of the parameters.

    Attributes:
        gradient_checkpointing: whether a block's activations are recomputed in the backward pass
            instead of being kept. May be set at any time.

    >>> model = create_model(vocab_size=256, num_params="tiny", block_type="dpassm")
    >>> logits, state = model(torch.tensor([[72, 101]]), return_state=True)
    >>> logits = model(torch.tensor([[108]]), state)  # continues after the first two tokens
    """

    no_weight_decay = no_weight_decay  # timm asks a model by this name
    # A transformers model that contains this one reads the name here.
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
        # A tied head is no parameter: there is nothing to tie again after loading or sharding.
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
        """Initialise all weights, e.g. after `to_empty`.

        Weights are normal with std 1 / sqrt(inputs), those of the embedding with 1 / sqrt(d_model).
        In the projections back into the residual stream, which sums 2 n_layers branches, the std
        is divided by sqrt(2 n_layers). Each layer initialises its other parameters itself.
        """
        for block in self._blocks():
            block.reset_parameters()
        self.norm.reset_parameters()
        self._init_ends()

    def _init_ends(self) -> None:
        # Both ends of the model and of each branch; the other modules initialise themselves.
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

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and token ids are expected."""
        return device_of(self.embedding, self)

    @overload
    def forward(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        return_state: Literal[False] = False,
        last_only: bool = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        return_state: Literal[True],
        last_only: bool = False,
    ) -> tuple[Tensor, ModelState]: ...

    def forward(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        return_state: bool = False,
        last_only: bool = False,
    ) -> Any:
        """Compute the logits of the next token at each position.

        Args:
            ids: `[B, T]` integers, token ids; at padding any valid id.
            state: what an earlier call returned, or `init_state`; it is not modified. None to
                begin a sequence.
            segment_ids: `[B, T]` integers: tokens see only their own segment. Negative ids mark
                padding, whose logits are meaningless. None for one segment.
            return_state: whether to return the state after the call as well.
            last_only: whether to compute the logits of the last position only,
                `[B, 1, vocab_size]`.

        Returns:
            Logits `[B, T, vocab_size]`, or `(logits, state)`.

        Raises:
            ValueError, TypeError: for shapes, dtypes, ids or states that do not fit.
        """
        hidden, state = self.backbone(ids, state, segment_ids=segment_ids)
        logits = self.project(hidden[:, -1:] if last_only else hidden)
        return (logits, state) if return_state else logits

    def advance(
        self, ids: Tensor, state: ModelState | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        """Read `[B, T]` ids: logits `[B, vocab_size]` of the next token, and the new state."""
        logits, state = self(ids, state, segment_ids=segment_ids, return_state=True, last_only=True)
        return logits[:, -1], state

    def generate(
        self,
        prompt: Tensor | Sequence[Tensor | Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | Collection[int] | None = None,
        generator: torch.Generator | None = None,
        prefill_size: int = 1024,
    ) -> Any:
        """Continue prompts, in constant memory: see `longctx_layers.lm.generation.generate`."""
        return generation.generate(
            self,
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos=eos,
            generator=generator,
            prefill_size=prefill_size,
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config and weights to a folder: see `longctx_layers.lm.pretrained.save`."""
        pretrained.save(directory, self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load what `save_pretrained` wrote: see `longctx_layers.lm.pretrained.load`."""
        build = partial(cls, device="meta")
        return pretrained.load(directory, build, device=device, dtype=dtype)

    def backbone(
        self, ids: Tensor, state: ModelState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Run embedding, blocks and final norm.

        Args:
            ids, state, segment_ids: as for the model.

        Returns:
            Hidden states `[B, T, D]` for the head, and the new state.
        """
        if state is not None:
            untrusted: Any = state
            is_sequence = isinstance(untrusted, (tuple, list))
            count = len(untrusted) if is_sequence else type(untrusted).__name__
            if count != len(self.blocks):
                raise ValueError(
                    f"state: expected one for each of {len(self.blocks)} blocks, got {count}; "
                    "pass what this model returned"
                )
        return self.run_blocks(self.embed(ids), state, segment_ids)

    def embed(self, ids: Tensor, *, name: str = "ids") -> Tensor:
        """Embed token ids `[B, T]` as `[B, T, D]`. `name` is the argument's name in errors."""
        expect_shape(name, ids, (None, None), "[B, T]")
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected int64 or int32, got {ids.dtype}; use .long()")
        try:
            return cast(Tensor, self.dropout(self.embedding(ids)))
        except IndexError as error:  # costs nothing, but only the CPU raises it
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
        """Run blocks and final norm on embedded tokens.

        Args:
            x: `[B, T, D]`.
            state, segment_ids: as for the model.
            call: how to run a block, `call(block, x, state, segment_ids)`; it returns what the
                block does. By default the block itself, recomputed in the backward pass if
                `gradient_checkpointing` is set.

        Returns:
            Hidden states `[B, T, D]` for the head, and the new state.
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
        """Apply the head: `[..., D]` to logits `[..., vocab_size]`."""
        if self.head is not None:
            return cast(Tensor, self.head(hidden))
        weight = weight_of(self.embedding)
        if weight is None or not is_activation_dtype(weight.dtype):
            found = type(self.embedding).__name__ if weight is None else weight.dtype
            raise TypeError(
                "embedding: expected a floating-point weight, since a tied head multiplies by it, "
                f"got {found}; do not quantise the embedding, or build the model with "
                "tie_embeddings=False"
            )
        return F.linear(hidden, weight)

    @overload
    def loss(
        self,
        ids: Tensor,
        labels: Tensor,
        state: ModelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        return_state: Literal[False] = False,
        tokens_at_once: int = 1024,
    ) -> Tensor: ...

    @overload
    def loss(
        self,
        ids: Tensor,
        labels: Tensor,
        state: ModelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        return_state: Literal[True],
        tokens_at_once: int = 1024,
    ) -> tuple[Tensor, ModelState]: ...

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
        """Compute the cross-entropy of labels, a few tokens' logits at a time.

        The logits are recomputed in the backward pass. If a module or hook in the head's place
        could tell pieces from whole rows, the head is called once, with whole rows.

        Args:
            ids, state, segment_ids: as for the model. For truncated back-propagation pass the
                state through `detach_state`.
            labels: `[B, T]` integers; `labels[:, t]` is the token to predict at position t
                (already shifted). -100 is ignored, and so is padding.
            reduction: `"mean"` over the labels that count (0 if none does), `"sum"`, or `"none"`.
            return_state: whether to return the state after the call as well.
            tokens_at_once: how many tokens' logits to hold at once.

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
        whole = self.head is not None and not works_by_token(self.head)
        loss = token_losses(
            self.project, self.cross_entropy, hidden, labels, None if whole else tokens_at_once
        )
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            loss = loss / (labels != IGNORED_LABEL).sum().clamp(min=1)
        return (loss, state) if return_state else loss

    def mixers(self) -> list[Layer[Any]]:
        """The layer of each block, from the first to the last."""
        return [block.mixer for block in self._blocks()]

    def init_state(self, batch_size: int) -> ModelState:
        """The empty state of a batch: the same as passing none."""
        return tuple(block.mixer.init_state(batch_size) for block in self._blocks())

    def state_size(self, length: int) -> int:
        """Bytes of one sequence's state after `length` tokens, summed over the layers."""
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
        """The model in three lines: its pattern, its widths, its parameters."""
        c, counts = self.config, self.parameter_counts()
        parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
        return (
            f"{c.n_layers} layers of {' + '.join(c.pattern)}\n"
            f"d_model {c.d_model}, n_heads {c.n_heads}, ffn_dim {c.ffn_dim}, "
            f"vocab_size {c.vocab_size:,} ({'tied' if c.tie_embeddings else 'untied'})\n"
            f"{sum(counts.values()):,} parameters: {parts}"
        )

    def extra_repr(self) -> str:
        """`describe`, in the module's repr."""
        return self.describe()

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))
