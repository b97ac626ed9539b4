"""The optimizer: which parameters decay, the gates' own learning rate, warm-up and cosine."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import longctx_layers
from longctx_layers import LongContextLM

# They ask for a closure, or refuse dense gradients or parameters that are no matrices.
UNSUITED = {"LBFGS", "SparseAdam", "Muon"}
OPTIMIZERS: dict[str, type[Optimizer]] = {
    name: value
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, Optimizer)
    if value is not Optimizer and name not in UNSUITED
}


def optimizer_class(name: str) -> type[Optimizer]:
    """An optimizer of `torch.optim` by its name, in any case.

    Raises:
        ValueError: for any other name; the valid ones are listed.
    """
    found = {valid.lower(): value for valid, value in OPTIMIZERS.items()}
    if name.lower() not in found:
        raise ValueError(
            f"optimizer: expected one of {sorted(OPTIMIZERS)}, got {name!r}; choose one"
        )
    return found[name.lower()]


def parameter_groups(
    model: LongContextLM, *, learning_rate: float, gate_learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Every parameter once, in groups `decay`, `no_decay` and `gates`.

    What decays is what `longctx_layers.parameter_groups` says. The gates between paths, which do
    not, have a learning rate of their own, since they are known to train slowly.
    """
    gates = {id(p) for module in path_gates(model).values() for p in module.parameters()}
    groups = []
    for group in longctx_layers.parameter_groups(model, weight_decay=weight_decay):
        parts = {
            group["name"]: [p for p in group["params"] if id(p) not in gates],
            "gates": [p for p in group["params"] if id(p) in gates],
        }
        for name, parameters in parts.items():
            rate = gate_learning_rate if name == "gates" else learning_rate
            if parameters:
                groups.append({**group, "name": name, "params": parameters, "lr": rate})
    return groups


def path_gates(model: LongContextLM) -> dict[int, nn.Linear]:
    """The projections that weigh a layer's two paths, by the layer's index."""
    gates = {i: block.mixer.path_gate for i, block in enumerate(model.blocks)}
    return {i: gate for i, gate in gates.items() if gate is not None}


def build_optimizer(name: str, groups: list[dict[str, Any]], *, fused: bool) -> Optimizer:
    """The optimizer; with a momentum of 0.9 and 0.95, and fused, where it knows these options."""
    kind = optimizer_class(name)
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {}
    if len(getattr(known.get("betas"), "default", ())) == 2:
        options["betas"] = (0.9, 0.95)
    if fused and "fused" in known:
        options["fused"] = True
    if "weight_decay" not in known:
        groups = [{k: v for k, v in group.items() if k != "weight_decay"} for group in groups]
    return kind(groups, **options)


def warmup_cosine(step: int, *, warmup: int, total: int, final: float) -> float:
    """The learning rate's factor: linear to 1 over `warmup` steps, then a cosine to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients together, over all shards."""
    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
