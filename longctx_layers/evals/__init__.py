"""Does a model remember, and how far? Memory tasks, exact scores, and loss over long streams.

from longctx_layers.evals import Passkey, evaluate
score = evaluate(model, Passkey(distance=256), length=131072, n=16)
print(score.accuracy, score.low, score.high, score.chance, score.accuracy_state_zeroed)
"""

from longctx_layers.evals.perplexity import Stream, buckets, rotations, stream, token_losses
from longctx_layers.evals.probing import (
    Answers,
    answer,
    has_memory,
    memory,
    reach,
    read,
    zero_memory,
)
from longctx_layers.evals.scoring import Score, effective_length, evaluate, needle_grid
from longctx_layers.evals.statistics import (
    Interval,
    accuracy_interval,
    mean_interval,
    paired_interval,
    wilson,
)
from longctx_layers.evals.tasks import (
    SYNTHETIC,
    TASKS,
    Batch,
    ChunkTransfer,
    CopyRecall,
    DriftCurve,
    Mqar,
    Passkey,
    Recall,
    Task,
    Vocabulary,
    register_task,
    text_vocabulary,
)
from longctx_layers.evals.tasks.drift_curve import Slope, drift

__all__ = [
    "TASKS",
    "register_task",
    "Task",
    "Batch",
    "Recall",
    "Passkey",
    "CopyRecall",
    "DriftCurve",
    "ChunkTransfer",
    "Mqar",
    "Vocabulary",
    "SYNTHETIC",
    "text_vocabulary",
    "Score",
    "evaluate",
    "needle_grid",
    "effective_length",
    "Answers",
    "answer",
    "read",
    "reach",
    "memory",
    "has_memory",
    "zero_memory",
    "Stream",
    "stream",
    "token_losses",
    "rotations",
    "buckets",
    "Slope",
    "drift",
    "Interval",
    "mean_interval",
    "paired_interval",
    "wilson",
    "accuracy_interval",
]
