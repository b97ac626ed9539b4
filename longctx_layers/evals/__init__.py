"""Does a model remember, and how far? Memory tasks, exact scores, and loss over long streams.

from longctx_layers.evals import Passkey, evaluate
score = evaluate(model, Passkey(distance=256), length=131072, n=16)
print(score.accuracy, score.low, score.high, score.chance, score.accuracy_state_zeroed)
"""

from longctx_layers.evals.associative import Mqar
from longctx_layers.evals.distances import ChunkTransfer, DriftCurve
from longctx_layers.evals.perplexity import (
    Slope,
    Stream,
    accuracy_interval,
    buckets,
    drift,
    rotations,
    stream,
)
from longctx_layers.evals.probing import (
    Answers,
    answer,
    has_memory,
    memory,
    reach,
    read,
    zero_memory,
)
from longctx_layers.evals.recall import CopyRecall, Passkey, Recall
from longctx_layers.evals.scoring import Score, effective_length, evaluate, needle_grid, wilson
from longctx_layers.evals.tasks import Batch, Task
from longctx_layers.evals.vocabulary import SYNTHETIC, Vocabulary, text_vocabulary

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Passkey, CopyRecall, DriftCurve, Mqar, ChunkTransfer)
}

__all__ = [
    "TASKS",
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
    "wilson",
    "Answers",
    "answer",
    "read",
    "reach",
    "memory",
    "has_memory",
    "zero_memory",
    "Stream",
    "stream",
    "rotations",
    "accuracy_interval",
    "Slope",
    "drift",
    "buckets",
]
