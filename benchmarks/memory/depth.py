"""Where does a memory fail? Accuracy by depth, and with the early state of one layer restored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.memory.plan import DISTANCE, TRAINED, Depths
from longctx_layers import LongContextLM
from longctx_layers.evals import Batch, Passkey, evaluate, memory, needle_grid, read
from longctx_layers.lm.loss import IGNORED_LABEL


def depth_rows(run: Depths, model: LongContextLM) -> dict[str, Any]:
    """Accuracy by the position of the value.

    For a value at the beginning, also with a state exchanged, and with noise before the value.
    """
    rows: list[dict[str, Any]] = []
    for depth, task in needle_grid(run.depths, Passkey(distance=DISTANCE)).items():
        score = evaluate(model, task, run.length, n=run.n, seed=2000 + run.seed, probe=False)
        rows.append(
            {
                "depth": depth,
                "accuracy": score.accuracy,
                "low": score.low,
                "high": score.high,
                "length": run.length,
            }
        )
    task = Passkey(distance=DISTANCE, depth=0.0)
    batch = task.draw(run.n, run.length, torch.Generator().manual_seed(3000 + run.seed))
    noise = batch.ids[:, task.told_length :][:, : run.before]
    return {
        "length": run.length,
        "n": run.n,
        "early": run.early,
        "before": run.before,
        "rows": rows,
        **with_early_memory(model, batch, run.early),
        "preceded": with_noise_before(model, batch, noise),
    }


@torch.no_grad()
def with_early_memory(model: LongContextLM, batch: Batch, early: int) -> dict[str, float]:
    """Accuracy as it is, and if a layer's recurrent state were that after `early` tokens.

    The state is exchanged once, `TRAINED` tokens before the question: that of the first layer,
    which takes in the noise, or that of the last layer, which holds the value.
    """
    cut = batch.asked - TRAINED
    young = read(model, batch.ids[:, :early])
    old = read(model, batch.ids[:, early:cut], young)

    def accuracy(*layers: int) -> float:
        state = list(old)
        for i in layers:
            state[i] = old[i]._replace(**memory(model, young)[i])
        return _accuracy(model, batch, cut, tuple(state))

    return {"as_is": accuracy(), "first_early": accuracy(0), "last_early": accuracy(-1)}


@torch.no_grad()
def with_noise_before(model: LongContextLM, batch: Batch, noise: Tensor) -> float:
    """Accuracy if the model reads some noise before the value."""
    cut = batch.asked - TRAINED
    return _accuracy(model, batch, cut, read(model, torch.cat([noise, batch.ids[:, :cut]], 1)))


def _accuracy(model: LongContextLM, batch: Batch, cut: int, state: Any) -> float:
    hidden, _ = model.backbone(batch.ids[:, cut:], state)
    labels = batch.labels[:, cut:]
    asked = labels != IGNORED_LABEL
    right = model.project(hidden[asked]).argmax(-1) == labels[asked]
    return right.double().mean().item()
