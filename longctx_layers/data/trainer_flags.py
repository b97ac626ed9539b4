"""What flags of the trainer mean for these data; what cannot be meant is refused by name."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Timer

from longctx_layers.data.errors import DataError


def check_trainer(trainer: Any) -> None:
    """Refuse flags that cannot be meant, whatever the data; before any is read.

    Raises:
        DataError: for training without batches, and for validation by the clocks of processes.
    """
    if trainer is None or trainer.state.fn != "fit":
        return
    if trainer.limit_train_batches == 0:
        raise DataError(
            "--trainer.limit_train_batches: expected at least one batch, got 0, which leaves "
            "nothing to train on; pass more, leave it out, or use the command validate"
        )
    if getattr(trainer, "_val_check_time_interval", None) is not None and trainer.world_size > 1:
        raise DataError(
            "--trainer.val_check_interval: expected a number of batches or a fraction, since "
            f"{trainer.world_size} processes must validate at the same step and their clocks "
            "differ, got a duration; pass a number such as 1000"
        )


def batch_limit(trainer: Any) -> str:
    """How much of an epoch is trained on, as words that tell 1 batch from all of them."""
    limit = 1.0 if trainer is None else trainer.limit_train_batches
    if isinstance(limit, int):
        return str(limit)
    return "all" if limit == 1.0 else f"{limit} of an epoch"


def check_end(trainer: Any, streaming: bool) -> None:
    """Check that the number of steps is known, over which the learning rate falls.

    Raises:
        DataError: if it is not.
    """
    if trainer.max_steps != -1:
        return
    epochs = trainer.max_epochs
    if epochs is None:  # before training; the trainer then takes 1000 epochs, without a timer
        epochs = -1 if any(isinstance(one, Timer) for one in trainer.callbacks) else 1000
    if epochs == -1:
        reason, remedy = "and no number of epochs", "--trainer.max_steps or --trainer.max_epochs"
    elif streaming and not isinstance(trainer.limit_train_batches, int):
        reason = "and epochs of a stream, whose length is not known"
        remedy = "--trainer.max_steps, or --trainer.limit_train_batches with the number of epochs"
    else:
        return
    raise DataError(
        "--trainer.max_steps: expected a number, since the schedule of the learning rate goes by "
        f"steps, got -1 {reason}; pass {remedy} (--trainer.max_time may end the run earlier)"
    )


def settle_stream(trainer: Any) -> bool:
    """Fit a trainer to a stream, whose length is not known.

    Validation every so many batches counts them through all epochs: those of one could be fewer.

    Returns:
        Whether the trainer ends epochs by their number of batches. They then go on with the stream
        where the last one stopped.

    Raises:
        DataError: for a fraction of the stream, and for what would depend on its length.
    """
    if trainer is None:
        return False
    limit, every = trainer.limit_train_batches, trainer.check_val_every_n_epoch
    limited, interval = isinstance(limit, int), _batches_to_validation(trainer)
    if not limited and limit != 1.0:
        name = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"
        raise DataError(
            f"--trainer.{name}: expected a number of batches, since a stream has no known length, "
            f"got the fraction {limit}; pass a number such as 100"
        )
    if not limited and isinstance(interval, float) and interval != 1.0:
        raise DataError(
            "--trainer.val_check_interval: expected a number of batches, since a stream has no "
            f"known length, got the fraction {interval}; pass a number such as 1000"
        )
    if limited:
        check_interval(trainer, limit)
    elif isinstance(interval, int) and every is not None:
        if every != 1:
            raise DataError(
                "--trainer.check_val_every_n_epoch: expected none beside --trainer."
                f"val_check_interval={interval}, which may be more batches than an epoch of a "
                f"stream has, got {every}; leave one of them out"
            )
        trainer.check_val_every_n_epoch = None
    return limited


def check_interval(trainer: Any, batches: int) -> None:
    """Raise if validation waits for more batches than an epoch has, so that it never came."""
    if trainer is None:
        return
    interval, limit = _batches_to_validation(trainer), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if (
        isinstance(interval, int)
        and interval > batches > 0
        and trainer.check_val_every_n_epoch is not None
        and trainer.limit_val_batches
    ):
        raise DataError(
            f"--trainer.val_check_interval: expected at most the {batches:,} batches of an epoch, "
            f"got {interval:,}; pass less, or --trainer.check_val_every_n_epoch=null to count the "
            "batches of all epochs"
        )


def _batches_to_validation(trainer: Any) -> int | float | None:
    """A number of batches or a fraction of an epoch; None where validation goes by time."""
    return getattr(trainer, "val_check_interval", None)
