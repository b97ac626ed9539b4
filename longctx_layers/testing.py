"""What tests, benchmarks and users share: small layers, checks of any layer, a memory meter.

A layer of your own is tested by the same checks as those of the library, here one named "mine":

from longctx_layers.testing import assert_causal, assert_packs, assert_streams, small_layer
layer = small_layer("mine")  # a case of its `test_cases`, in float64
assert_streams(layer, torch.randn(2, 20, 16, dtype=torch.float64), [5, 0, 1, 14])
assert_packs(layer, torch.randn(1, 20, 16, dtype=torch.float64), [7, 1, 12])
assert_causal(layer, torch.randn(2, 20, 16, dtype=torch.float64), 8)
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longctx_layers.layers import (
    LAYERS,
    Layer,
    build_layer,
    layer_options,
    map_state,
)
from longctx_layers.lm.config import ModelConfig
from longctx_layers.lm.model import LongContextLM
from longctx_layers.numerics import error_budget as error_budget
from longctx_layers.numerics import max_error as max_error


def layer_cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Small options to test every registered layer with: name in `LAYERS`, and options, by case.

    The layers say them in `test_cases`. A layer that is registered later is found by the next call.
    """
    return {
        "-".join(filter(None, (name.removeprefix("baseline_"), suffix))): (name, options)
        for name, cls in LAYERS.items()
        for suffix, options in cls.test_cases().items()
    }


LAYER_CASES = layer_cases()


