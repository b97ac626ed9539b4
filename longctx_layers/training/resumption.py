"""Whether a run can be resumed from a checkpoint with the current trainer and data."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from longctx_layers.data.errors import ResumptionError
from longctx_layers.data.module import LongContextData

# Options of the trainer that a resumed run may change, and the effect.
NUMERIC_OPTIONS = {
    "accumulate_grad_batches": "its steps have another number of tokens",
    "max_steps": "its learning rate falls over another number of steps",
    "precision": "its numbers are rounded differently",
    "gradient_clip_val": "its gradients are clipped differently",
    "gradient_clip_algorithm": "its gradients are clipped differently",
}


def numeric_options(trainer: L.Trainer, gradient_clip_val: float) -> dict[str, Any]:
    """The values of `NUMERIC_OPTIONS` as they take effect, to be saved in a checkpoint.

    Args:
        trainer: of this run.
        gradient_clip_val: of the model, if the trainer has none.
    """
    clip = trainer.gradient_clip_val
    algorithm = trainer.gradient_clip_algorithm
    return {
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "max_steps": trainer.max_steps,
        "precision": str(trainer.precision),
        "gradient_clip_val": float(gradient_clip_val if clip is None else clip),
        "gradient_clip_algorithm": "norm" if algorithm is None else algorithm.value,
    }


def check_resumption(
    checkpoint: dict[str, Any], trainer: L.Trainer, gradient_clip_val: float
) -> None:
    """Check a checkpoint's content before it is loaded; `validate` needs less than `fit`.

    Options that change the numbers only cause a warning.

    Raises:
        ResumptionError: if the data's order, the tokenizer or the number of processes differs, or
            gradients are missing.
    """
    saved = checkpoint["longctx"]
    data = LongContextData.of(trainer)
    processes = trainer.world_size
    if trainer.state.fn == "fit":
        if saved.get("within_step"):
            raise ResumptionError(
                "checkpoint: expected one that was written after an optimizer step, got one from "
                "within a step, without the gradients of the batches before it; resume from another"
            )
        data.check_order(checkpoint[type(data).__qualname__]["order"])
        carried = saved["carried"]
        if len(carried) != processes and any(state is not None for state in carried):
            raise ResumptionError(
                f"carry_state: the checkpoint holds the states of {len(carried)} processes, this "
                f"run has {processes}; resume with as many processes"
            )
        options = numeric_options(trainer, gradient_clip_val)
        for name, effect in NUMERIC_OPTIONS.items():
            before = saved.get(name, options[name])
            if before != options[name]:
                rank_zero_warn(
                    f"{name}: the run to resume had {before}, this one has {options[name]}: "
                    f"{effect}"
                )
    fingerprint = data.tokenizer.fingerprint
    if saved.get("tokenizer_fingerprint", fingerprint) != fingerprint:
        raise ResumptionError(
            f"data: expected the checkpoint's tokenizer, got another one from --data.tokenizer="
            f"{data.tokenizer_name} and this dataset; pass the data options of that run"
        )
