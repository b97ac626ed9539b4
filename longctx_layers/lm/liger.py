"""Liger-Kernel for the other parts of a model: RMSNorm, SwiGLU and cross-entropy."""

from __future__ import annotations

from functools import partial
from importlib import import_module, util
from typing import Any

from torch import Tensor, nn

from longctx_layers.lm.block import SwiGLU
from longctx_layers.lm.model import LongContextLM
from longctx_layers.ops.second_order import twice_differentiable

INSTALLED = util.find_spec("liger_kernel") is not None


# Liger's functions, loaded by the first `use_liger`: torch.compile cannot trace an import.
_functions: Any = None


def _call(name: str, *args: Any, **kwargs: Any) -> Tensor:
    function = getattr(_functions, name)
    result: Tensor = twice_differentiable(function, _refuse_second_order, *args, **kwargs)
    return result


def _refuse_second_order(*_: Any, **__: Any) -> Tensor:
    # They cannot be computed: Liger overwrites its inputs with their gradients.
    raise RuntimeError(
        "create_graph=True: expected create_graph=False, since Liger-Kernel's functions have no "
        "second derivatives; differentiate a model without use_liger"
    )


class _Norm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        # All in float32, as in torch. Not in place: the residual stream reads the gradient as well.
        options = {"casting_mode": "gemma", "in_place": False}
        return _call("liger_rms_norm", x, self.weight, self.eps, **options)


class _FeedForward(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(_call("liger_swiglu", self.gate_proj(x), self.up_proj(x)))
        return y


_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {nn.RMSNorm: _Norm, SwiGLU: _FeedForward}


def use_liger(model: LongContextLM) -> LongContextLM:
    """Make a model faster on a GPU: its norms, feed-forward layers and loss use Liger-Kernel.

    The model is changed in place. Parameters keep their names, so checkpoints fit with and without
    Liger; a model that was loaded has to be passed here again. Gradients with `create_graph=True`
    are refused.

    Returns:
        The model itself.

    Raises:
        ImportError: without Liger-Kernel.

    Source: Hsu et al., Liger Kernel, arXiv 2410.10989.
    """
    if not INSTALLED:
        raise ImportError(
            "use_liger: expected the package liger-kernel, which is not installed; "
            "pip install 'longctx-layers[liger]'"
        )
    global _functions
    _functions = import_module("liger_kernel.transformers.functional")
    for module in model.modules():
        if type(module) in _REPLACEMENTS:
            module.__class__ = _REPLACEMENTS[type(module)]
    model.cross_entropy = partial(_call, "liger_cross_entropy")
    return model
