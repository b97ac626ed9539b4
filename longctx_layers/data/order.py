"""What the order of training batches depends on, and whether a resumed run has the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longctx_layers.data.errors import ResumptionError
from longctx_layers.data.trainer_flags import batch_limit, is_trial

if TYPE_CHECKING:
    from longctx_layers.data.module import LongContextData


def order_of(data: LongContextData) -> dict[str, Any]:
    """What the order of the batches depends on, by name; checkpoints hold it."""
    shape = data.shape()
    return {
        "content": data.content,
        "seq_len": shape.length,
        "batch_size x processes": shape.all_rows,
        "validation_fraction": data.validation_fraction,
        "seed": data.seed,
        "carry_state": data.carry_state,
        "streaming": data.streaming,
        "separate_documents": data.separate_documents,
        # A stream does not train on what it holds out.
        "validation_documents": data.validation_documents if data.streaming else None,
        "overfit_batches": data.repeats_batches,
        "limit_train_batches": batch_limit(data.trainer),
    }


def check_order(data: LongContextData, resumed: Mapping[str, Any]) -> None:
    """Check that the batches come in the order of the run to resume.

    Args:
        data: of this run.
        resumed: `order_of` the run to resume.

    Raises:
        ResumptionError: if the order differs; it names the option.
    """
    order = order_of(data)
    if is_trial(data.trainer):  # it has a limit of its own
        order["limit_train_batches"] = resumed.get("limit_train_batches")
    for name, value in resumed.items():
        if value == order[name]:
            continue
        if name == "limit_train_batches" and data.repeats_batches:
            difference = f"overfit_batches {value}, this one has {order[name]}"
        elif name == "content":
            difference = (
                "other documents or another tokenizer than --data.dataset_name, "
                "dataset_config, text_column and tokenizer give now"
            )
        else:
            difference = f"{name} {value}, this one has {order[name]}"
        raise ResumptionError(
            f"data: the run to resume had {difference}; resume with the same data and options"
        )
