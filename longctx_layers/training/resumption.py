"""Whether a run can go on from a checkpoint with the trainer and the data that it was given."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from longctx_layers.data.errors import ResumptionError

# Options of the trainer that a resumed run may change, and what it then does otherwise.
NUMERIC_OPTIONS = {
    "accumulate_grad_batches": "its steps have another number of tokens",
    "max_steps": "its learning rate falls over another number of steps",
    "precision": "its numbers are rounded otherwise",
    "gradient_clip_val": "its gradients are clipped otherwise",
    "gradient_clip_algorithm": "its gradients are clipped otherwise",
}


def numeric_options(trainer: L.Trainer) -> dict[str, Any]:
    """The values of `NUMERIC_OPTIONS` as they take effect, to be saved in a checkpoint."""
    clip, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    return {
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "max_steps": trainer.max_steps,
        "precision": str(trainer.precision),
        "gradient_clip_val": float(
            trainer.lightning_module.hparams.gradient_clip_val if clip is None else clip
        ),
        "gradient_clip_algorithm": "norm" if algorithm is None else algorithm.value,
    }


def check_resumption(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Check a checkpoint's content before it is loaded; `validate` needs less than `fit`.

    Raises:
        ResumptionError: if the data's order, the tokenizer or the number of processes is another
            one, or gradients are missing.
    """
    saved, data, processes = checkpoint["longctx"], trainer.datamodule, trainer.world_size
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
        now = numeric_options(trainer)
        for name, effect in NUMERIC_OPTIONS.items():
            if (had := saved.get(name, now[name])) != now[name]:
                rank_zero_warn(
                    f"{name}: the run to resume had {had}, this one has {now[name]}: {effect}"
                )
    fingerprint = data.tokenizer.fingerprint
    if saved.get("tokenizer_fingerprint", fingerprint) != fingerprint:
        raise ResumptionError(
            f"data: expected the checkpoint's tokenizer, got another one from --data.tokenizer="
            f"{data.tokenizer_name} and this dataset; pass the data options of the checkpoint's run"
        )
