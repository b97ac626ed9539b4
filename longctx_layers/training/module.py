"""The LightningModule: a language model with its loss, its optimizer and its curricula."""

from __future__ import annotations

import random
from typing import Any, NoReturn

import lightning as L
import torch
from torch import Tensor

from longctx_layers import LongContextLM, create_model, detach_state, state_to
from longctx_layers.data.errors import DataError
from longctx_layers.data.module import LongContextData
from longctx_layers.data.trainer_flags import check_end
from longctx_layers.layers.registry import canonical_name
from longctx_layers.lm.loss import IGNORED_LABEL
from longctx_layers.training.checkpoint_io import gather_ranks
from longctx_layers.training.checkpoints import packed_tokenizer
from longctx_layers.training.curriculum import LengthCurriculum, WindowCurriculum, check_schedule
from longctx_layers.training.hardware import shard
from longctx_layers.training.inspection import first_non_finite
from longctx_layers.training.optimization import (
    OptimizerOptions,
    gradient_norm,
    optimizer_class,
)
from longctx_layers.training.options import block_options, check_blocks, check_numbers
from longctx_layers.training.resumption import check_resumption, numeric_options


class NonFiniteError(RuntimeError):
    """The loss or the gradients are NaN or infinite."""


class LanguageModel(L.LightningModule):
    """A causal language model over any of the layers, to be trained on `LongContextData`.

    >>> from longctx_layers.training import LanguageModel
    >>> module = LanguageModel(num_params="tiny", block="dpassm", window_size=64)
    >>> # lightning.Trainer(max_steps=1000).fit(module, datamodule=LongContextData("stdlib"))

    Args:
        num_params: Size of the model: tiny (1 M), 3m, 150m, 250m or 350m. The feed-forward
            width is solved for, so that every block has this number of parameters within 1 %.
        block: Every layer: dpassm (the default), blade, baseline_longformer, baseline_bigbird,
            vanilla or window.
        window_size: Tokens in the attention window (dpassm, window, longformer, bigbird).
        ssm_state_dim: State dimension of dpassm.
        chunk_size: Tokens in a chunk of blade.
        state_dim: State dimension of blade.
        n_global_tokens: First tokens that every query sees (dpassm, longformer, bigbird).
        n_random_tokens: Random keys a block of queries sees (bigbird).
        pattern: Blocks cycled over depth, in place of block: [dpassm, dpassm, vanilla].
        block_kwargs: Further options of the block, {ssm: diagonal}; with a pattern by block name.
        ffn_dim: Feed-forward width, whatever number of parameters results.
        dropout: Dropout of the embedding and of every residual branch.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, about
            a third more time.
        compile: Compile every block with torch.compile.
        learning_rate: Peak learning rate.
        gate_learning_rate: Peak learning rate of the gates between two paths, which are known to
            train slowly; by default twice the learning rate.
        weight_decay: Decay of projections, convolutions and the embedding; nothing else decays.
        optimizer: An optimizer of torch.optim, fused where it can be.
        warmup_steps: Steps of linear warm-up; by default a twentieth of the run, at most 2000.
        final_learning_rate: Where the cosine ends, as a fraction of the peak.
        gradient_clip_val: Norm to which gradients are clipped, 0 for no clipping;
            --trainer.gradient_clip_val comes first.
        length_curriculum: Sequence length by the step from which it holds, {0: 1024, 2000: 8192}.
        mixed_lengths: Draw the length of each step among these, [512, 2048, 8192].
        window_curriculum: Window or chunk size by the step from which it holds, {0: 32, 500: 128};
            the last is the model's own.

    Attributes:
        carried: the layers' state after the last batch, if the data continues there; None before.
        totals: `[2]`, loss and labels since the last step, summed over all ranks.
        norm: of the gradients of the last step, before clipping.
        validated_step: the step whose weights were validated last.

    Raises:
        ValueError, TypeError: for invalid options.
    """

    def __init__(
        self,
        num_params: str = "150m",
        block: str | None = None,
        window_size: int | None = None,
        ssm_state_dim: int | None = None,
        chunk_size: int | None = None,
        state_dim: int | None = None,
        n_global_tokens: int | None = None,
        n_random_tokens: int | None = None,
        pattern: list[str] | None = None,
        block_kwargs: dict[str, Any] | None = None,
        ffn_dim: int | None = None,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        learning_rate: float = 1e-3,
        gate_learning_rate: float | None = None,
        weight_decay: float = 0.1,
        optimizer: str = "AdamW",
        warmup_steps: int | None = None,
        final_learning_rate: float = 0.1,
        gradient_clip_val: float = 1.0,
        length_curriculum: dict[int, int] | None = None,
        mixed_lengths: list[int] | None = None,
        window_curriculum: dict[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # into checkpoints
        if block is not None and pattern is not None:
            raise ValueError("block, pattern: expected one of them, got both; leave one out")
        self.names = tuple(canonical_name(name) for name in pattern or [block or "dpassm"])
        self.block_kwargs = block_options(self.names, self.hparams, block_kwargs)
        check_blocks(num_params, self.block_kwargs)
        optimizer_class(optimizer)
        check_numbers(self.hparams)
        self.num_params = num_params
        self.ffn_dim = ffn_dim
        self.dropout = dropout
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_blocks = compile
        self.gradient_clip_val = gradient_clip_val
        self.optimizer_options = OptimizerOptions(
            optimizer=optimizer,
            learning_rate=learning_rate,
            gate_learning_rate=gate_learning_rate,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            final_learning_rate=final_learning_rate,
        )
        self.lengths = LengthCurriculum(length_curriculum, mixed_lengths)
        check_schedule("window_curriculum", window_curriculum)
        self.window_sizes = window_curriculum
        self.windows: WindowCurriculum | None = None
        self.seed = torch.initial_seed()
        self.loaded_step = 0
        self.begun: int | None = None  # the step that the last batch belongs to
        self.carried: Any = None
        self.totals: Tensor | None = None
        self.validation_totals: Tensor | None = None
        self.norm: Tensor | None = None
        self.validated_step: int | None = None

    # ---- Building

    @property
    def model(self) -> LongContextLM:
        """The language model; the trainer builds it, since it depends on the data's vocabulary."""
        model = self._modules.get("model")
        if not isinstance(model, LongContextLM):
            raise RuntimeError("model: not built yet; the trainer's fit or validate builds it")
        return model

    def check_data(self, length: int, carry_state: bool) -> None:
        """Check that the curricula fit data with rows of `length` tokens, before any is read.

        Raises:
            ValueError: see `LengthCurriculum.check`.
        """
        self.lengths.check(length, carry_state)

    def configure_model(self) -> None:
        """Build the model for the data's vocabulary; its weights depend on the seed alone."""
        if "model" in self._modules:
            return
        torch.manual_seed(self.seed)
        model = create_model(
            LongContextData.of(self.trainer).vocab_size,
            num_params=self.num_params,
            pattern=self.names,
            block_kwargs=self.block_kwargs,
            ffn_dim=self.ffn_dim,
            dropout=self.dropout,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        if self.window_sizes is not None:
            self.windows = WindowCurriculum(model, self.window_sizes)
        if self.compile_blocks:
            for block in model.blocks:
                block.compile()  # in place: the names of parameters do not change
        if self.device_mesh is not None:
            shard(model, self.device_mesh["data_parallel"])
        self._modules["model"] = model

    def configure_optimizers(self) -> Any:
        """The optimizer with its groups, and the schedule of the learning rate."""
        # A fused step unscales gradients by itself, so that they could not be clipped before.
        scales = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        check_end(self.trainer, LongContextData.of(self.trainer).streaming)
        optimizer, schedule = self.optimizer_options.build(
            self.model, int(self.trainer.estimated_stepping_batches), fused=not scales
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    # ---- Training

    @property
    def within_step(self) -> bool:
        """Whether gradients of some batches wait for the optimizer's next step."""
        return self.begun == self.global_step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed random numbers, and drop a carried state that must not be continued."""
        self.begun = self.global_step
        # Random numbers depend on the place in the run alone, so that a resumed run draws the same.
        place = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(random.Random(f"batch {place}").getrandbits(63))
        if LongContextData.of(self.trainer).begins_pass:
            self.carried = None
        if self.windows is not None and self.windows.set(self.global_step):
            self.carried = None  # its cache is as long as the old window

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch: the sum over its labels, divided by the number of its tokens.

        Not by the number of its labels: it differs between ranks and accumulated batches, and every
        label of a step should have the same weight.
        """
        batch = self.lengths.apply(batch, self.global_step, self.seed)
        carries = LongContextData.of(self.trainer).carry_state
        state = None
        if carries and self.carried is not None:
            state = state_to(self.carried, self.device)
        loss, new_state = self.model.loss(
            batch["ids"],
            batch["labels"],
            state,
            segment_ids=batch["segment_ids"],
            reduction="sum",
            return_state=True,
        )
        totals = self.over_ranks(loss, batch["labels"])
        if not torch.isfinite(totals[0]):
            where = first_non_finite(self.model, batch, state)
            self.stop(f"the loss is {(totals[0] / totals[1]).item()}: {where}")
        self.totals = totals if self.totals is None else self.totals + totals
        self.carried = detach_state(new_state) if carries else None
        return loss / batch["ids"].numel()

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the norm of the gradients, and clip them."""
        self.norm = gradient_norm(self.model)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # A scaler skips a step with infinite gradients by itself.
        if scaler is None and not torch.isfinite(self.norm):
            names = [
                name
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None and not torch.isfinite(parameter.grad.sum())
            ]
            self.stop(
                f"the gradient's norm is {self.norm.item()}, first that of {(names or ['?'])[-1]}"
            )
        limit = self.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.model.parameters(), limit)
        elif limit:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, self.norm)

    def stop(self, problem: str) -> NoReturn:
        """Raise NonFiniteError with the problem and the checkpoint to resume from."""
        raise NonFiniteError(
            f"step {self.global_step}: {problem}. Last good checkpoint: "
            f"{self.last_checkpoint() or 'none was written yet'}. Resume from it with --ckpt_path "
            "and other data (--data.seed), or start again with a smaller --model.learning_rate or "
            "--model.gradient_clip_val, or a longer --model.warmup_steps"
        )

    def last_checkpoint(self) -> str:
        """The newest checkpoint of this run, or an empty string."""
        callback = self.trainer.checkpoint_callback
        return str(getattr(callback, "newest", "") or self.trainer.ckpt_path or "")

    # ---- Validation

    def on_validation_epoch_start(self) -> None:
        """Start to add up losses."""
        self.validation_totals = torch.zeros(2, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add up the loss and the labels of a batch."""
        loss = self.model.loss(
            batch["ids"], batch["labels"], segment_ids=batch["segment_ids"], reduction="sum"
        )
        assert self.validation_totals is not None
        self.validation_totals += self.over_ranks(loss, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity."""
        assert self.validation_totals is not None
        total, labels = self.validation_totals
        if not labels:
            raise DataError(
                "--trainer.limit_val_batches: expected validation batches with tokens to predict, "
                "these have none; take more batches, or other documents"
            )
        loss = total / labels
        self.log_dict({"val_loss": loss, "val_perplexity": loss.exp()}, prog_bar=True)
        if not self.trainer.sanity_checking:
            self.validated_step = self.trained_steps
        # By default, Lightning would log them under the previous step, or 0 without training.
        self.log("step", float(self.trained_steps))

    @property
    def trained_steps(self) -> int:
        """Optimizer steps of the weights, also of loaded weights that are only validated."""
        return max(self.global_step, self.loaded_step)

    def over_ranks(self, loss: Tensor, labels: Tensor) -> Tensor:
        """`[2]`: the summed loss and the number of labels, of all ranks."""
        n_labels = (labels != IGNORED_LABEL).sum().to(loss.dtype)
        totals = torch.stack([loss.detach(), n_labels])
        reduced = self.trainer.strategy.reduce(totals, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    # ---- Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's configuration, the tokenizer, the seed and every rank's state."""
        tokenizer = LongContextData.of(self.trainer).tokenizer
        checkpoint["longctx"] = {
            "config": self.model.config.to_dict(),
            "tokenizer": packed_tokenizer(tokenizer),
            "tokenizer_fingerprint": tokenizer.fingerprint,
            **numeric_options(self.trainer, self.gradient_clip_val),
            "seed": self.seed,
            "carried": gather_ranks(self.carried),
            "window": self.windows.now if self.windows is not None else None,
            "within_step": self.within_step,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the seed and this rank's state, before the weights are loaded.

        Raises:
            ResumptionError: if the run cannot be resumed from it, see `check_resumption`.
        """
        saved = checkpoint["longctx"]
        check_resumption(checkpoint, self.trainer, self.gradient_clip_val)
        self.seed = saved["seed"]
        self.loaded_step = checkpoint["global_step"]
        if len(saved["carried"]) == self.trainer.world_size:
            self.carried = saved["carried"][self.global_rank]
        if self.windows is not None and saved["window"] is not None:
            self.windows.resize(saved["window"])  # that of the carried state


def language_model(module: L.LightningModule) -> LanguageModel:
    """A module as a `LanguageModel`, for callbacks that need one.

    Raises:
        TypeError: if it is another module.
    """
    if not isinstance(module, LanguageModel):
        raise TypeError(
            f"callback: expected a LanguageModel, got {type(module).__name__}; Monitor and "
            "Checkpoints work with the modules of longctx_layers.training only"
        )
    return module
