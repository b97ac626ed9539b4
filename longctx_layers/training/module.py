"""The LightningModule: a language model with its loss, its optimizer and its curricula."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import torch
from torch import Tensor

from longctx_layers import LongContextLM, create_model, detach_state, state_to
from longctx_layers.data.errors import DataError
from longctx_layers.data.trainer_flags import check_end
from longctx_layers.layers.registry import canonical_name
from longctx_layers.lm.model import IGNORED_LABEL
from longctx_layers.training import optimization
from longctx_layers.training.checkpoints import gather_ranks, packed_tokenizer
from longctx_layers.training.curriculum import (
    WindowCurriculum,
    check_lengths,
    check_schedule,
    drawn_length,
    fold,
    stage,
)
from longctx_layers.training.hardware import shard
from longctx_layers.training.inspection import first_non_finite
from longctx_layers.training.options import block_options, check_blocks, check_numbers
from longctx_layers.training.resumption import check_resumption, numeric_options


class NonFiniteError(RuntimeError):
    """The loss or the gradients are NaN or infinite."""


class LanguageModel(L.LightningModule):
    """A causal language model over any of the layers.

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
        self.save_hyperparameters()
        if block is not None and pattern is not None:
            raise ValueError("block, pattern: expected one of them, got both; leave one out")
        self.names = tuple(canonical_name(name) for name in pattern or [block or "dpassm"])
        self.block_kwargs = block_options(self.names, self.hparams, block_kwargs)
        check_blocks(num_params, self.block_kwargs)
        optimization.optimizer_class(optimizer)
        check_numbers(self.hparams)
        check_schedule("length_curriculum", length_curriculum)
        check_schedule("window_curriculum", window_curriculum)
        if length_curriculum is not None and mixed_lengths is not None:
            raise ValueError("length_curriculum, mixed_lengths: expected one of them, got both")
        # Not from hparams, where the steps have become strings.
        self.lengths, self.window_sizes = length_curriculum, window_curriculum
        self.model: LongContextLM | None = None
        self.windows: WindowCurriculum | None = None
        self.seed = torch.initial_seed()
        self.loaded_step = 0
        self.begun: int | None = None  # the step that the last batch belongs to
        self.carried: Any = None  # the state behind the last batch, where the data go on from it
        self.totals: Tensor | None = None  # loss and labels since the last step, over all ranks
        self.validation_totals: Tensor | None = None
        self.norm: Tensor | None = None  # of the gradients, before clipping
        self.validated_step: int | None = None  # of the weights that were validated last

    # ---- Building

    def check_data(self, length: int, carry_state: bool) -> None:
        """Whether the curricula fit the data; before any is read.

        Raises:
            ValueError: if a length does not divide the data's, or a carried state is cut apart.
        """
        mixed = self.hparams.mixed_lengths
        lengths = list((self.lengths or {}).values()) if mixed is None else mixed
        if mixed is None and self.lengths is None:
            return
        name = "length_curriculum" if mixed is None else "mixed_lengths"
        check_lengths(name, lengths, length)
        if carry_state:
            raise ValueError(
                f"{name}: expected data whose rows are apart, got --data.carry_state=True, where "
                "each batch goes on from the one before; leave one of them out"
            )

    def configure_model(self) -> None:
        """Build the model, for the data's vocabulary; the same weights whatever came before."""
        if self.model is not None:
            return
        torch.manual_seed(self.seed)
        self.model = create_model(
            self.trainer.datamodule.vocab_size,
            num_params=self.hparams.num_params,
            pattern=self.names,
            block_kwargs=self.block_kwargs,
            ffn_dim=self.hparams.ffn_dim,
            dropout=self.hparams.dropout,
            gradient_checkpointing=self.hparams.gradient_checkpointing,
        )
        if self.window_sizes is not None:
            self.windows = WindowCurriculum(self.model, self.window_sizes)
        if self.hparams.compile:
            for block in self.model.blocks:
                block.compile()  # in place: names of parameters stay as they are
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """AdamW or another, its groups, and the schedule."""
        options = self.hparams
        gate_rate = options.gate_learning_rate
        groups = optimization.parameter_groups(
            self.model,
            learning_rate=options.learning_rate,
            gate_learning_rate=2 * options.learning_rate if gate_rate is None else gate_rate,
            weight_decay=options.weight_decay,
        )
        # A fused step unscales gradients by itself, and so leaves none to clip.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer = optimization.build_optimizer(options.optimizer, groups, fused=not scaled)
        check_end(self.trainer, self.trainer.datamodule.streaming)
        total = self.trainer.estimated_stepping_batches
        warmup = options.warmup_steps
        if warmup is None:
            warmup = min(2000, int(total) // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: optimization.warmup_cosine(
                step, warmup=warmup, total=int(total), final=options.final_learning_rate
            ),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    # ---- Training

    @property
    def within_step(self) -> bool:
        """Whether batches were taken whose gradients the optimizer has not seen yet."""
        return self.begun == self.global_step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.begun = self.global_step
        # Randomness is a function of the place in the run alone: a resumed run, which has done
        # other things before, draws the same.
        place = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(random.Random(f"batch {place}").getrandbits(63))
        if self.trainer.datamodule.begins_pass:
            self.carried = None
        if self.windows is not None and self.windows.set(self.global_step):
            self.carried = None  # its cache is as long as the window was

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch: the sum over its labels, by the number of its tokens.

        Not by the number of its labels, which differs between ranks and accumulated batches: so
        that every label of the whole step has the same weight.
        """
        step, mixed = self.global_step, self.hparams.mixed_lengths
        if self.lengths is not None:
            batch = fold(batch, stage(self.lengths, step))
        elif mixed is not None:
            batch = fold(batch, drawn_length(mixed, self.seed, step))
        carries = self.trainer.datamodule.carry_state
        state = None
        if carries and self.carried is not None:
            state = state_to(self.carried, self.device)
        loss, after = self.model.loss(
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
        self.carried = detach_state(after) if carries else None
        return loss / batch["ids"].numel()

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the gradients' norm, and clip it."""
        norm = self.norm = optimization.gradient_norm(self.model)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None and not torch.isfinite(norm):  # a scaler itself skips such a step
            names = [
                name
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None and not torch.isfinite(parameter.grad.sum())
            ]
            self.stop(f"the gradient's norm is {norm.item()}, first that of {(names or ['?'])[-1]}")
        limit = self.hparams.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.model.parameters(), limit)
        elif limit:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)

    def stop(self, what: str) -> None:
        """End the run with what is wrong and from where to go on."""
        raise NonFiniteError(
            f"step {self.global_step}: {what}. Last good checkpoint: "
            f"{self.last_checkpoint() or 'none was written yet'}. Resume from it with --ckpt_path "
            "and other data (--data.seed), or begin anew with a smaller --model.learning_rate or "
            "--model.gradient_clip_val, or a longer --model.warmup_steps"
        )

    def last_checkpoint(self) -> str:
        """The newest checkpoint of this run, or an empty string."""
        callback = self.trainer.checkpoint_callback
        return str(getattr(callback, "newest", "") or self.trainer.ckpt_path or "")

    # ---- Validation

    def on_validation_epoch_start(self) -> None:
        self.validation_totals = torch.zeros(2, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add up the loss and the labels of a batch."""
        loss = self.model.loss(
            batch["ids"], batch["labels"], segment_ids=batch["segment_ids"], reduction="sum"
        )
        self.validation_totals += self.over_ranks(loss, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        if not self.validation_totals[1]:
            raise DataError(
                "--trainer.limit_val_batches: expected validation batches with tokens to predict, "
                "these have none; take more batches, or other documents"
            )
        loss = self.validation_totals[0] / self.validation_totals[1]
        self.log_dict({"val_loss": loss, "val_perplexity": loss.exp()}, prog_bar=True)
        if not self.trainer.sanity_checking:
            self.validated_step = self.trained_steps
        # Lightning would log them under the step before, and without training under 0.
        self.log("step", float(self.trained_steps))

    @property
    def trained_steps(self) -> int:
        """Optimizer steps of the weights, which a trainer that only validates does not count."""
        return max(self.global_step, self.loaded_step)

    def over_ranks(self, loss: Tensor, labels: Tensor) -> Tensor:
        """`[2]`: the summed loss and the number of labels, of all ranks."""
        counted = (labels != IGNORED_LABEL).sum().to(loss.dtype)
        totals = torch.stack([loss.detach(), counted])
        return self.trainer.strategy.reduce(totals, reduce_op="sum")

    # ---- Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the model is made of, the tokenizer, the seed and every rank's state."""
        checkpoint["longctx"] = {
            "config": self.model.config.to_dict(),
            "tokenizer": packed_tokenizer(self.trainer.datamodule.tokenizer),
            "tokenizer_fingerprint": self.trainer.datamodule.tokenizer.fingerprint,
            **numeric_options(self.trainer),
            "seed": self.seed,
            "carried": gather_ranks(self.carried),
            "window": self.windows.now if self.windows is not None else None,
            "within_step": self.within_step,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the seed and this rank's state; before the weights.

        Raises:
            ResumptionError: if the run cannot go on from it, see `check_resumption`.
        """
        saved = checkpoint["longctx"]
        check_resumption(checkpoint, self.trainer)
        self.seed, self.loaded_step = saved["seed"], checkpoint["global_step"]
        if len(saved["carried"]) == self.trainer.world_size:
            self.carried = saved["carried"][self.global_rank]
        if self.windows is not None and saved["window"] is not None:
            self.windows.resize(saved["window"])  # the carried state's
