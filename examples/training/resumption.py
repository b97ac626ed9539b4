"""Whether a run can go on from a checkpoint with the trainer and the data that it was given."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from training.checkpoints import ResumptionError


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
        accumulated = saved.get("accumulate_grad_batches", trainer.accumulate_grad_batches)
        if accumulated != trainer.accumulate_grad_batches:
            rank_zero_warn(
                f"accumulate_grad_batches: the run to resume had {accumulated}, this one has "
                f"{trainer.accumulate_grad_batches}: its steps have another number of tokens"
            )
    fingerprint = data.tokenizer.fingerprint
    if saved.get("tokenizer_fingerprint", fingerprint) != fingerprint:
        raise ResumptionError(
            f"data: expected the checkpoint's tokenizer, got another one from --data.tokenizer="
            f"{data.tokenizer_name} and this dataset; pass the data options of the checkpoint's run"
        )
