"""SIGUSR1 asks for a checkpoint, and under SLURM, which sends it in time, for another job.

Lightning's own handler writes in the midst of whatever the signal interrupts: between two batches
of a step, in an optimizer's step, or in a collective that other processes wait in. Here the signal
is noted, and answered once the optimizer's step is complete on every process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment


class SaveRequests:
    """Notes SIGUSR1 from `listen` to `stop`."""

    def __init__(self) -> None:
        self._noted = False
        self._before: Any = None

    def listen(self) -> None:
        """Install the handler; Lightning adds none of its own where there is one."""
        if threading.current_thread() is threading.main_thread() and self._before is None:
            self._before = signal.signal(signal.SIGUSR1, self._note)

    def stop(self) -> None:
        """Put the earlier handler back."""
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)
            self._before = None

    def arrived(self, trainer: L.Trainer) -> bool:
        """Whether one came to any process since the last call; called by all of them."""
        noted = bool(trainer.strategy.reduce_boolean_decision(self._noted, all=False))
        self._noted = False
        return noted

    def _note(self, number: int, frame: Any) -> None:
        self._noted = True


def requeue() -> None:
    """Put this job back into SLURM's queue; elsewhere there is nothing to do."""
    if not SLURMEnvironment.detect():
        return
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        said = result.stderr.strip() if result.returncode else ""
    except OSError as error:
        said = str(error)
    print(f"SLURM job {job}: {said or 'requeued'}", flush=True)
