"""Triton's interpreter with its silent errors repaired, and with more checks.

Inside `interpreted()`, every `@triton.jit` kernel runs on CPU tensors, in numpy. Repaired are bf16
arithmetic, which the interpreter does on bit patterns, rounding to bf16, which it truncates, and
the type of comparisons. In addition, every load and store must lie inside one of the kernel's
tensors, programs run in a random order, and tensors from `torch.empty` hold NaN.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    interpreter_builder,
)
from triton.runtime.jit import JITFunction

# Its attribute is a property of a class that torch makes at run time, which mypy does not see.
DETERMINISTIC: Any = torch.utils.deterministic
LEAKY = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base, tl.core.dtype)


class OutOfBoundsError(AssertionError):
    """A kernel touched memory outside its arguments."""


def widened(x: TensorHandle) -> np.ndarray:
    """The numbers that a handle stands for: bf16 is stored as 16-bit patterns."""
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Bit patterns of numbers rounded to the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


@dataclasses.dataclass
class Traffic:
    """Bytes that kernels loaded and stored, and operations of their matrix products."""

    loaded: int = 0
    stored: int = 0
    flops: int = 0


class _Memory:
    """The addresses of the running kernel's tensors, and the traffic to and from them."""

    def __init__(self) -> None:
        self.regions: list[tuple[int, int, str]] = []
        self.traffic = Traffic()

    def enter(self, arguments: Iterator[tuple[str, Any]]) -> None:
        self.regions = []
        for name, x in arguments:
            if isinstance(x, torch.Tensor) and x.numel():
                span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
                begin = x.data_ptr()
                self.regions.append((begin, begin + span * x.element_size(), name))

    def check(self, kind: str, pointers: TensorHandle, mask: TensorHandle | None) -> None:
        places = pointers.data.astype(np.int64)
        if mask is not None:
            places = places[np.broadcast_to(mask.data.astype(bool), places.shape)]
        if not places.size:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if kind == "load":
            self.traffic.loaded += width * places.size
        else:
            self.traffic.stored += width * places.size
        low, high = int(places.min()), int(places.max()) + width
        if not any(begin <= low and high <= end for begin, end, _ in self.regions):
            begin, end, name = min(self.regions, key=lambda region: abs(region[0] - low))
            raise OutOfBoundsError(
                f"{kind} outside every argument: bytes {low - begin} to {high - begin} of the "
                f"{end - begin} of {name}, the nearest one"
            )


