"""When checkpoints are written, and which of them are kept."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from longctx_layers.files import check_writable
from longctx_layers.training.checkpoint_files import FOLDER, Facts, facts, folder_facts
from longctx_layers.training.requeue import SaveRequests, requeue


class Checkpoints(Checkpoint):
    """Keeps the newest checkpoints of a run, `<default_root_dir>/checkpoints/step=*.ckpt`.

    A checkpoint is written after an optimizer step, once for that step and never between two
    batches whose gradients are accumulated. Where validation follows the step, it is written after
    the validation, so that a resumed run does not leave that out.

    Args:
        every_n_steps: Optimizer steps between two checkpoints; one more is written at the end, and
            one after the step in which SIGUSR1 arrives. 0 for these only.
        keep: How many of the newest are kept, -1 for all, 0 to write none. Those that the same run
            wrote before it was resumed count; files of other runs are left alone.
        skip_damaged: With --ckpt_path=last, take the newest intact checkpoint where the newest file
            is damaged, in place of an error.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 3, skip_damaged: bool = False) -> None:
        for name, value, least in (("every_n_steps", every_n_steps, 0), ("keep", keep, -1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.every_n_steps, self.keep, self.skip_damaged = every_n_steps, keep, skip_damaged
        self.newest = ""  # the path of the last one written or resumed from
        self.run = uuid.uuid4().hex
        # Runs that this one continues, and the last step of theirs that it shares.
        self.ancestors: list[list[Any]] = []
        self.folder = Path(FOLDER)
        self._kept: list[Facts] = []  # oldest first; on the first process, which removes them
        self._saved = 0  # the step of the last one
        self._requests = SaveRequests()
        self._requested = False
        self._after_validation = False
        self._stop_after_step = False

    # ---- Hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the folder can be written, and remove what a killed run left half-written."""
        self.folder = Path(trainer.default_root_dir, FOLDER)
        if stage != "fit" or trainer.fast_dev_run or not self.keep:
            return
        self._requests.listen()
        if trainer.is_global_zero and "://" not in str(trainer.default_root_dir):
            check_writable(self.folder, "--trainer.default_root_dir")
            for partial in self.folder.glob(".*.ckpt.*"):
                partial.unlink()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._requests.stop()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the checkpoints that the run wrote before it was resumed."""
        self._saved = trainer.global_step
        path = trainer.ckpt_path
        if path is None:
            return
        self.newest = str(path)
        if not trainer.is_global_zero or not Path(path).is_file():
            return
        found = [one for one in folder_facts(self.folder) if one.readable]
        resumed = facts(Path(path))
        if resumed.run != self.run or any(
            one.run == self.run and one.step > resumed.step for one in found
        ):
            # Another course from a step that is not the last: what lies beyond it is not ours.
            self.ancestors = [*self.ancestors, [resumed.run, resumed.step]]
            self.run = uuid.uuid4().hex
        self._kept = sorted((o for o in found if self._is_own(o)), key=lambda one: one.step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if the batch completed a step for which one is due."""
        if self._must_wait(trainer, pl_module):
            return
        if self._stop_after_step:
            trainer.should_stop, self._stop_after_step = True, False
        self._requested = self._requests.arrived(trainer)
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if self._requested or due:
            self._after_validation = _validation_follows(trainer)
            if not self._after_validation:
                self._write(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the checkpoint that waited for this validation."""
        if trainer.state.fn == "fit" and not self._must_wait(trainer, pl_module):
            if self._after_validation:
                self._write(trainer)
            self._after_validation = False

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the last one, unless it is there."""
        if not pl_module.within_step:
            self._write(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Say where to go on from after a full or read-only disk; nothing is written."""
        if isinstance(exception, OSError) and trainer.is_global_zero:
            print(f"The last good checkpoint: {self.newest or 'none was written'}", file=sys.stderr)

    # ---- State

    def state_dict(self) -> dict[str, Any]:
        return {"run": self.run, "ancestors": self.ancestors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.run, self.ancestors = state_dict["run"], state_dict["ancestors"]

    # ---- Writing

    def _must_wait(self, trainer: L.Trainer, pl_module: Any) -> bool:
        """Whether gradients are accumulating; a request to stop waits for the step, too."""
        if pl_module.within_step and trainer.should_stop:
            trainer.should_stop, self._stop_after_step = False, True
        return bool(pl_module.within_step)

    def _write(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        if not (trainer.fast_dev_run or not self.keep or step == self._saved):
            self._save(trainer, step)
        if self._requested and trainer.is_global_zero:
            requeue()
        self._requested = False

    def _save(self, trainer: L.Trainer, step: int) -> None:
        self._saved = step
        path = trainer.strategy.broadcast(str(self._place(step)))
        for logger in trainer.loggers:
            logger.save()  # what a resumed run will not log again
        trainer.save_checkpoint(path)
        self.newest = path
        if not trainer.is_global_zero:
            return
        # One of this step is there already if the run was resumed from an earlier one.
        self._kept = [one for one in self._kept if str(one.path) != path]
        self._kept.append(Facts(Path(path), step, self.run, 0))
        while 0 < self.keep < len(self._kept):
            trainer.strategy.remove_checkpoint(str(self._kept.pop(0).path))

    def _place(self, step: int) -> Path:
        """Where a checkpoint goes: never on that of another run."""
        path, version = self.folder / f"step={step:08d}.ckpt", 0
        while path.is_file() and (found := facts(path)).readable and not self._is_own(found):
            version += 1
            path = self.folder / f"step={step:08d}-v{version}.ckpt"
        return path

    def _is_own(self, found: Facts) -> bool:
        return found.run == self.run or any(
            found.run == run and found.step <= step for run, step in self.ancestors
        )


def _validation_follows(trainer: L.Trainer) -> bool:
    """Whether the trainer is about to validate, after the batch that it has just finished."""
    loop = trainer.fit_loop
    follows = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
    # Clocks differ where validation goes by time, and all processes must do the same.
    return bool(trainer.strategy.broadcast(follows))
