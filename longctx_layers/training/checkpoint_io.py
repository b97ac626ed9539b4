"""How Lightning writes and reads checkpoints: atomically, with checksums, without running code."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io import TorchCheckpointIO

from longctx_layers import state_to
from longctx_layers.files import StorageError, replacing
from longctx_layers.training.checkpoint_files import by_progress, damage
from longctx_layers.training.checkpoints import not_a_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """A plugin for `lightning.Trainer(plugins=[...])`: no checkpoint is ever half-written.

    After an interruption there is the old file or the new one. Reading verifies the file's
    checksums and loads tensors and plain values only.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            StorageError: if the file cannot be written; nothing of it is left.
        """
        if "://" in str(path):  # an object store, which writes whole objects anyway
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        writer: _Writer | None = None
        try:
            with replacing(target) as file:
                writer = _Writer(file)
                torch.save(checkpoint, cast("IO[bytes]", writer))
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else None
            if cause is None and writer is not None:
                cause = writer.error
            if cause is None:
                raise
            raise StorageError(
                f"checkpoint: could not write {target} ({cause.strerror or cause}). "
                f"{_last_good(target.parent)}; make room or allow writing there, or choose another "
                "--trainer.default_root_dir, and resume with --ckpt_path"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: if it is damaged.
            pickle.UnpicklingError: if it holds anything but tensors and plain values.
        """
        if "://" not in str(path) and Path(path).is_file() and (problem := damage(path)):
            raise not_a_checkpoint(path, problem)
        return super().load_checkpoint(path, map_location, weights_only=True)


class _Writer:
    """Remembers why a write failed: torch hides it behind an error about positions in a file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _last_good(folder: Path) -> str:
    for file in by_progress(folder):
        if damage(file.path) is None:
            return f"The last good checkpoint, {file.path}, is kept"
    return "There is no earlier one"


def gather_ranks(state: Any) -> list[Any]:
    """Collect the layers' state of every process on the CPU; every process must call it."""
    state = None if state is None else state_to(state, "cpu")
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states
