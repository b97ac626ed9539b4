"""Base class of the transformers models: weights are loaded, tied, initialised and exchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longctx_layers.hf.config import LongCtxConfig
from longctx_layers.layers.init import draw_linear, draw_own, draw_weight, mark_drawn
from longctx_layers.layers.parameters import FULL_PRECISION
from longctx_layers.lm.model import LongContextLM
from longctx_layers.weight_decay import no_weight_decay


class InnerModel(LongContextLM):
    """The `LongContextLM` inside a transformers model.

    The outer model runs inside this module's `forward`, so that hooks and wrappers of this module
    see its calls too.
    """

    def forward(
        self,
        ids: Tensor,
        *args: Any,
        within: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run as a `LongContextLM`, or return `within(ids)`, the outer model's logits."""
        return super().forward(ids, *args, **kwargs) if within is None else within(ids)


Model = TypeVar("Model", bound="LongCtxPreTrainedModel")


class LongCtxPreTrainedModel(PreTrainedModel):
    """Base of transformers models around a `LongContextLM`, which is `self.model`.

    Args:
        config: the shape of the model.
    """

    config_class = LongCtxConfig
    base_model_prefix = "model"  # lets LongContextLM.save_pretrained's weights load
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    _supports_context_parallel = False
    _keep_in_fp32_modules_strict = list(FULL_PRECISION)  # noqa: RUF012
    no_weight_decay = no_weight_decay  # the method that timm calls

    def __init__(self, config: LongCtxConfig) -> None:
        super().__init__(config)
        self.loss_type = (
            "ForCausalLM"  # else derived from the class's name, which subclasses change
        )
        shape = config.to_model_config()
        # The head is always a module, so that transformers can tie, resize and place it.
        self.model = InnerModel(replace(shape, tie_embeddings=False))
        self.model.config = shape
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model that transformers or `LongContextLM.save_pretrained` has saved.

        Args:
            args, kwargs: as for any transformers model: the folder, `dtype`, `device_map` and so
                on.

        Raises:
            ValueError: also for a `device_map` that offloads weights to a disk or to a device that
                does not compute.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if offloaded:
            raise ValueError(
                "from_pretrained: expected a device_map with every block on a device that "
                f"computes, got {len(offloaded)} offloaded weights (such as {offloaded[0]}); a "
                "block needs all of its weights at once: load the model on the CPU, then call "
                "accelerate.cpu_offload or disk_offload(model, ..., "
                "preload_module_classes=['Block'])"
            )
        return loaded

    # ---- Conversion from and to LongContextLM

    @classmethod
    def from_native(cls: type[Model], model: LongContextLM) -> Model:
        """Wrap a `LongContextLM` for transformers. The weights are shared, not copied.

        >>> from longctx_layers.hf import LongCtxForCausalLM
        >>> model = LongCtxForCausalLM.from_native(create_model(256, "tiny", "blade"))
        >>> model.config.pattern
        ['blade']
        """
        config = LongCtxConfig.from_model_config(model.config)
        config.dtype = model.embedding.weight.dtype
        with torch.device("meta"):
            wrapped = cls(config)
        weights = model.state_dict()
        if model.config.tie_embeddings:
            weights["head.weight"] = weights["embedding.weight"]
        wrapped.model.load_state_dict(weights, assign=True)
        wrapped.tie_weights()
        mark_drawn(wrapped)
        wrapped.model.gradient_checkpointing = model.gradient_checkpointing
        return cast("Model", wrapped.train(model.training))

    def to_native(self) -> LongContextLM:
        """Return the model as a plain `LongContextLM`, e.g. to use it without transformers.

        The weights are shared, not copied.
        """
        weights = self.model.state_dict()
        if self.model.config.tie_embeddings:
            del weights["head.weight"]
        native = LongContextLM(self.model.config, device="meta")
        native.load_state_dict(weights, assign=True)
        mark_drawn(native)
        native.gradient_checkpointing = self.model.gradient_checkpointing
        return native.train(self.training)

    # ---- Initial weights and embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module's own parameters: those missing in a checkpoint, or resized."""
        if isinstance(module, nn.Embedding):
            draw_weight(module.weight)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif not draw_own(module) and isinstance(module, nn.Linear):
            draw_linear(module)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of token ids."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of token ids."""
        mark_drawn(value)  # early versions of transformers 5 do not mark resized embeddings
        self.model.embedding = cast("nn.Embedding", value)
        size = self.model.embedding.weight.shape[0]
        self.model.config = replace(self.model.config, vocab_size=size)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, which shares the embedding's weight in a tied model."""
        return cast("nn.Module", self.model.head)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        mark_drawn(new_embeddings)
        self.model.head = cast("nn.Linear", new_embeddings)
