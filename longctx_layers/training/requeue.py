"""SIGUSR1 requests a checkpoint, and under SLURM, which sends it before the time is up, a new job.

Lightning's own handler saves immediately, whatever the signal interrupts: between two batches of a
step, in an optimizer's step, or in a collective operation for which other processes wait. Here the
handler only notes the signal; it is answered when the step is complete on every process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment


class SaveRequests:
    """Notes SIGUSR1 between `listen` and `stop`."""

    def __init__(self) -> None:
        self._requested = False
        self._previous_handler: Any = None

    def listen(self) -> None:
        """Install the handler; Lightning does not add its own to an existing one."""
        if threading.current_thread() is threading.main_thread() and self._previous_handler is None:
            self._previous_handler = signal.signal(signal.SIGUSR1, self._note)

    def stop(self) -> None:
        """Restore the previous handler."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGUSR1, self._previous_handler)
            self._previous_handler = None

    def arrived(self, trainer: L.Trainer) -> bool:
        """Whether any process got the signal since the last call; every process must call it."""
        requested = bool(trainer.strategy.reduce_boolean_decision(self._requested, all=False))
        self._requested = False
        return requested

    def _note(self, number: int, frame: Any) -> None:
        self._requested = True


def requeue() -> None:
    """Put this job back into SLURM's queue; without SLURM, do nothing."""
    if not SLURMEnvironment.detect():
        return
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        problem = result.stderr.strip() if result.returncode else ""
    except OSError as error:
        problem = str(error)
    print(f"SLURM job {job}: {problem or 'requeued'}", flush=True)
