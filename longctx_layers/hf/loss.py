"""The next-token loss of a transformers call, for rows with padding and several documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100

# Arguments of transformers' language-model loss other than logits, labels and vocab_size.
LOSS_ARGUMENTS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})


def next_token_loss(
    loss_function: Callable[..., Any],
    logits: Tensor,
    labels: Tensor,
    segment_ids: Tensor | None,
    vocab_size: int,
    **kwargs: Any,
) -> Tensor:
    """Apply `loss_function` to next-token prediction within each document.

    Each token predicts the next token of its document, even if padding lies between them. Padding
    and the first token of a document are never targets. Without any target, the loss and its
    gradients are 0.

    Args:
        loss_function: called like transformers' `ForCausalLMLoss`.
        logits: `[B, T, vocab_size]`.
        labels: `[B, T]`, not shifted: the label of each column itself.
        segment_ids: `[B, T]`, same id within a document, negative at padding; None for one document
            per row.
        vocab_size: number of token ids.
        kwargs: other arguments of the loss function.

    Raises:
        ValueError: for labels outside the vocabulary (detected on a CPU only).
    """
    ignored = kwargs.get("ignore_index", IGNORED_LABEL)
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = _next_labels(labels, segment_ids, ignored)
        labels = F.pad(targets[:, :-1], (1, 0), value=ignored)  # loss functions shift labels back
    elif segment_ids is not None:
        kwargs["shift_labels"] = targets = targets.masked_fill(segment_ids < 0, ignored)
    # The mean over zero labels would be NaN.
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
    except IndexError as error:  # a free check, but only the CPU raises it
        ids = targets[targets != ignored]
        raise ValueError(
            f"labels: expected {ignored} or ids in [0, {vocab_size}), got ids from "
            f"{int(ids.min())} to {int(ids.max())}; use the tokenizer that the model was made for"
        ) from error
    return cast("Tensor", loss)


def _next_labels(labels: Tensor, segment_ids: Tensor | None, ignored: int) -> Tensor:
    """For each token, the label of the next token in the same document, `[B, T]`."""
    if segment_ids is None:
        return F.pad(labels[:, 1:], (0, 1), value=ignored)
    length = labels.shape[1]
    real = segment_ids >= 0
    column = torch.arange(length, device=labels.device)
    # The next column that holds a token: the smallest of the later ones.
    following = torch.where(real, column, length).flip(1).cummin(1).values.flip(1)
    following = F.pad(following[:, 1:], (0, 1), value=length)
    index = following.clamp(max=length - 1)
    same = segment_ids.gather(1, index) == segment_ids
    counts = real & (following < length) & same
    return torch.where(counts, labels.gather(1, index), ignored)
