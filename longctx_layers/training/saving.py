"""When checkpoints are written, and which ones are kept."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from longctx_layers.data.trainer_flags import is_trial
from longctx_layers.files import check_writable
from longctx_layers.training.checkpoint_files import FOLDER, Facts, facts, folder_facts
from longctx_layers.training.module import language_model
from longctx_layers.training.requeue import SaveRequests, requeue


class Checkpoints(Checkpoint):
    """Keeps the newest checkpoints of a run, `<default_root_dir>/checkpoints/step=*.ckpt`.

    A checkpoint is written after an optimizer step, once per step and never between two batches
    whose gradients are accumulated. If validation follows the step, it is written after the
    validation, so that a resumed run does not skip it.

    >>> callback = Checkpoints(every_n_steps=100, keep=2)
    >>> # lightning.Trainer(callbacks=[callback], plugins=[AtomicCheckpointIO()])

    Args:
        every_n_steps: Optimizer steps between two checkpoints; another one is written at the end,
            and one after the step in which SIGUSR1 arrives. 0 for these only.
        keep: How many of the newest are kept, -1 for all, 0 to write none. Those that the same run
            wrote before it was resumed count; files of other runs are left alone.
        skip_damaged: With --ckpt_path=last, use the newest intact checkpoint if the newest file is
            damaged, instead of an error.

    Attributes:
        newest: the path of the last checkpoint written or resumed from.
        run: the id of this run.
        ancestors: `[run, step]` of the runs that this one continues: the last step they share.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 3, skip_damaged: bool = False) -> None:
        for name, value, least in (("every_n_steps", every_n_steps, 0), ("keep", keep, -1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.skip_damaged = skip_damaged
        self.newest = ""
        self.run = uuid.uuid4().hex
        self.ancestors: list[list[Any]] = []
        self.folder = Path(FOLDER)
        self._files: list[Facts] = []  # oldest first; on the first process, which removes them
        self._saved_step = 0
        self._requests = SaveRequests()
        self._requested = False
        self._after_validation = False
        self._stop_after_step = False

    # ---- Hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the folder can be written, and remove half-written files of a killed run."""
        self.folder = Path(trainer.default_root_dir, FOLDER)
        if stage != "fit" or is_trial(trainer) or not self.keep:
            return
        self._requests.listen()
        if trainer.is_global_zero and "://" not in str(trainer.default_root_dir):
            check_writable(self.folder, "--trainer.default_root_dir")
            for partial in self.folder.glob(".*.ckpt.*"):
                partial.unlink()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop listening to SIGUSR1."""
        self._requests.stop()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the checkpoints that the run wrote before it was resumed."""
        self._saved_step = trainer.global_step
        path = trainer.ckpt_path
        if path is None:
            return
        self.newest = str(path)
        if not trainer.is_global_zero or not Path(path).is_file():
            return
        readable = [file for file in folder_facts(self.folder) if file.readable]
        resumed = facts(Path(path))
        if resumed.run != self.run or any(
            file.run == self.run and file.step > resumed.step for file in readable
        ):
            # The run branches off before its last checkpoint: the later ones stay with the old run.
            self.ancestors = [*self.ancestors, [resumed.run, resumed.step]]
            self.run = uuid.uuid4().hex
        self._files = [file for file in readable if self._is_own(file)]
        self._files.sort(key=lambda file: file.step)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write a checkpoint if the batch completed a step for which one is due."""
        if self._must_wait(trainer, pl_module):
            return
        if self._stop_after_step:
            trainer.should_stop = True
            self._stop_after_step = False
        self._requested = self._requests.arrived(trainer)
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if self._requested or due:
            self._after_validation = _validation_follows(trainer)
            if not self._after_validation:
                self._write(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the checkpoint that waited for this validation."""
        if trainer.state.fn == "fit" and not self._must_wait(trainer, pl_module):
            if self._after_validation:
                self._write(trainer)
            self._after_validation = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last checkpoint, unless it was written before."""
        if not language_model(pl_module).within_step:
            self._write(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Print the last good checkpoint after an error of the disk; nothing is written."""
        if isinstance(exception, OSError) and trainer.is_global_zero:
            print(f"The last good checkpoint: {self.newest or 'none was written'}", file=sys.stderr)

    # ---- State

    def state_dict(self) -> dict[str, Any]:
        """The run and its ancestors."""
        return {"run": self.run, "ancestors": self.ancestors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the run of a checkpoint."""
        self.run = state_dict["run"]
        self.ancestors = state_dict["ancestors"]

    # ---- Writing

    def _must_wait(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Whether gradients are accumulating; a request to stop then waits for the step."""
        within_step = language_model(pl_module).within_step
        if within_step and trainer.should_stop:
            trainer.should_stop = False
            self._stop_after_step = True
        return within_step

    def _write(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        if self.keep and not is_trial(trainer) and step != self._saved_step:
            self._save(trainer, step)
        if self._requested and trainer.is_global_zero:
            requeue()
        self._requested = False

    def _save(self, trainer: L.Trainer, step: int) -> None:
        self._saved_step = step
        path = trainer.strategy.broadcast(str(self._place(step)))
        for logger in trainer.loggers:
            logger.save()  # a resumed run will not log these steps again
        trainer.save_checkpoint(path)
        self.newest = path
        if not trainer.is_global_zero:
            return
        # If the run was resumed from an earlier step, it may have written this step before.
        self._files = [file for file in self._files if str(file.path) != path]
        self._files.append(Facts(Path(path), step, self.run, 0))
        while 0 < self.keep < len(self._files):
            trainer.strategy.remove_checkpoint(str(self._files.pop(0).path))

    def _place(self, step: int) -> Path:
        """The file for a checkpoint; a file of another run is never overwritten."""
        path = self.folder / f"step={step:08d}.ckpt"
        version = 0
        while path.is_file() and (file := facts(path)).readable and not self._is_own(file):
            version += 1
            path = self.folder / f"step={step:08d}-v{version}.ckpt"
        return path

    def _is_own(self, file: Facts) -> bool:
        return file.run == self.run or any(
            file.run == run and file.step <= step for run, step in self.ancestors
        )


def _validation_follows(trainer: L.Trainer) -> bool:
    """Whether the trainer will validate next, after the batch that it has just finished."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    follows = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
    # If validation is by time, the clocks of processes differ, but all must do the same.
    return bool(trainer.strategy.broadcast(follows))
