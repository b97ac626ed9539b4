"""Cross-entropy of a language model's head, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100


def token_losses(
    project: Callable[[Tensor], Tensor],
    cross_entropy: Callable[..., Tensor],
    hidden: Tensor,
    labels: Tensor,
    tokens_at_once: int | None,
) -> Tensor:
    """Loss of each token, without the logits of the whole sequence in memory at any time.

    Args:
        project: the head, hidden states `[..., D]` to logits `[..., vocab_size]`.
        cross_entropy: `torch.nn.functional.cross_entropy`, or a function with its signature.
        hidden: `[B, T, D]`.
        labels: `[B, T]` int64; `IGNORED_LABEL` gives a loss of 0.
        tokens_at_once: of how many tokens to compute the logits at once; they are recomputed in
            the backward pass. None calls the head once, with `[B, T, D]`.

    Returns:
        `[B, T]`, float32 or float64.

    Raises:
        ValueError: for labels outside the vocabulary (on the CPU; a GPU reports an assertion).
    """
    losses = partial(_losses, project, cross_entropy)
    if tokens_at_once is None:
        return losses(hidden, labels).view_as(labels)
    pieces = zip(
        hidden.flatten(0, 1).split(tokens_at_once),
        labels.flatten().split(tokens_at_once),
        strict=True,
    )
    recomputed = partial(
        checkpoint,
        losses,
        use_reentrant=False,
        preserve_rng_state=False,  # the head draws no random numbers
    )
    return torch.cat([recomputed(*piece) for piece in pieces]).view_as(labels)


def _losses(
    project: Callable[[Tensor], Tensor],
    cross_entropy: Callable[..., Tensor],
    hidden: Tensor,
    labels: Tensor,
) -> Tensor:
    logits = project(hidden).flatten(0, -2)
    labels = labels.flatten()
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    try:
        return cross_entropy(precise, labels, ignore_index=IGNORED_LABEL, reduction="none")
    except IndexError as error:  # costs nothing, but only the CPU raises it
        real = labels[labels != IGNORED_LABEL]
        raise ValueError(
            f"labels: expected {IGNORED_LABEL} or token ids in [0, {logits.shape[-1]}), got "
            f"{int(real.min())} to {int(real.max())}; use the tokenizer of this vocabulary"
        ) from error
