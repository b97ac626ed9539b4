"""A look inside a model: its layers' memory, where a NaN begins, how many bytes a step keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from longctx_layers import LongContextLM, ModelConfig


@contextmanager
def forward_hooks(hooks: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Run with these forward hooks, without compiled code, which would ignore them."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def memory_statistics(
    model: LongContextLM, ids: Tensor, segment_ids: Tensor | None
) -> dict[str, Tensor]:
    """How each layer's memory behaves on these tokens `[B, T]`, from one pass without dropout.

    Returns:
        For each layer, `gate/layer_00`: the mean weight of the window path against the state path
        (1: the state is not used); `time_scale/layer_00`: after how many tokens a state has
        decayed to 1 / e, the geometric mean over heads; `longest_time_scale/layer_00`: that of the
        slowest head.
    """
    values: dict[str, Tensor] = {}

    def record(layer: int, statistics: Callable[[Tensor], dict[str, Tensor]]) -> Any:
        # Read during the pass, when the parameters of a sharded model are complete.
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            for name, value in statistics(output).items():
                values[f"{name}/layer_{layer:02d}"] = value

        return hook

    hooks: list[tuple[nn.Module, Any]] = []
    for i, mixer in enumerate(model.mixers()):
        for probe in mixer.probes():
            hooks.append((probe.module, record(i, probe.statistics)))
    if hooks:
        training = model.training
        model.eval()
        with forward_hooks(hooks):
            model(ids, segment_ids=segment_ids, last_only=True)
        model.train(training)
    return values


@torch.no_grad()
def first_non_finite(model: LongContextLM, batch: dict[str, Tensor], state: Any) -> str:
    """Find where NaN or infinity begins in a pass over this batch; returns it in words."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not torch.isfinite(local).all():
            return f"the parameter {name} is not finite"
    places: list[str] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
            if not all(torch.isfinite(x).all() for x in tensors):
                places.append(name)

        return hook

    with forward_hooks([(module, watch(name)) for name, module in model.named_modules() if name]):
        model.loss(
            batch["ids"], batch["labels"], state, segment_ids=batch["segment_ids"], reduction="sum"
        )
    return f"it began in {places[0]}" if places else "it began in the head or the loss"


def kept_activations(config: ModelConfig, length: int, *, checkpointing: bool) -> int:
    """Bytes that one sequence keeps for its backward pass in float32, without computing anything.

    It is an upper bound: the backends of the CPU are assumed, and kernels on a GPU keep less.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        # The reference keeps the storage alive, so that no other one gets its address.
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    model = LongContextLM(config, device="meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.gradient_checkpointing = checkpointing
        ids = torch.zeros(1, length, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.loss(ids, ids)
        for parameter in model.parameters():
            storages.pop(parameter.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())
