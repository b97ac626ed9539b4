"""The loss of a call with labels, where rows have pads and several documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100

# What transformers' own loss for language models takes besides the logits, labels and vocab_size.
LOSS_ARGUMENTS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})


def next_token_loss(
    loss_function: Callable[..., Any],
    logits: Tensor,
    labels: Tensor,
    segment_ids: Tensor | None,
    vocab_size: int,
    **kwargs: Any,
) -> Tensor:
    """What `loss_function` gives for labels `[B, T]`, those of each document alone.

    Each token predicts the next one of its document, also across pads; a document's first token is
    no target, and neither are pads. Without any target the loss is 0, as are its gradients.

    Args:
        loss_function: called as transformers' `ForCausalLMLoss`.
        logits: `[B, T, vocab_size]`.
        labels: `[B, T]`, those of the columns themselves.
        segment_ids: `[B, T]`, equal in a document, negative at pads; None for one in each row.
        vocab_size: number of token ids.
        kwargs: other arguments of the loss function.

    Raises:
        ValueError: for labels outside the vocabulary (noticed on a CPU only).
    """
    ignored = kwargs.get("ignore_index", IGNORED_LABEL)
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = _next_labels(labels, segment_ids, ignored)
        labels = F.pad(targets[:, :-1], (1, 0), value=ignored)  # which loss functions shift back
    elif segment_ids is not None:
        kwargs["shift_labels"] = targets = targets.masked_fill(segment_ids < 0, ignored)
    # The mean over no label would be NaN.
    count = kwargs.pop("num_items_in_batch", None)
    count = (targets != ignored).sum() if count is None else torch.as_tensor(count)
    try:
        loss = loss_function(
            logits=logits,
            labels=labels,
            vocab_size=vocab_size,
            num_items_in_batch=count.clamp(min=1),
            **kwargs,
        )
    except IndexError as error:  # costs nothing, but is raised on the CPU only
        real = targets[targets != ignored]
        raise ValueError(
            f"labels: expected {ignored} or ids in [0, {vocab_size}), got ids from "
            f"{int(real.min())} to {int(real.max())}; use the tokenizer of this vocabulary"
        ) from error
    return cast("Tensor", loss)


def _next_labels(labels: Tensor, segment_ids: Tensor | None, ignored: int) -> Tensor:
    """The label of the next token of each token's document, `[B, T]`."""
    if segment_ids is None:
        return F.pad(labels[:, 1:], (0, 1), value=ignored)
    length = labels.shape[1]
    real = segment_ids >= 0
    column = torch.arange(length, device=labels.device)
    # The next real column: the least of those after it.
    following = torch.where(real, column, length).flip(1).cummin(1).values.flip(1)
    following = F.pad(following[:, 1:], (0, 1), value=length)
    index = following.clamp(max=length - 1)
    same = segment_ids.gather(1, index) == segment_ids
    counts = real & (following < length) & same
    return torch.where(counts, labels.gather(1, index), ignored)
