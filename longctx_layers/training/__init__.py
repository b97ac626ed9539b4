"""Training of language models with Lightning, and what surrounds it.

`python -m longctx_layers.training.train fit --help` is the program. As a library, `LanguageModel`,
`Monitor`, `Checkpoints` and `AtomicCheckpointIO` are a module, callbacks and a plugin for
`lightning.Trainer`, together with `longctx_layers.data.LongContextData`. `load_trained` reads what
it wrote, `export` turns a checkpoint into a folder for `from_pretrained`, and `fit` is a small loop
for experiments without Lightning.

>>> from longctx_layers.training import Checkpoints, LanguageModel
>>> module = LanguageModel(num_params="tiny", block="window", window_size=32)
>>> callback = Checkpoints(every_n_steps=100)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longctx_layers.training.checkpoint_files import newest_checkpoint
    from longctx_layers.training.checkpoint_io import AtomicCheckpointIO
    from longctx_layers.training.checkpoints import Trained, load_trained, read_checkpoint
    from longctx_layers.training.loop import ProgressBar, fit
    from longctx_layers.training.module import LanguageModel, NonFiniteError
    from longctx_layers.training.monitoring import Monitor
    from longctx_layers.training.optimization import (
        OptimizerOptions,
        parameter_groups,
        warmup_cosine,
    )
    from longctx_layers.training.saving import Checkpoints

__all__ = [
    "LanguageModel",
    "Monitor",
    "Checkpoints",
    "AtomicCheckpointIO",
    "NonFiniteError",
    "Trained",
    "load_trained",
    "read_checkpoint",
    "newest_checkpoint",
    "OptimizerOptions",
    "parameter_groups",
    "warmup_cosine",
    "fit",
    "ProgressBar",
]

# Imported on first use: only some of them need Lightning.
_MODULES = {
    "module": ("LanguageModel", "NonFiniteError"),
    "monitoring": ("Monitor",),
    "saving": ("Checkpoints",),
    "checkpoint_io": ("AtomicCheckpointIO",),
    "checkpoint_files": ("newest_checkpoint",),
    "checkpoints": ("Trained", "load_trained", "read_checkpoint"),
    "optimization": ("OptimizerOptions", "parameter_groups", "warmup_cosine"),
    "loop": ("fit", "ProgressBar"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
