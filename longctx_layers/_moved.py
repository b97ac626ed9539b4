"""Modules that were moved, importable by their old names."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_LIBRARY = "longctx_layers."
# Old name to new name, both inside the library.
MOVED = {
    "block": "lm.block",
    "config": "lm.config",
    "generation": "lm.generation",
    "liger": "lm.liger",
    "model": "lm.model",
    "pretrained": "lm.pretrained",
    "sizes": "lm.factory",
    "varlen": "packing",
    "calls": "transformers_calls.documents",
    "evals.associative": "evals.tasks",
    "evals.distances": "evals.tasks",
    "evals.prefill": "evals.probing",
    "evals.recall": "evals.tasks",
    "evals.vocabulary": "evals.tasks.vocabulary",
    "layers.ssm": "layers.state_space",
    "ops.blocked_attention": "ops.attention.blocked",
    "ops.dispatch": "ops.backends",
    "ops.far": "ops.attention.far",
    "ops.merge": "ops.attention.far",
    "ops.scan": "ops.state_space.diagonal",
    "ops.triton_support": "ops.availability",
}


class MovedFinder(MetaPathFinder):
    """Finds a module under its old name; both names then mean the same module object."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a moved module, None for any other."""
        new = MOVED.get(fullname.removeprefix(_LIBRARY))
        if new is None or not fullname.startswith(_LIBRARY):
            return None
        warnings.warn(
            f"{fullname} is now {_LIBRARY}{new}; import that instead",
            DeprecationWarning,
            stacklevel=2,
        )
        return ModuleSpec(fullname, _MovedLoader(_LIBRARY + new))


class _MovedLoader(Loader):
    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # importlib has put the old name's there
