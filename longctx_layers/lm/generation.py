"""Text generation with any model that carries a state from call to call, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longctx_layers.ops.checks import expect_count, expect_number, expect_positive
from longctx_layers.ops.segments import PAD_SEGMENT as PAD_SEGMENT  # also importable from here
from longctx_layers.ops.state_space.tiles import running_sum


class StreamingModel(Protocol):
    """What `generate` needs of a model: an `nn.Module` with one more method and two attributes.

    `LongContextLM` has them. A model of your own that is built from these layers gets them in a few
    lines: see examples/integrations/nanogpt.py.

    Attributes:
        vocab_size: the number of token ids.
        device: where token ids are expected.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def advance(self, ids: Tensor, state: Any, segment_ids: Tensor | None) -> tuple[Tensor, Any]:
        """Read more tokens.

        Args:
            ids: `[B, T]` int64, T >= 1.
            state: what the previous call returned, None for the first.
            segment_ids: `[B, T]`, to hand to the layers: 0 at tokens, -1 at padding. None if there
                is no padding.

        Returns:
            Logits `[B, vocab_size]` of the token after the last one, and the new state.
        """

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...


# Not inference_mode: its tensors could not be used as inputs of an embedding in training later.
@torch.no_grad()
def generate(
    model: StreamingModel,
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
    """Continue prompts token by token, greedily or by sampling.

    The prompt is read in pieces, then each new token is one step from the state. Peak memory is
    that of the state: independent of the length for `dpassm`, `blade`, `window` and `longformer`.
    Prompts of different lengths are padded on the left, which changes nothing: each row gets what
    it would get alone. The model is in evaluation mode during the call.

    Args:
        model: a `LongContextLM`, or any `StreamingModel`.
        prompt: token ids: one prompt `[T]`, prompts of one length `[B, T]`, or a list of prompts
            of any lengths (1-D tensors, or lists of ints). No prompt may be empty. All ids of a
            tensor are tokens: pass prompts that were padded as a list, without their padding.
        max_new_tokens: how many tokens to append at most.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the smallest set of likeliest tokens whose probabilities sum to at least
            top_p (after top_k, if both are given).
        eos: the token or tokens after which a row is finished.
        generator: source of randomness, on the model's device; torch's default otherwise.
        prefill_size: tokens of the prompt to read at once.

    Returns:
        Prompts with their continuations, int64, on the model's device. For a tensor, a tensor
        `[T + n]` or `[B, T + n]`, where n is the number of tokens that the longest row took; rows
        that finished earlier repeat their eos. For a list, a list of 1-D tensors, each ending with
        its eos if it has one.

    Raises:
        ValueError, TypeError: for an empty prompt, ids outside the vocabulary, or an option outside
            its range.

    >>> model = create_model(vocab_size=256, num_params="tiny")
    >>> text = generate(model, [[72, 105], [72, 101, 108]], max_new_tokens=5, temperature=0)
    >>> [len(row) for row in text]
    [7, 8]
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, prefill_size)
    device = model.device
    rows = [_checked_ids("prompt", row, model.vocab_size, device) for row in _rows(prompt)]
    stop = _checked_ids("eos", _as_list(eos), model.vocab_size, device)
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator: expected one on {device}, where the model is, got one on "
            f"{generator.device}; use torch.Generator({str(device)!r})"
        )

    ids, segment_ids = _left_padded(rows)
    generated: list[Tensor] = []
    generated_length = torch.zeros(len(rows), dtype=torch.int64, device=device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    finished_count = 0
    with _evaluation_mode(model):
        if max_new_tokens:
            logits, state = _prefill(model, ids, segment_ids, prefill_size)
        while len(generated) < max_new_tokens:
            if generated:
                # A finished row reads padding: its state stays as it is, whatever the id.
                step_segments = None
                if finished_count:
                    step_segments = torch.where(finished, PAD_SEGMENT, 0)[:, None]
                logits, state = model.advance(generated[-1][:, None], state, step_segments)
            token = _sample(logits, temperature, top_k, top_p, generator)
            if finished_count:
                token = torch.where(finished, generated[-1], token)
            generated.append(token)
            generated_length += ~finished
            if len(stop):
                finished |= torch.isin(token, stop)
                finished_count = int(finished.sum())
                if finished_count == len(rows):
                    break

    continuation = torch.stack(generated, 1) if generated else ids[:, :0]
    if isinstance(prompt, Tensor):
        whole = torch.cat([ids, continuation], 1)
        return whole if prompt.dim() == 2 else whole[0]
    return [
        torch.cat([row, new[:length]])
        for row, new, length in zip(rows, continuation, generated_length.tolist(), strict=True)
    ]


def _prefill(
    model: StreamingModel, ids: Tensor, segment_ids: Tensor | None, size: int
) -> tuple[Tensor, Any]:
    """Read the prompts `size` tokens at a time; returns the last logits and the state."""
    state = None
    for begin in range(0, ids.shape[1], size):
        piece = slice(begin, begin + size)
        segments = None if segment_ids is None else segment_ids[:, piece]
        logits, state = model.advance(ids[:, piece], state, segments)
    return logits, state


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
def _evaluation_mode(model: StreamingModel) -> Iterator[None]:
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
