"""Memory tasks: one file each, named as `--task` names it.

To add a task, write a file with a subclass of `Task` under `@register_task` and import it here.
"""

from longctx_layers.evals.tasks.base import TASKS, Batch, Task, put, register_task
from longctx_layers.evals.tasks.chunk_transfer import ChunkTransfer
from longctx_layers.evals.tasks.copy_recall import CopyRecall
from longctx_layers.evals.tasks.drift_curve import DriftCurve
from longctx_layers.evals.tasks.mqar import Mqar
from longctx_layers.evals.tasks.passkey import Passkey
from longctx_layers.evals.tasks.recall import Recall
from longctx_layers.evals.tasks.vocabulary import SYNTHETIC, Vocabulary, text_vocabulary

__all__ = [
    "TASKS",
    "register_task",
    "Task",
    "Batch",
    "put",
    "Recall",
    "Passkey",
    "CopyRecall",
    "DriftCurve",
    "ChunkTransfer",
    "Mqar",
    "Vocabulary",
    "SYNTHETIC",
    "text_vocabulary",
]
