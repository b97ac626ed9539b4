"""Options of Lightning's trainer that concern the data: checks of those that do not fit it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Timer

from longctx_layers.data.errors import DataError


def check_trainer(trainer: Any) -> None:
    """Check options that fit no data, before any is read.

    Raises:
        DataError: for training without batches, and for several processes that would validate by
            their own clocks.
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


def is_trial(trainer: Any) -> bool:
    """Whether the trainer only tries a few batches (`fast_dev_run`) and writes nothing."""
    return bool(getattr(trainer, "fast_dev_run", False))


def batch_limit(trainer: Any) -> str:
    """How much of an epoch is trained on, in words: 1 batch and all of them (1.0) are different."""
    limit = 1.0 if trainer is None else trainer.limit_train_batches
    if isinstance(limit, int):
        return str(limit)
    return "all" if limit == 1.0 else f"{limit} of an epoch"


def check_end(trainer: Any, streaming: bool) -> None:
    """Check that the number of steps is known: the learning rate falls over it.

    Raises:
        DataError: if it is not known.
    """
    if trainer.max_steps != -1:
        return
    epochs = trainer.max_epochs
    if epochs is None:  # before training; without a timer, the trainer's default is 1000 epochs
        has_timer = any(isinstance(callback, Timer) for callback in trainer.callbacks)
        epochs = -1 if has_timer else 1000
    if epochs == -1:
        reason = "and no number of epochs"
        remedy = "--trainer.max_steps or --trainer.max_epochs"
    elif streaming and not isinstance(trainer.limit_train_batches, int):
        reason = "and epochs of a stream, whose length is not known"
        remedy = "--trainer.max_steps, or --trainer.limit_train_batches with the number of epochs"
    else:
        return
    raise DataError(
        "--trainer.max_steps: expected a number, since the learning rate is scheduled by "
        f"steps, got -1 {reason}; pass {remedy} (--trainer.max_time may end the run earlier)"
    )


def settle_stream(trainer: Any) -> bool:
    """Adapt a trainer to a stream, whose length is not known.

    If it validates every n batches, these are counted across epochs: one epoch could have fewer.

    Returns:
        Whether the trainer ends epochs after a number of batches. An epoch then continues the
        stream where the last one stopped.

    Raises:
        DataError: for a fraction of the stream, and for other options that depend on its length.
    """
    if trainer is None:
        return False
    limit = trainer.limit_train_batches
    limited = isinstance(limit, int)
    interval = _batches_to_validation(trainer)
    every = trainer.check_val_every_n_epoch
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
                "--trainer.check_val_every_n_epoch: expected none together with --trainer."
                f"val_check_interval={interval}, which may be more batches than an epoch of a "
                f"stream has, got {every}; leave one of them out"
            )
        trainer.check_val_every_n_epoch = None
    return limited


def check_interval(trainer: Any, batches: int) -> None:
    """Raise DataError if validation waits for more batches than an epoch has, that is, forever."""
    if trainer is None:
        return
    interval = _batches_to_validation(trainer)
    limit = trainer.limit_train_batches
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
    """A number of batches or a fraction of an epoch; None if validation is by time."""
    return getattr(trainer, "val_check_interval", None)
