"""Reading long inputs in pieces, answering questions on the way, with and without the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.evals.tasks import Batch
from longctx_layers.layers.parameters import device_of
from longctx_layers.lm.block import Block
from longctx_layers.lm.loss import IGNORED_LABEL
from longctx_layers.lm.model import LongContextLM, ModelState
from longctx_layers.ops.checks import expect_positive

Progress = Callable[[int], object]  # is told how many more tokens have been read


class Answers(NamedTuple):
    """What a model said to the labels of a batch, one entry a label, `[n]`.

    Attributes:
        row, place: where the label stands in `[B, T]`.
        right: whether the likeliest of all tokens is the label.
        loss: of the label, in nats.
    """

    row: Tensor
    place: Tensor
    right: Tensor
    loss: Tensor


def reach(model: LongContextLM) -> int | None:
    """How many tokens back the windows and chunks of all layers, stacked, can see.

    L layers with windows of W reach L (W - 1) tokens back; longformer's and bigbird's global and
    random keys reach further. None if a layer sees everything.
    """
    total = 0
    for block in cast("list[Block]", list(model.blocks)):
        if block.mixer.reach is None:
            return None
        total += block.mixer.reach - 1
    return total


def memory(model: LongContextLM, state: ModelState) -> list[dict[str, Tensor]]:
    """The recurrent accumulators of each layer by name: h of dpassm, the two sums of blade."""
    return [
        {name: getattr(layer, name) for name, f in block.mixer.fields().items()
         if f.kind == "accumulator"}
        for block, layer in zip(cast("list[Block]", list(model.blocks)), state, strict=True)
    ]  # fmt: skip


def zero_memory(model: LongContextLM, state: ModelState) -> ModelState:
    """The state with nothing in its `memory`; keys, values and the convolutions' tails stay."""
    return tuple(
        layer._replace(**{name: torch.zeros_like(x) for name, x in parts.items()})
        for layer, parts in zip(state, memory(model, state), strict=True)
    )


def has_memory(model: LongContextLM) -> bool:
    """Whether any layer has recurrent state that `zero_memory` would empty."""
    parts = memory(model, model.init_state(1))
    return any(x.numel() > 0 for layer in parts for x in layer.values())


@torch.no_grad()
def read(
    model: LongContextLM,
    ids: Tensor,
    state: ModelState | None = None,
    *,
    tokens_at_once: int = 8192,
    progress: Progress | None = None,
) -> ModelState:
    """The state behind `[B, T]` ids, read in pieces: memory does not grow with T.

    Args:
        tokens_at_once: of how many tokens, over all rows, activations exist at once.
        progress: called with the number of tokens read since the last call.
    """
    expect_positive("tokens_at_once", tokens_at_once)
    state = model.init_state(len(ids)) if state is None else state
    for piece in ids.split(max(1, tokens_at_once // len(ids)), dim=1):
        _, state = model.backbone(piece, state)
        if progress is not None:
            progress(piece.numel())
    return state


@torch.no_grad()
def answer(
    model: LongContextLM,
    batch: Batch,
    *,
    probe: bool = False,
    tokens_at_once: int = 8192,
    progress: Progress | None = None,
) -> tuple[Answers, Answers | None]:
    """Answers to a batch; and those without memory, if that is probed.

    The probe empties the recurrent state at the first question; and once before, a `reach` earlier,
    so that the windows' keys and values at the question come from a model that had nothing to
    remember. What is still answered then is not the memory's doing.

    Args:
        model: the language model, in evaluation mode.
        batch: of a task.
        probe: whether to answer without the memory too; None comes back for a model that has none.
        tokens_at_once, progress: as for `read`.
    """
    device = device_of(model.embedding, model)
    ids, labels = batch.ids.to(device), batch.labels.to(device)
    options: dict[str, Any] = {"tokens_at_once": tokens_at_once, "progress": progress}
    asked, cut = batch.asked, max(0, batch.asked - (reach(model) or 0))
    before = read(model, ids[:, :cut], **options)
    told = read(model, ids[:, cut:asked], before, **options)
    answers = _answer(model, told, ids, labels, asked, **options)
    if not (probe and has_memory(model)):
        return answers, None
    options["progress"] = None  # these tokens have been counted
    empty = read(model, ids[:, cut:asked], zero_memory(model, before), **options)
    return answers, _answer(model, zero_memory(model, empty), ids, labels, asked, **options)


def _answer(
    model: LongContextLM,
    state: ModelState,
    ids: Tensor,
    labels: Tensor,
    asked: int,
    tokens_at_once: int,
    progress: Progress | None,
) -> Answers:
    """Answers to the labels from `asked` on; `state` is that behind the tokens before."""
    size = max(1, tokens_at_once // len(ids))
    found, offset = [], asked
    pieces = zip(ids[:, asked:].split(size, 1), labels[:, asked:].split(size, 1), strict=True)
    for piece, wanted in pieces:
        hidden, state = model.backbone(piece, state)
        row, place = (wanted != IGNORED_LABEL).nonzero(as_tuple=True)
        logits = model.project(hidden[row, place]).float()
        label = wanted[row, place]
        loss = F.cross_entropy(logits, label, reduction="none")
        right = logits.argmax(-1) == label
        found.append([x.cpu() for x in (row, place + offset, right, loss)])
        offset += piece.shape[1]
        if progress is not None:
            progress(piece.numel())
    return Answers(*(torch.cat(parts) for parts in zip(*found, strict=True)))
