"""Checkpoints that are whole or not there, hold all that a run goes on from, and no code."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from longctx_layers import LongContextLM, ModelConfig, state_to

FOLDER = "checkpoints"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file's place and moves it there; loads tensors and plain values only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint: after an interruption there is the old file or the new one."""
        if "://" in str(path):  # an object store, which writes whole objects anyway
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; one that holds any other object is refused."""
        return super().load_checkpoint(path, map_location, weights_only=True)


class Checkpoints(ModelCheckpoint):
    """Keeps the newest checkpoints of a run, `<default_root_dir>/checkpoints/step=*.ckpt`.

    Args:
        every_n_steps: Optimizer steps between two checkpoints; one more is written at the end.
        keep: How many of the newest are kept, -1 for all.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 3) -> None:
        super().__init__(
            filename="{step:08d}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Settle the folder, and remove what a killed run has left half-written."""
        self.dirpath = os.path.join(trainer.default_root_dir, FOLDER)
        super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero:
            for partial in Path(self.dirpath).glob(".*.ckpt.*"):
                partial.unlink()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last one, unless it is there."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    @property
    def newest(self) -> str:
        """The path of the newest checkpoint of this run, or an empty string."""
        return self._last_checkpoint_saved


def newest_checkpoint(root: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that was written last under a `default_root_dir`; each is whole."""
    found = list(Path(root, FOLDER).glob("*.ckpt"))
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def gather_ranks(state: Any) -> list[Any]:
    """The state of every rank, on the CPU; called by all of them."""
    state = None if state is None else state_to(state, "cpu")
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


def packed_tokenizer(tokenizer: Any) -> dict[str, Tensor]:
    """The files of a saved tokenizer as tensors of bytes, so that a checkpoint needs no other."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {
            path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in Path(folder).iterdir()
        }


def read_content(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All that is in a checkpoint of examples/train.py.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint of this program.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, got {path}; see logs/checkpoints")
    if not Path(path).stat().st_size:
        raise _unfit(path, "which is empty")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file may hold anything
        raise _unfit(
            path,
            "which is cut short, or holds something other than tensors and plain values "
            f"({type(error).__name__})",
        ) from error
    if not isinstance(found, dict):
        raise _unfit(path, f"which holds a {type(found).__name__}")
    if missing := [n for n in ("longctx", "state_dict") if not isinstance(found.get(n), dict)]:
        names = ", ".join(sorted(map(str, found))[:8]) or "nothing"
        raise _unfit(path, f"which holds {names}, and nothing of {' and '.join(missing)}")
    return found


def _unfit(path: str | os.PathLike[str], what: str) -> ValueError:
    return ValueError(
        f"checkpoint: expected one that examples/train.py wrote, got {path}, {what}; it is damaged "
        "or another program's: pass another file of logs/checkpoints"
    )


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[LongContextLM, dict[str, bytes]]:
    """The language model of a checkpoint, in evaluation mode, and its tokenizer's files.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint of this program.
    """
    return model_of(read_content(path), path)


def model_of(
    checkpoint: dict[str, Any], path: str | os.PathLike[str]
) -> tuple[LongContextLM, dict[str, bytes]]:
    """The same of content that was read already; the path is for errors."""
    saved = checkpoint["longctx"]
    if foreign := [name for name in saved.get("tokenizer", ()) if Path(name).name != name]:
        raise ValueError(
            f"checkpoint: expected tokenizer files without a path, got {foreign} in {path}; do not "
            "trust it"
        )
    if missing := [name for name in ("config", "tokenizer") if name not in saved]:
        raise _unfit(path, f"whose part longctx has no {' and no '.join(missing)}")
    prefix = "model."
    weights = {
        name.removeprefix(prefix): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    try:
        model = LongContextLM(ModelConfig.from_dict(saved["config"]), device="meta")
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise _unfit(path, f"whose weights and configuration do not fit: {error}") from error
    return model.eval(), {n: bytes(t.tolist()) for n, t in saved["tokenizer"].items()}
