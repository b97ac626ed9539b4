"""What every model here has: its weights, loaded, tied, drawn and handed to and fro."""

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
    """A `LongContextLM` inside a model of transformers.

    The outer model's call passes through this one's, so that hooks and wrappers of it take part.
    """

    def forward(
        self,
        ids: Tensor,
        *args: Any,
        within: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `LongContextLM` has it; or `within(ids)`, what the outer model makes of the tokens."""
        return super().forward(ids, *args, **kwargs) if within is None else within(ids)


Model = TypeVar("Model", bound="LongCtxPreTrainedModel")


class LongCtxPreTrainedModel(PreTrainedModel):
    """A `LongContextLM`, `self.model`, whose weights transformers can manage.

    Args:
        config: the shape of the model.
    """

    config_class = LongCtxConfig
    base_model_prefix = "model"  # so that weights of LongContextLM.save_pretrained find their place
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    _supports_context_parallel = False
    _keep_in_fp32_modules_strict = list(FULL_PRECISION)  # noqa: RUF012
    no_weight_decay = no_weight_decay  # by this name timm asks a model

    def __init__(self, config: LongCtxConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # else by the class's name, which a subclass chooses
        shape = config.to_model_config()
        # With a head of its own, which transformers ties, resizes and places on a device.
        self.model = InnerModel(replace(shape, tie_embeddings=False))
        self.model.config = shape
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it; folders of `LongContextLM.save_pretrained` will do as well.

        Raises:
            ValueError: also for a `device_map` that leaves blocks on a disk, or off the device that
                computes them.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if away:
            raise ValueError(
                "from_pretrained: expected a device_map with every block on a device that "
                f"computes, got {len(away)} weights that are offloaded ({away[0]}); a block needs "
                "all of its weights at once: load the model on the CPU, then call "
                "accelerate.cpu_offload or disk_offload(model, ..., "
                "preload_module_classes=['Block'])"
            )
        return loaded

    # ---- The model of transformers and our own, back and forth

    @classmethod
    def from_native(cls: type[Model], model: LongContextLM) -> Model:
        """The same model for transformers; both share their weights."""
        config = LongCtxConfig.from_model_config(model.config)
        config.dtype = model.embedding.weight.dtype
        with torch.device("meta"):
            made = cls(config)
        weights = model.state_dict()
        if model.config.tie_embeddings:
            weights["head.weight"] = weights["embedding.weight"]
        made.model.load_state_dict(weights, assign=True)
        made.tie_weights()
        mark_drawn(made)
        made.model.gradient_checkpointing = model.gradient_checkpointing
        return cast("Model", made.train(model.training))

    def to_native(self) -> LongContextLM:
        """The same model without transformers, e.g. to save it for `LongContextLM.from_pretrained`.

        Both share their weights.
        """
        weights = self.model.state_dict()
        if self.model.config.tie_embeddings:
            del weights["head.weight"]
        native = LongContextLM(self.model.config, device="meta")
        native.load_state_dict(weights, assign=True)
        mark_drawn(native)
        native.gradient_checkpointing = self.model.gradient_checkpointing
        return native.train(self.training)

    # ---- Weights: first values, embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what one module holds itself: what a checkpoint lacked, or a resized embedding."""
        if isinstance(module, nn.Embedding):
            draw_weight(module.weight)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif not draw_own(module) and isinstance(module, nn.Linear):
            draw_linear(module)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of token ids."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of token ids."""
        mark_drawn(value)  # as early versions of transformers 5 do not, of what they resized
        self.model.embedding = cast("nn.Embedding", value)
        size = self.model.embedding.weight.shape[0]
        self.model.config = replace(self.model.config, vocab_size=size)

    def get_output_embeddings(self) -> nn.Module:
        """The head, whose weight is the embedding's in a tied model."""
        return cast("nn.Module", self.model.head)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        mark_drawn(new_embeddings)
        self.model.head = cast("nn.Linear", new_embeddings)
