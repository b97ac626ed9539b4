"""What a run shows: lines at its start, scalars for TensorBoard, a bar or plain lines."""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from longctx_layers import explain
from longctx_layers.data.module import LongContextData
from longctx_layers.ops import Choice
from longctx_layers.training.flops import matmul_peak, training_flops
from longctx_layers.training.inspection import kept_activations, memory_statistics
from longctx_layers.training.module import LanguageModel, language_model

PROBED_TOKENS = 512  # of a sequence, to find out the backends and look at the layers' memory


class Monitor(Callback):
    """Prints lines at the start, and logs scalars every `log_every_n_steps`; see docs/training.md.

    With `log_every_n_steps=0` there are only the scalars of validation.

    Args:
        plain_lines: whether to print a line at each of these steps, instead of a bar.

    >>> callback = Monitor(plain_lines=True)  # for lightning.Trainer(callbacks=[callback])
    """

    def __init__(self, plain_lines: bool) -> None:
        self.plain_lines = plain_lines
        self.peak = 0.0  # matmul operations a second, of all devices
        self.seconds = 0.0
        self.tokens = 0
        self.began = 0.0
        self.step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the machine, and print what is going to run."""
        dtype = precision_dtype(trainer)
        self.peak = matmul_peak(pl_module.device, dtype) * trainer.world_size
        self.step = trainer.global_step
        lines = start_lines(trainer, language_model(pl_module))
        lines.append(f"matmul peak: {self.peak / 1e12:.3g} TFLOP/s in {dtype}, measured")
        if trainer.is_global_zero:
            print(*lines, sep="\n", flush=True)
        self._begin()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the losses, and exclude the time of validation from the speed."""
        if trainer.is_global_zero and self.plain_lines and not trainer.sanity_checking:
            values = {k: float(v) for k, v in trainer.callback_metrics.items() if "val_" in k}
            line = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            print(f"step {language_model(pl_module).trained_steps}  {line}", flush=True)
        self._begin()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the batch, and log if it completes a step for it."""
        now = time.perf_counter()
        self.seconds += now - self.began
        self.began = now
        self.tokens += batch["ids"].numel() * trainer.world_size
        if trainer.global_step == self.step:  # gradients are still accumulating
            return
        self.step = trainer.global_step
        module = language_model(pl_module)
        assert module.totals is not None
        total, labels = module.totals
        loss = (total / labels.clamp(min=1)).item()
        module.totals = None
        speed = self.tokens / self.seconds
        pl_module.log("train_loss", loss, prog_bar=True, logger=False)
        pl_module.log("tokens/s", speed, prog_bar=True, logger=False)
        every: int = vars(trainer)["log_every_n_steps"]  # not declared by its class
        if every and (self.step % every == 0 or self.step == trainer.max_steps):
            self._log(trainer, module, batch, loss, speed)
            self._begin()
            self.seconds, self.tokens = 0.0, 0

    def _log(
        self, trainer: L.Trainer, pl_module: LanguageModel, batch: Any, loss: float, speed: float
    ) -> None:
        flops = training_flops(pl_module.model, batch["ids"].shape[1])
        assert pl_module.norm is not None
        scalars: dict[str, Any] = {
            "train_loss": loss,
            "train_perplexity": math.exp(min(loss, 700)),
            "learning_rate": trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0],
            "gradient_norm": pl_module.norm.item(),
            "tokens_per_second": speed,
            "model_flops_utilisation": speed * flops / self.peak,
            "peak_memory_gib": peak_memory(pl_module.device) / 2**30,
        }
        if self.plain_lines and trainer.is_global_zero:
            print(
                f"step {self.step}  loss {loss:.4f}  lr {scalars['learning_rate']:.2e}  "
                f"norm {scalars['gradient_norm']:.3f}  {speed:,.0f} tokens/s  "
                f"MFU {scalars['model_flops_utilisation']:.1%}  "
                f"{scalars['peak_memory_gib']:.2f} GiB",
                flush=True,
            )
        probe = {name: rows[:1, :PROBED_TOKENS] for name, rows in batch.items()}
        with trainer.precision_plugin.forward_context():
            memory = memory_statistics(pl_module.model, probe["ids"], probe["segment_ids"])
        scalars |= {name: value.item() for name, value in memory.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=self.step)

    def _begin(self) -> None:
        self.began = time.perf_counter()


def start_lines(trainer: L.Trainer, pl_module: LanguageModel) -> list[str]:
    """Describe a run: data, model, tokens per step, memory, backends; every rank must call it."""
    data = LongContextData.of(trainer)
    model = pl_module.model
    rows = data.batch_size
    length = data.seq_len
    accumulated = trainer.accumulate_grad_batches
    tokens = rows * length * trainer.world_size * accumulated
    parts = f"{rows} rows of {length:,}"
    parts += f" x {trainer.world_size} processes" * (trainer.world_size > 1)
    parts += f" x {accumulated} accumulated" * (accumulated > 1)
    device = pl_module.device
    ids = torch.zeros(1, min(length, PROBED_TOKENS), dtype=torch.int64, device=device)
    # Compiled code would not report which backends it runs.
    with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        choices = explain(model, ids)
    return [
        f"data: {data.describe()}",
        *(f"model: {line}" for line in model.describe().splitlines()),
        f"tokens a step: {tokens:,} ({parts})",
        f"memory, estimated: {memory_line(trainer, pl_module)}",
        *backend_lines(choices),
    ]


def memory_line(trainer: L.Trainer, pl_module: LanguageModel) -> str:
    """Estimate the memory that a step takes on each process, in words."""
    data = LongContextData.of(trainer)
    model = pl_module.model
    # Weights, gradients and both moments of AdamW in float32, spread over the shards.
    shards = trainer.world_size if pl_module.device_mesh is not None else 1
    count: int = sum(p.numel() for p in model.parameters())
    fixed = 16 * count / shards / 2**30
    parts = f"weights, gradients and optimizer {fixed:.2f}"
    row_bytes = kept_activations(
        model.config, data.seq_len, checkpointing=model.gradient_checkpointing
    )
    half = precision_dtype(trainer) != torch.float32
    activations = data.batch_size * row_bytes / (2**31 if half else 2**30)
    return f"{fixed + activations:.2f} GiB a process ({parts}, activations {activations:.2f})"


def backend_lines(choices: list[Choice]) -> list[str]:
    """Which backend runs each operation, and why the others do not."""
    lines = []
    for operation in dict.fromkeys(choice.operation for choice in choices):
        verdicts = [c for c in choices if c.operation == operation]
        chosen = " or ".join(dict.fromkeys(c.backend for c in verdicts if c.chosen))
        refused = [c for c in verdicts if not c.chosen and "not available" not in c.reason]
        reasons = [f"{c.backend} {c.reason}" for c in refused if c.backend != "reference"]
        lines.append(f"backend of {operation}: {chosen}; {'; '.join(dict.fromkeys(reasons))}")
    return lines


def precision_dtype(trainer: L.Trainer) -> torch.dtype:
    """The dtype of the matrix products."""
    precision = str(trainer.precision)
    if "bf16" in precision:
        return torch.bfloat16
    return {"16": torch.float16, "64": torch.float64}.get(precision[:2], torch.float32)


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of tensors on a GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
