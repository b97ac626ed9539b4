"""Ask a model about a long input, with its recurrent state and with that state cleared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.evals.tasks.base import Batch
from longctx_layers.layers.parameters import device_of
from longctx_layers.lm.block import Block
from longctx_layers.lm.loss import IGNORED_LABEL
from longctx_layers.lm.model import LongContextLM, ModelState
from longctx_layers.ops.checks import expect_positive

Progress = Callable[[int], object]  # called with the number of tokens read since the last call


class Answers(NamedTuple):
    """A model's answers to the labels of a batch, one entry for each label, `[n]`.

    Attributes:
        row, place: position of the label in `[B, T]`.
        right: whether the label is the most likely of all tokens.
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

    >>> from longctx_layers import create_model
    >>> reach(create_model(256, "tiny", "dpassm", {"window_size": 16}))
    60
    """
    total = 0
    for block in cast("list[Block]", list(model.blocks)):
        if block.mixer.reach is None:
            return None
        total += block.mixer.reach - 1
    return total


def memory(model: LongContextLM, state: ModelState) -> list[dict[str, Tensor]]:
    """The recurrent state of each layer by name: `h` of dpassm, the two sums of blade."""
    layers: list[dict[str, Tensor]] = []
    for block, layer_state in zip(cast("list[Block]", list(model.blocks)), state, strict=True):
        fields = block.mixer.fields()
        names = [name for name, field in fields.items() if field.kind == "accumulator"]
        layers.append({name: getattr(layer_state, name) for name in names})
    return layers


def zero_memory(model: LongContextLM, state: ModelState) -> ModelState:
    """The state with its `memory` set to zero; keys, values and convolution inputs stay.

    >>> import torch
    >>> from longctx_layers import create_model
    >>> model = create_model(256, "tiny", "dpassm")
    >>> state = zero_memory(model, read(model, torch.randint(256, (1, 100))))
    >>> bool(state[0].h.any())
    False
    """
    return tuple(
        layer._replace(**{name: torch.zeros_like(x) for name, x in parts.items()})
        for layer, parts in zip(state, memory(model, state), strict=True)
    )


def has_memory(model: LongContextLM) -> bool:
    """Whether any layer has recurrent state, which `zero_memory` clears."""
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
    """Prefill: the state after `[B, T]` ids. They are read in pieces; memory is constant in T.

    Args:
        model: the language model, in evaluation mode.
        ids: `[B, T]` int64.
        state: of the tokens before; by default there are none.
        tokens_at_once: number of tokens, over all rows, whose activations exist at once.
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
    """Answers to a batch, and the answers without the recurrent state if `probe` asks for them.

    The probe clears the recurrent state at the first question, and once more `reach` tokens before
    it, so that the keys and values in the windows come from a model without a memory as well. What
    is still answered correctly was not carried by the recurrent state.

    Args:
        model: the language model, in evaluation mode.
        batch: of a task.
        probe: whether to answer without the recurrent state too. The second result is None without
            it, and for a model that has no recurrent state.
        tokens_at_once, progress: as for `read`.
    """
    device = device_of(model.embedding, model)
    ids = batch.ids.to(device)
    labels = batch.labels.to(device)
    options: dict[str, Any] = {"tokens_at_once": tokens_at_once, "progress": progress}
    asked = batch.asked
    cut = max(0, asked - (reach(model) or 0))
    before = read(model, ids[:, :cut], **options)
    at_question = read(model, ids[:, cut:asked], before, **options)
    answers = _answer(model, at_question, ids, labels, asked, **options)
    if not (probe and has_memory(model)):
        return answers, None
    options["progress"] = None  # these tokens have been counted
    cleared = read(model, ids[:, cut:asked], zero_memory(model, before), **options)
    return answers, _answer(model, zero_memory(model, cleared), ids, labels, asked, **options)


def _answer(
    model: LongContextLM,
    state: ModelState,
    ids: Tensor,
    labels: Tensor,
    asked: int,
    tokens_at_once: int,
    progress: Progress | None,
) -> Answers:
    """Answers to the labels from position `asked` on; `state` is that of the tokens before."""
    size = max(1, tokens_at_once // len(ids))
    parts: list[list[Tensor]] = []
    offset = asked
    pieces = zip(ids[:, asked:].split(size, 1), labels[:, asked:].split(size, 1), strict=True)
    for piece, wanted in pieces:
        hidden, state = model.backbone(piece, state)
        row, place = (wanted != IGNORED_LABEL).nonzero(as_tuple=True)
        logits = model.project(hidden[row, place]).float()
        label = wanted[row, place]
        loss = F.cross_entropy(logits, label, reduction="none")
        right = logits.argmax(-1) == label
        parts.append([x.cpu() for x in (row, place + offset, right, loss)])
        offset += piece.shape[1]
        if progress is not None:
            progress(piece.numel())
    return Answers(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
