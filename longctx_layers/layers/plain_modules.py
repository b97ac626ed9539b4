"""Whether a module is plain: then its weights may be used without calling it, or call by call."""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple("_global" + name for name in _HOOKS)
# Fake tensors replace plain ones while a call is traced or its memory is estimated.
_PLAIN_WEIGHTS = (Tensor, nn.Parameter, FakeTensor)


def works_by_token(*modules: nn.Module) -> bool:
    """Whether modules may be called a few rows and tokens at a time instead of once.

    True only for linear layers and modules of this library with plain weights and without hooks.
    Hooks would see parts of a call. Other modules (adapters chosen by row, activations that are
    quantised together, modules with a state) may depend on the rest of the batch.
    """
    if _global_hooks():
        return False
    return all(_is_plain(part) for module in modules for part in module.modules())


def may_bypass(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether an operation may use the modules' weights instead of calling the modules.

    True only if nothing can tell the difference: modules of exactly this class, with plain
    weights and without hooks.
    """
    if _global_hooks():
        return False
    return all(type(module) is kind and _is_unchanged(module) for module in modules)


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks that see its calls or change them."""
    return any(getattr(module, name) for name in _HOOKS)


def _global_hooks() -> bool:
    return any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)


def _is_plain(module: nn.Module) -> bool:
    kind = type(module)
    if kind is not nn.Linear and not kind.__module__.startswith("longctx_layers."):
        return False
    return _is_unchanged(module)


def _is_unchanged(module: nn.Module) -> bool:
    if has_hooks(module) or "forward" in module.__dict__:
        return False
    weights = (*module._parameters.values(), *module._buffers.values())
    return all(weight is None or type(weight) in _PLAIN_WEIGHTS for weight in weights)
