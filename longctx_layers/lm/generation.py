"""Sampling from a language model, in memory that does not grow with the prompt."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longctx_layers.layers.parameters import device_of
from longctx_layers.ops.checks import expect_count, expect_number, expect_positive
from longctx_layers.ops.segments import PAD_SEGMENT as PAD_SEGMENT  # also importable from here
from longctx_layers.ops.state_space.tiles import running_sum

if TYPE_CHECKING:
    from longctx_layers.lm.model import LongContextLM


# Not inference_mode: its tensors could not be embedded again in training.
@torch.no_grad()
def generate(
    model: LongContextLM,
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
    """Continue prompts, token by token.

    The prompt is read in pieces, then every new token costs one step from the state, so that peak
    memory is what the state takes: constant in the length for `dpassm`, `blade`, `window` and
    `baseline_longformer`. Prompts of different lengths are padded at the left, which is an exact
    no-op: each row gets what it would get alone. The model runs in evaluation mode, and is left in
    the mode it was in.

    Args:
        model: the language model.
        prompt: token ids: one prompt `[T]`, prompts of one length `[B, T]`, or a list of prompts
            of any lengths (1-D tensors, or lists of ints). No prompt may be empty. Every id of a
            tensor is a token: prompts that were padded go without their pads, as a list.
        max_new_tokens: how many tokens to append at most.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the fewest likeliest tokens whose probabilities reach top_p together
            (after top_k, where both are given).
        eos: the token, or tokens, after which a row is finished.
        generator: source of the randomness, on the model's device; torch's default otherwise.
        prefill_size: tokens of the prompt read at once.

    Returns:
        Prompts with their continuations, int64, on the model's device. For a tensor, a tensor
        `[T + n]` or `[B, T + n]`, where n is the number of tokens that the longest row took, and
        a row that finished earlier repeats the eos it ended with. For a list, a list of 1-D
        tensors, each ending with its eos if it met one.

    Raises:
        ValueError, TypeError: for an empty prompt, ids outside the vocabulary, or an option outside
            its range.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, prefill_size)
    vocab_size, device = model.config.vocab_size, device_of(model.embedding, model)
    rows = [_checked_ids("prompt", row, vocab_size, device) for row in _rows(prompt)]
    stop = _checked_ids("eos", _as_list(eos), vocab_size, device)
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator: expected one on {device}, as the model, got one on {generator.device}; "
            f"use torch.Generator({str(device)!r})"
        )

    ids, segment_ids = _left_padded(rows)
    length = torch.zeros(len(rows), dtype=torch.int64, device=device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    n_finished = 0
    new: list[Tensor] = []
    with _evaluation_mode(model):
        state = None
        for first in range(0, ids.shape[1] if max_new_tokens else 0, prefill_size):
            piece = slice(first, first + prefill_size)
            logits, state = model(
                ids[:, piece],
                state,
                segment_ids=None if segment_ids is None else segment_ids[:, piece],
                return_state=True,
                last_only=True,
            )
        while len(new) < max_new_tokens:
            if new:
                # A finished row is fed pads: nothing for its state to do, whatever the id.
                steps = torch.where(finished, PAD_SEGMENT, 0)[:, None] if n_finished else None
                logits, state = model(
                    new[-1][:, None], state, segment_ids=steps, return_state=True, last_only=True
                )
            token = _sample(logits[:, -1], temperature, top_k, top_p, generator)
            new.append(torch.where(finished, new[-1], token) if n_finished else token)
            length += ~finished
            if len(stop):
                finished |= torch.isin(new[-1], stop)
                n_finished = int(finished.sum())
                if n_finished == len(rows):
                    break

    continuation = torch.stack(new, 1) if new else ids[:, :0]
    if isinstance(prompt, Tensor):
        whole = torch.cat([ids, continuation], 1)
        return whole if prompt.dim() == 2 else whole[0]
    lengths = length.tolist()
    return [
        torch.cat([row, tail[:n]]) for row, tail, n in zip(rows, continuation, lengths, strict=True)
    ]


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token of each row of logits `[B, V]`, int64 `[B]`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = logits.float().sort(dim=-1, descending=True, stable=True)
    # From the maximum down, so that no temperature, however small, divides anything into +inf.
    scaled = (logits - logits[:, :1]) / max(temperature, torch.finfo(torch.float32).tiny)
    probabilities = scaled[:, :top_k].softmax(-1)
    if top_p is not None:
        before = running_sum(probabilities) - probabilities
        # The first is always kept: in float32, top_p may be smaller than rounding can tell from 0.
        before[:, 0] = -1.0
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, choice).squeeze(-1)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Module by module: some may have been frozen in evaluation mode.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows as one `[B, T]`, and its segment ids (0, and -1 at pads), or None without pads."""
    longest = max(len(row) for row in rows)
    ids = rows[0].new_zeros(len(rows), longest)
    segment_ids = torch.full_like(ids, PAD_SEGMENT)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        segment_ids[i, longest - len(row) :] = 0
    padded = any(len(row) < longest for row in rows)
    return ids, segment_ids if padded else None


def _rows(prompt: Tensor | Sequence[Tensor | Sequence[int]]) -> list[Tensor | Sequence[int]]:
    if isinstance(prompt, Tensor):
        if prompt.is_nested:
            raise TypeError(
                "prompt: expected a dense tensor of token ids, or a list of prompts, got a nested "
                "tensor; pass list(prompt.unbind())"
            )
        if prompt.dim() not in (1, 2):
            raise ValueError(
                f"prompt: expected a tensor [T] or [B, T], got {list(prompt.shape)}; reshape it"
            )
        prompt = list(prompt if prompt.dim() == 2 else prompt[None])
    nested = isinstance(prompt, (list, tuple)) and all(
        isinstance(row, (Tensor, list, tuple)) for row in prompt
    )
    if not nested:
        raise TypeError(
            "prompt: expected a tensor of token ids, or a list of 1-D tensors or lists of ids, "
            f"got {prompt!r}; encode text first, and put a single list of ids into a tensor"
        )
    if any(isinstance(row, Tensor) and row.dim() != 1 for row in prompt):
        shapes = [list(row.shape) for row in prompt if isinstance(row, Tensor)]
        raise ValueError(
            f"prompt: expected 1-D tensors, one for each prompt, got shapes {shapes}; flatten them"
        )
    if not prompt or any(len(row) == 0 for row in prompt):
        raise ValueError(
            "prompt: expected at least one prompt, and at least one token in each, got "
            f"{len(prompt)} prompts of lengths {[len(row) for row in prompt]}; "
            "start an empty one with a begin-of-text token"
        )
    return list(prompt)


def _as_list(eos: int | Collection[int] | None) -> list[int]:
    if eos is None:
        return []
    if isinstance(eos, Tensor):
        return eos.flatten().tolist()
    return list(eos) if isinstance(eos, Collection) else [eos]


def _checked_ids(
    name: str, ids: Tensor | Sequence[int], vocab_size: int, device: torch.device
) -> Tensor:
    if len(ids) == 0:
        return torch.zeros(0, dtype=torch.int64, device=device)
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected integer token ids, got {ids!r}; encode text first"
        ) from error
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer token ids, got {ids.dtype}; use .long()")
    if ids.dim() != 1:
        raise ValueError(
            f"{name}: expected a 1-D list of token ids, got {list(ids.shape)}; flatten it"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name}: expected token ids in [0, {vocab_size}), got ids from {low} to {high}; "
            "use the tokenizer that the model was trained with"
        )
    return ids.to(device, torch.int64)


def _check_options(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    prefill_size: int,
) -> None:
    expect_count("max_new_tokens", max_new_tokens)
    expect_positive("prefill_size", prefill_size)
    if top_k is not None:
        expect_positive("top_k", top_k)
    expect_number("temperature", temperature)
    if top_p is not None:
        expect_number("top_p", top_p)
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature: expected a finite number of at least 0, got {temperature}; "
            "0 is greedy, 1 samples from the model as it is"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f"top_p: expected a probability in (0, 1], got {top_p}; None or 1 keeps all tokens"
        )
