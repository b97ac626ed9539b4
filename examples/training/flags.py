"""What flags of the trainer mean for these data; what cannot be meant is refused by name."""

from __future__ import annotations

from typing import Any

from training.files import DataError


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
    limited, interval = isinstance(limit, int), trainer.val_check_interval
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
    interval, limit = trainer.val_check_interval, trainer.limit_train_batches
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
