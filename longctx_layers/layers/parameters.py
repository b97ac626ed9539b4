"""Declarations of parameters that must not take weight decay or lose precision."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longctx_layers.layers.init import draw_own

# Parameters that stay in float32 in a model of any dtype, in the form that transformers expects.
FULL_PRECISION = ("state_space.A_log", "state_space.dt_bias", "state_space.log_rate")


class SpecialParameters(nn.Module):
    """Base of modules with parameters that need care in optimizers and casts.

    The module's class declares them, because attributes of a parameter are lost when it is
    replaced, by FSDP2 or by a loader that assigns. `longctx_layers.parameter_groups` and
    transformers' Trainer find the declarations. Where torch keeps the parameter, it also carries
    `_no_weight_decay = True`, as mamba-ssm's do.

    Attributes:
        no_decay: names of parameters that take no weight decay.
        full_precision: names of parameters that stay in float32 (or float64) when the module is
            cast or loaded in a lower precision.
    """

    no_decay: ClassVar[tuple[str, ...]] = ()
    full_precision: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _inform_transformers()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch; widens low precision if declared, and marks the parameter."""
        if param is not None and name in self.full_precision:
            param = _widened(param)
        super().register_parameter(name, param)
        self._mark()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._mark()
        _inform_transformers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if recurse:
            for child in self.children():
                child._apply(fn)
        declared = [
            p for name in self.full_precision if (p := self._parameters.get(name)) is not None
        ]
        kept = {id(tensor) for p in declared for tensor in (p, p.grad)}

        def careful(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if id(tensor) in kept and new.dtype != tensor.dtype:
                # From the original: the new one is rounded already.
                return tensor.to(new.device, precise_dtype(new.dtype))
            return new

        super()._apply(careful, recurse=False)
        self._mark()
        return self

    def _mark(self) -> None:
        for name in self.no_decay:
            if (parameter := self._parameters.get(name)) is not None:
                parameter._no_weight_decay = True  # type: ignore[attr-defined]


class Gate(SpecialParameters, nn.Linear):
    """The projection that weighs two paths: without weight decay, initially zero."""

    no_decay = ("weight", "bias")
    first_scale = 0.0


def is_activation_dtype(dtype: torch.dtype) -> bool:
    """Whether activations may have it: quantised weights hold integers or floats of 8 bits."""
    return dtype.is_floating_point and dtype.itemsize > 1


def weight_of(module: nn.Module) -> Tensor | None:
    """The module's weight, or None if it is stored in another form.

    In torch's own quantised modules `weight` is a method; others call it `qweight` or `W_q`.
    """
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def weight_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the module's weight; None without one, or for a quantised one."""
    weight = weight_of(module)
    return weight.dtype if weight is not None and is_activation_dtype(weight.dtype) else None


def device_of(*modules: nn.Module) -> torch.device:
    """The device of the first of these modules that has a tensor; the CPU if none has.

    Weights that torch packs for int8 products are not tensors, and always on a CPU.
    """
    for module in modules:
        tensors = itertools.chain(module.parameters(), module.buffers())
        if (first := weight_of(module)) is not None or (first := next(tensors, None)) is not None:
            return first.device
    return torch.device("cpu")


def activation_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's activations: that of its first tensor that is not quantised.

    Parameters that always stay in float32 do not count.
    """
    for part in module.modules():
        kept = getattr(part, "full_precision", ())
        for name, tensor in itertools.chain(part._parameters.items(), part._buffers.items()):
            if tensor is not None and name not in kept and is_activation_dtype(tensor.dtype):
                return tensor.dtype
    return torch.get_default_dtype()


def precise_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of full-precision parameters in a module of this dtype; None for the default."""
    return torch.promote_types(torch.get_default_dtype() if dtype is None else dtype, torch.float32)


def declared_no_decay(model: nn.Module, prefix: str = "") -> set[str]:
    """Names of all parameters in a model that this library's modules declare to take no decay."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(prefix=prefix, remove_duplicate=False)
        if isinstance(module, SpecialParameters)
        for name in module.no_decay
    }


def _widened(parameter: nn.Parameter) -> nn.Parameter:
    dtype = precise_dtype(parameter.dtype)
    if dtype == parameter.dtype:
        return parameter
    wide = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
    vars(wide).update(vars(parameter))
    return wide


def _inform_transformers() -> None:
    """Tell transformers about these modules where it offers no way to ask them.

    Runs when a layer is made and transformers is already imported; it is never imported here.
    """
    if "transformers" in sys.modules:
        _inform_trainer()
        _inform_loader()


def _inform_trainer() -> None:
    """Make transformers' Trainer leave out the parameters that take no weight decay.

    It decides by names of parameters and classes of modules, without asking the model. So its
    function that lists these names is wrapped.
    """
    utils: Any = importlib.import_module("transformers.trainer_pt_utils")
    original = getattr(utils, "get_parameter_names", None)
    if original is None:
        warnings.warn(
            "transformers: expected trainer_pt_utils.get_parameter_names, which this version "
            "lacks, so its Trainer may decay time scales, gates and norms; pass an optimizer over "
            "longctx_layers.parameter_groups(model, weight_decay=...)",
            stacklevel=2,
        )
        return
    if hasattr(original, "honours_declarations"):
        return

    @functools.wraps(original)
    def get_parameter_names(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
        quiet = declared_no_decay(model)
        return [name for name in original(model, *args, **kwargs) if name not in quiet]

    get_parameter_names.honours_declarations = True  # type: ignore[attr-defined]
    utils.get_parameter_names = get_parameter_names
    # The Trainer may have been imported before.
    trainer = sys.modules.get("transformers.trainer")
    if getattr(trainer, "get_parameter_names", None) is original:
        trainer.get_parameter_names = get_parameter_names  # type: ignore[union-attr]


def _inform_loader() -> None:
    """Make `from_pretrained` of any transformers model initialise weights that a checkpoint lacks.

    transformers asks the outermost model to initialise each module's own parameters. A model that
    merely contains these layers does not know them: they would stay uninitialised memory.
    """
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    base: Any = getattr(modeling, "PreTrainedModel", None)
    original = getattr(base, "_initialize_weights", None)
    if original is None or hasattr(original, "draws_layers"):
        return

    @functools.wraps(original)
    def _initialize_weights(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not getattr(module, "_is_hf_initialized", False) and draw_own(module):
            module._is_hf_initialized = True  # type: ignore[assignment]
        else:
            original(self, module, *args, **kwargs)

    _initialize_weights.draws_layers = True  # type: ignore[attr-defined]
    base._initialize_weights = _initialize_weights