def _patches(memory: _Memory, order: int | None) -> Iterator[tuple[Any, str, Any]]:
    """What to replace: the owner, its attribute, and the new value."""
    builder = InterpreterBuilder
    functions: dict[Any, InterpretedFunction] = {}
    prepared: set[str] = set()

    def function(kernel: JITFunction) -> InterpretedFunction:
        return functions.setdefault(kernel.fn, InterpretedFunction(kernel.fn))

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        memory.enter(itertools.chain(zip(self.arg_names, args, strict=False), kwargs.items()))
        prepared.clear()
        return function(self).run(*args, grid=grid, warmup=warmup, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The interpreter patches the language at each call. For the functions of one module, once
        # per launch is enough.
        device_function = function(self)
        if self.fn.__module__ in prepared:
            return device_function.rewrite()(*args, **kwargs)
        prepared.add(self.fn.__module__)
        return device_function(*args, **kwargs)

    yield JITFunction, "run", run
    yield JITFunction, "__call__", call
    # These overflow checks end in an assertion that the interpreter does not run.
    options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    yield interpreter_builder, "options", options

    dot, cast, binary = builder.create_dot, builder.cast_impl, builder.binary_op

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> Any:
        a, b = (
            TensorHandle(widened(x), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        memory.traffic.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    def cast_impl(self: Any, x: TensorHandle, wanted: Any) -> Any:
        source, target = x.dtype.scalar, wanted.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return cast(self, x, wanted)
        if source == tl.bfloat16:
            x = TensorHandle(widened(x), tl.float32)
            return x if target == tl.float32 else cast(self, x, wanted)
        if source != tl.float32:
            x = cast(self, x, tl.float32)
        return TensorHandle(bf16_bits(x.data), target)

    def binary_op(self: Any, a: TensorHandle, b: TensorHandle, operation: Any) -> Any:
        bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
        if a.dtype.scalar != tl.bfloat16 or operation in bitwise:
            result = binary(self, a, b, operation)
        else:
            data = operation(widened(a), widened(b))
            data = data if data.dtype == bool else bf16_bits(data)
            result = TensorHandle(data, tl.bfloat16)
        # The interpreter labels a comparison with the type of its operands. A scalar one that is
        # broadcast then becomes integers, which Triton 3.9 refuses as a mask.
        return TensorHandle(result.data, tl.int1) if result.data.dtype == bool else result

    yield builder, "create_dot", create_dot
    yield builder, "cast_impl", cast_impl
    yield builder, "binary_op", binary_op

    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self: Any, pointers: TensorHandle, mask: Any, *rest: Any) -> Any:
        memory.check("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: TensorHandle, value: Any, mask: Any, *rest: Any) -> Any:
        memory.check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    yield builder, "create_masked_load", checked_load
    yield builder, "create_masked_store", checked_store
    if order is None:
        return

    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    grid: dict[str, Any] = {}

    def set_grid_dim(self: Any, *sizes: int) -> None:
        places = list(itertools.product(*(range(n) for n in sizes)))
        shuffled = np.random.default_rng(order).permutation(math.prod(sizes))
        grid["next"] = iter([places[n] for n in shuffled])
        set_dim(self, *sizes)

    yield builder, "set_grid_dim", set_grid_dim
    yield builder, "set_grid_idx", lambda self, *_: set_index(self, *next(grid["next"]))


@contextmanager
def interpreted(order: int | None = 0) -> Iterator[Traffic]:
    """Interpret every kernel inside the block; its module must have been imported before.

    Args:
        order: seed for a random order of programs; None for the usual order.
    """
    memory = _Memory()
    attributes = [(owner, dict(vars(owner))) for owner in LEAKY]
    filled = DETERMINISTIC.fill_uninitialized_memory
    strict = torch.are_deterministic_algorithms_enabled()
    with ExitStack() as stack:
        for owner, name, function in _patches(memory, order):
            stack.enter_context(patch.object(owner, name, function))
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.interpret = True
        torch.use_deterministic_algorithms(True)
        DETERMINISTIC.fill_uninitialized_memory = True
        try:
            yield memory.traffic
        finally:
            torch.use_deterministic_algorithms(strict)
            DETERMINISTIC.fill_uninitialized_memory = filled
            for owner, before in attributes:  # undo how the interpreter patched the language
                for name in set(vars(owner)) - set(before):
                    delattr(owner, name)
                for name, value in before.items():
                    if vars(owner).get(name) is not value:
                        setattr(owner, name, value)


@contextmanager
def last_programs(count: int) -> Iterator[list[tuple[int, ...]]]:
    """Inside `interpreted(None)`, run only the last programs of each grid.

    Tensors may then be larger than the memory, since pages that nothing touches take none.

    Yields:
        The grid of each launch.
    """
    run, builder = JITFunction.run, InterpreterBuilder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    grids: list[tuple[int, ...]] = []

    def run_some(self: Any, *args: Any, grid: Any, **kwargs: Any) -> Any:
        grids.append(grid)
        return run(self, *args, grid=(min(count, grid[0]), *grid[1:]), **kwargs)

    def set_grid_dim(self: Any, *_: int) -> None:
        set_dim(self, *grids[-1], *[1] * (3 - len(grids[-1])))

    def set_grid_idx(self: Any, x: int, *rest: int) -> None:
        set_index(self, grids[-1][0] - 1 - x, *rest)

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", run_some))
        stack.enter_context(patch.object(builder, "set_grid_dim", set_grid_dim))
        stack.enter_context(patch.object(builder, "set_grid_idx", set_grid_idx))
        DETERMINISTIC.fill_uninitialized_memory = False
        try:
            yield grids
        finally:
            DETERMINISTIC.fill_uninitialized_memory = True
