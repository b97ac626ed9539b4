"""The optimizer: which parameters decay, the gates' own learning rate, warm-up and cosine."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import longctx_layers
from longctx_layers import LongContextLM
from longctx_layers.command_line import closest

# They need a closure, refuse dense gradients, or refuse parameters that are not matrices.
UNSUITED = {"LBFGS", "SparseAdam", "Muon"}
OPTIMIZERS: dict[str, type[Optimizer]] = {
    name: value
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, Optimizer)
    if value is not Optimizer and name not in UNSUITED
}


@dataclass(frozen=True)
class OptimizerOptions:
    """How a model is optimized; the names are those of `LanguageModel`, where they are explained.

    >>> options = OptimizerOptions(learning_rate=2e-3, warmup_steps=10)
    >>> model = longctx_layers.create_model(256, "tiny", "dpassm")
    >>> optimizer, schedule = options.build(model, total_steps=100)
    >>> schedule.get_last_lr()[0] == 2e-3 / 10  # in the first step
    True
    """

    optimizer: str = "AdamW"
    learning_rate: float = 1e-3
    gate_learning_rate: float | None = None
    weight_decay: float = 0.1
    warmup_steps: int | None = None
    final_learning_rate: float = 0.1

    def build(
        self, model: LongContextLM, total_steps: int, *, fused: bool = False
    ) -> tuple[Optimizer, LambdaLR]:
        """The optimizer of a model's parameters, and the schedule of its learning rate.

        Args:
            model: to optimize.
            total_steps: over which the learning rate falls.
            fused: whether to use a fused implementation if there is one.
        """
        gate_rate = self.gate_learning_rate
        groups = parameter_groups(
            model,
            learning_rate=self.learning_rate,
            gate_learning_rate=2 * self.learning_rate if gate_rate is None else gate_rate,
            weight_decay=self.weight_decay,
        )
        optimizer = build_optimizer(self.optimizer, groups, fused=fused)
        warmup = min(2000, total_steps // 20) if self.warmup_steps is None else self.warmup_steps

        def factor(step: int) -> float:
            return warmup_cosine(
                step, warmup=warmup, total=total_steps, final=self.final_learning_rate
            )

        return optimizer, LambdaLR(optimizer, factor)


def optimizer_class(name: str) -> type[Optimizer]:
    """An optimizer of `torch.optim` by its name, in upper or lower case.

    Raises:
        ValueError: for an unknown name; it lists the valid ones.

    >>> optimizer_class("adamw").__name__
    'AdamW'
    """
    by_name = {valid.lower(): value for valid, value in OPTIMIZERS.items()}
    if name.lower() not in by_name:
        raise ValueError(
            f"optimizer: expected one of {sorted(OPTIMIZERS)}, got {name!r}"
            f"{closest(name, OPTIMIZERS) or '; choose one'}"
        )
    return by_name[name.lower()]


def parameter_groups(
    model: LongContextLM, *, learning_rate: float, gate_learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer, `decay`, `no_decay` and `gates`: every parameter once.

    What decays is decided by `longctx_layers.parameter_groups`. The gates between two paths of a
    layer, which do not decay, have a learning rate of their own, since they train slowly.

    >>> model = longctx_layers.create_model(256, "tiny", "dpassm")
    >>> groups = parameter_groups(
    ...     model, learning_rate=1e-3, gate_learning_rate=2e-3, weight_decay=0.1
    ... )
    >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
    [('decay', 0.001, 0.1), ('no_decay', 0.001, 0.0), ('gates', 0.002, 0.0)]
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


def path_gates(model: LongContextLM) -> dict[int, nn.Module]:
    """The projections that weigh the two paths of a layer, by the layer's index."""
    gates = {i: mixer.path_gate for i, mixer in enumerate(model.mixers())}
    return {i: gate for i, gate in gates.items() if gate is not None}


def build_optimizer(name: str, groups: list[dict[str, Any]], *, fused: bool) -> Optimizer:
    """Build an optimizer of `torch.optim`; it has betas of 0.9 and 0.95 if it has two of them."""
    kind = optimizer_class(name)
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {}
    if len(getattr(parameters.get("betas"), "default", ())) == 2:
        options["betas"] = (0.9, 0.95)
    if fused and "fused" in parameters:
        options["fused"] = True
    if "weight_decay" not in parameters:
        groups = [{k: v for k, v in group.items() if k != "weight_decay"} for group in groups]
    return kind(groups, **options)


def warmup_cosine(step: int, *, warmup: int, total: int, final: float) -> float:
    """The factor of the learning rate: linear to 1 over `warmup` steps, then a cosine to `final`.

    >>> [round(warmup_cosine(n, warmup=2, total=6, final=0.1), 3) for n in range(7)]
    [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients together, over all shards of a sharded model."""
    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