def small_layer(
    case: str,
    *,
    d_model: int = 16,
    n_heads: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **options: Any,
) -> Layer[Any]:
    """A layer of `layer_cases` with all of its parameters random, so that no path is silent."""
    name, given = layer_cases()[case]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = build_layer(name, d_model, n_heads, dtype=dtype, **{**given, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            fan_in = parameter.shape[1] if parameter.dim() == 2 else 1
            parameter.add_(0.3 * fan_in**-0.5 * noise.to(dtype))
    return layer


def assert_streams(
    layer: Layer[Any],
    x: Tensor,
    pieces: Sequence[int],
    segment_ids: Tensor | None = None,
    *,
    tolerance: float = 1e-9,
) -> None:
    """Assert that one call for each piece gives outputs, state and gradients of a single call.

    Args:
        x: `[B, T, d_model]` in float64.
        pieces: lengths that sum to T; 0 among them is fine.
        segment_ids: `[B, T]` or None.
        tolerance: absolute and relative.
    """
    x = x.detach().requires_grad_()
    y, final = layer(x, segment_ids=segment_ids)
    streamed, state = _stream(layer, x, pieces, segment_ids)
    close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    assert_close(streamed, y, **close)
    assert_close(state, final, **close)
    expected = state_gradients(layer, x, y, final)
    assert_close(state_gradients(layer, x, streamed, state), expected, **close)


def assert_packs(layer: Layer[Any], x: Tensor, lengths: Sequence[int]) -> None:
    """Assert that documents packed into a row equal separate calls, also for what comes later.

    Args:
        x: `[1, T, d_model]` in float64.
        lengths: of the documents; they sum to T.
    """
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
    # Ids may come back: only a change of id begins a segment.
    ids = torch.repeat_interleave(torch.arange(len(lengths)) % 2, torch.tensor(lengths))[None]
    y, state = layer(x, segment_ids=ids)
    separate = [layer(part) for part in x.split(list(lengths), 1)]
    assert_close(y, torch.cat([part for part, _ in separate], 1), **close)
    last = separate[-1][1]
    for name in set(state._fields) - {"segment", "k", "v"}:
        assert_close(getattr(state, name), getattr(last, name), **close)
    # Caches that grow keep the row's earlier segments; later tokens must not see them.
    more = x[:, :7].flip(1)
    assert_close(layer(more, state)[0], layer(more, last)[0], **close)


def assert_causal(layer: Layer[Any], x: Tensor, t: int) -> None:
    """Assert that other inputs from token t on change no output before it, bit for bit.

    Args:
        x: `[B, T, d_model]`.
        t: from 1 to T - 1.
    """
    other = torch.cat([x[:, :t], 1e3 * torch.randn_like(x[:, t:])], 1)
    assert_close(layer(other)[0][:, :t], layer(x)[0][:, :t], rtol=0, atol=0)


def _stream(
    layer: Layer[Any], x: Tensor, pieces: Sequence[int], segment_ids: Tensor | None
) -> tuple[Tensor, Any]:
    """Outputs and final state of one call per piece, each of which leaves its state alone."""
    ids = [None] * len(pieces) if segment_ids is None else segment_ids.split(list(pieces), 1)
    ys = []
    state: Any = None
    for part, part_ids in zip(x.split(list(pieces), 1), ids, strict=True):
        before: Any = None if state is None else map_state(torch.clone, state)
        y, new = layer(part, state, segment_ids=part_ids)
        assert_close(state, before, rtol=0, atol=0)
        ys.append(y)
        state = new
    return torch.cat(ys, 1), state


def state_gradients(layer: Layer[Any], x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, ...]:
    """Of x and all parameters, through the outputs and through every float tensor of the state."""
    generator = torch.Generator().manual_seed(9)
    loss = torch.zeros((), dtype=torch.float64)
    for result in (y, *(s for s in state if s.is_floating_point())):
        weight = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        loss = loss + (result * weight.to(result.dtype)).sum()
    return torch.autograd.grad(loss, [x, *layer.parameters()])


def small_model(
    *pattern: str, dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any
) -> LongContextLM:
    """A model of these blocks, narrow windows and chunks, and all of its parameters random."""
    options = {"window_size": 5, "chunk_size": 4, "ssm_state_dim": 3, "state_dim": 3}
    given = {name: {k: options[k] for k in layer_options(name) if k in options} for name in pattern}
    shape = {"vocab_size": 13, "d_model": 16, "n_heads": 4, "n_layers": 2, "ffn_dim": 24}
    shape["n_layers"] = max(shape["n_layers"], len(pattern))
    chosen = {**shape, "pattern": pattern, "block_kwargs": given, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LongContextLM(ModelConfig(**chosen), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def rates(module: nn.Module) -> dict[str, nn.Parameter]:
    """The logarithms of rates in the state spaces of a module, which stay in float32, by name."""
    names = ("A_log", "dt_bias", "log_rate")
    return {n: p for n, p in module.named_parameters() if n.rsplit(".", 1)[-1] in names}


def parameter_dtypes(module: nn.Module) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Of the rates, and of all other parameters."""
    special = rates(module)
    others = {p.dtype for name, p in module.named_parameters() if name not in special}
    return {p.dtype for p in special.values()}, others


def assert_within_budget(
    actual: Tensor,
    same_dtype_reference: Tensor,
    oracle: Tensor,
    *,
    scale: float | None = None,
    factor: float = 2.0,
) -> None:
    """Assert that a result is as good as its dtype allows; see `error_budget` for the arguments."""
    if not torch.isfinite(actual).all():
        raise AssertionError("expected finite values, got NaN or infinity")
    allowed = error_budget(actual, same_dtype_reference, oracle, scale=scale, factor=factor)
    if (error := max_error(actual, oracle)) > allowed:
        own = max_error(same_dtype_reference, oracle)
        raise AssertionError(
            f"error {error:.3g} exceeds {allowed:.3g}, which is {factor} x (the reference's "
            f"{own:.3g} + rounding)"
        )


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of live tensors that torch's operations make while the meter is on.

    Attributes:
        peak: most bytes alive at once, beyond what was there before.
        largest: elements of the largest single tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = self._live = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type != "meta":
                self._watch(x, before)
        return result

    def _watch(self, x: Tensor, before: set[int]) -> None:
        storage = x.untyped_storage()
        if storage._cdata in self._seen or storage._cdata in before:
            return
        key, size = storage._cdata, storage.nbytes()
        self._live += size
        self.peak = max(self.peak, self._live)
        self.largest = max(self.largest, size // x.element_size())

        def gone(_: Any) -> None:
            self._live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
