"""The trainer's options on this machine, and sharding of a model over several devices."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from longctx_layers import LongContextLM

FSDP = "lightning.pytorch.strategies.ModelParallelStrategy"


def trainer_changes(trainer: Any) -> tuple[dict[str, Any], list[str]]:
    """What to change in a trainer's configuration so that this machine can run it.

    Args:
        trainer: the configuration, which is not changed.

    Returns:
        New values by the option's name, and a line for the user about each.

    Raises:
        ValueError: for what this machine cannot do, with the remedy.
    """
    changes: dict[str, Any] = {}
    lines = []
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (
        trainer.accelerator in ("gpu", "cuda")
        and not gpus
        and not torch.backends.mps.is_available()
    ):
        raise ValueError(
            f"--trainer.accelerator={trainer.accelerator}: torch {torch.__version__} finds no GPU "
            "on this machine; use --trainer.accelerator=cpu, or auto for what there is"
        )
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not gpus)
    if on_cpu and str(trainer.precision) in ("16", "16-mixed"):
        changes["precision"] = "bf16-mixed"
        lines.append(
            f"--trainer.precision={trainer.precision}: bf16-mixed, since this runs on the CPU"
        )
    strategy = trainer.strategy
    if isinstance(strategy, str) and strategy.startswith("deepspeed"):
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                f"--trainer.strategy={strategy}: needs the extra deepspeed, pip install "
                "'longctx-layers[deepspeed]'; to save memory without it use "
                "--model.gradient_checkpointing=True, and --trainer.strategy=fsdp on several GPUs"
            )
        if on_cpu:
            raise ValueError(
                f"--trainer.strategy={strategy}: DeepSpeed needs a CUDA GPU; to save memory here "
                "use --model.gradient_checkpointing=True"
            )
    if strategy == "fsdp":
        size = device_count(trainer.devices, 1 if on_cpu else gpus) * int(trainer.num_nodes)
        lines.append(f"--trainer.strategy=fsdp: FSDP2 over {size} process{'es' * (size > 1)}")
        changes["strategy"] = {
            "class_path": FSDP,
            "init_args": {
                "data_parallel_size": size,
                "tensor_parallel_size": 1,
                "save_distributed_checkpoint": False,  # one file, as every other strategy writes
            },
        }
    return changes, lines


def device_count(devices: Any, available: int) -> int:
    """How many processes `--trainer.devices` starts on a node.

    >>> device_count("auto", available=4), device_count("0,2", 4), device_count([1], 4)
    (4, 2, 1)
    """
    if devices in ("auto", -1, "-1"):
        return available
    if isinstance(devices, str):
        devices = [d for d in devices.split(",") if d] if "," in devices else int(devices)
    return devices if isinstance(devices, int) else len(devices)


def shard(model: LongContextLM, mesh: Any) -> None:
    """Shard parameters, gradients and optimizer state of a model over a device mesh (FSDP2)."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("loss", "backbone"):
        register_fsdp_forward_method(model, method)
