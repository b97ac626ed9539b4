"""Models of a named size: equal numbers of parameters, whatever their blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch

from longctx_layers.lm.config import ModelConfig
from longctx_layers.lm.model import LongContextLM
from longctx_layers.ops.checks import expect_choice

TOLERANCE = 0.01
FFN_MULTIPLE = 8  # for tensor cores


class Size(NamedTuple):
    """A named size: the number of parameters, and the part of the shape that is fixed."""

    parameters: int
    d_model: int
    n_layers: int
    n_heads: int


SIZES = {
    "tiny": Size(1_000_000, 128, 4, 4),
    "3m": Size(3_000_000, 192, 6, 6),
    "150m": Size(150_000_000, 768, 12, 12),
    "250m": Size(250_000_000, 1024, 16, 16),
    "350m": Size(350_000_000, 1280, 20, 20),
}


def create_model(
    vocab_size: int,
    num_params: str = "150m",
    block_type: str | None = None,
    block_kwargs: Mapping[str, Any] | None = None,
    *,
    pattern: Sequence[str] | None = None,
    ffn_dim: int | None = None,
    tie_embeddings: bool = True,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LongContextLM:
    """Build a language model of a named size, to compare layers at equal size.

    Width, depth and heads come from `SIZES`. The feed-forward width is chosen so that the whole
    model has the named number of parameters within 1 %, for every layer and vocabulary.
    `model.describe()` shows the result.

    >>> model = create_model(vocab_size=256, num_params="tiny", block_type="blade")
    >>> round(sum(p.numel() for p in model.parameters()), -5)
    1000000

    Args:
        vocab_size: number of token ids.
        num_params: `"tiny"` (1 M, for tests), `"3m"` (for experiments on a CPU), `"150m"`,
            `"250m"` or `"350m"`.
        block_type: name in `LAYERS` of the layer in every block; `"dpassm"` by default.
        block_kwargs: options of the layer; with a pattern of several names, options by name,
            `{"dpassm": {"window_size": 128}}`.
        pattern: names of layers repeated over depth, for hybrids, instead of block_type.
        ffn_dim: the feed-forward width, whatever number of parameters results.
        tie_embeddings: whether the head uses the embedding's weight, counted once.
        dropout: see `ModelConfig`.
        gradient_checkpointing: see `LongContextLM`.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: for unknown names or options, or if no feed-forward width gives the
            number of parameters.
    """
    expect_choice("num_params", num_params, tuple(SIZES))
    if block_type is not None and pattern is not None:
        raise ValueError(
            f"create_model: expected block_type or pattern, got both, {block_type!r} and "
            f"{pattern!r}; pass one of them"
        )
    size = SIZES[num_params]
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=size.d_model,
        n_layers=size.n_layers,
        n_heads=size.n_heads,
        ffn_dim=FFN_MULTIPLE if ffn_dim is None else ffn_dim,
        pattern=cast("Any", (block_type or "dpassm") if pattern is None else pattern),
        block_kwargs={} if block_kwargs is None else block_kwargs,
        tie_embeddings=tie_embeddings,
        dropout=dropout,
    )
    if ffn_dim is None:
        config = replace(config, ffn_dim=_solve_ffn_dim(config, size.parameters))
    model = LongContextLM(config, device=device, dtype=dtype)
    model.gradient_checkpointing = gradient_checkpointing
    return model


def _solve_ffn_dim(config: ModelConfig, target: int) -> int:
    """The multiple of `FFN_MULTIPLE` that brings the model closest to its budget."""
    # Counted on a real model on the meta device: there is no formula that could become wrong.
    counts = LongContextLM(config, device="meta").parameter_counts()
    step = counts["ffn"] * FFN_MULTIPLE // config.ffn_dim
    fixed = sum(counts.values()) - counts["ffn"]
    steps = max(round((target - fixed) / step), 1)
    found = fixed + steps * step
    if abs(found - target) > TOLERANCE * target:
        rest = ", ".join(f"{part} {n:,}" for part, n in counts.items() if n and part != "ffn")
        raise ValueError(
            f"create_model: expected {target:,} parameters within {TOLERANCE:.0%}, got at best "
            f"{found:,}: the rest has {fixed:,} ({rest}), and the feed-forward layers come in "
            f"steps of {step:,}; choose a larger size or a smaller vocabulary, or pass ffn_dim"
        )
    return steps * FFN_MULTIPLE
