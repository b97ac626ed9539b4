"""The model card: what was trained, on what, and how the training went."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longctx_layers.evals import reach
from longctx_layers.reports.checkpoint import Checkpoint
from longctx_layers.reports.content import Part, Picture, Section, Table
from longctx_layers.reports.figures import new_figure, png, whole_steps, without_the_fall
from longctx_layers.reports.logs import Log
from longctx_layers.reports.words import size

UNKNOWN = "not known"
STATE_LENGTHS = (1_000, 1_000_000)


def section(checkpoints: Sequence[Checkpoint], logs: Sequence[Log | None]) -> Section:
    """What a checkpoint is, a column for each."""
    columns = [
        {"file": str(c.path), **_model(c), **_training(c, log)}
        for c, log in zip(checkpoints, logs, strict=True)
    ]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, "-") for column in columns)] for name in names]
    header = ["", *(c.label for c in checkpoints)]
    numbers = {
        c.label: {"config": c.model.config.to_dict(), "parameters": c.model.parameter_counts()}
        for c in checkpoints
    }
    return Section("Model card", [Table(header, rows, words=True)], numbers)


def _model(checkpoint: Checkpoint) -> dict[str, str]:
    model = checkpoint.model
    config, counts = model.config, model.parameter_counts()
    options = "; ".join(
        f"{name}: {_options(given)}" for name, given in config.block_kwargs.items() if given
    )
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    facts = {
        "blocks": f"{config.n_layers} layers of {' + '.join(config.pattern)}",
        "options of the blocks": options or "their defaults",
        "widths": f"d_model {config.d_model}, n_heads {config.n_heads}, ffn_dim {config.ffn_dim}",
        "vocabulary": f"{config.vocab_size:,} ids, {_tied(config.tie_embeddings)}",
        "parameters": f"{sum(counts.values()):,} ({parts})",
        "weights": str(model.embedding.weight.dtype).removeprefix("torch."),
    }
    reached = reach(model)
    facts["reach of the stacked windows"] = "all" if reached is None else f"{reached:,} tokens"
    for n in STATE_LENGTHS:
        facts[f"state after {n:,} tokens"] = size(model.state_size(n))
    return facts


def _tied(tied: bool) -> str:
    return "tied" if tied else "not tied"


def _options(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in given.items())


def _training(checkpoint: Checkpoint, log: Log | None) -> dict[str, str]:
    data = {} if log is None else log.data
    dataset = " ".join(str(data[n]) for n in ("dataset_name", "dataset_config") if data.get(n))
    step, order = checkpoint.step, checkpoint.order
    facts = {
        "step": UNKNOWN if step is None else f"{step:,}",
        "data": dataset or UNKNOWN,
        "tokenizer": str(data.get("tokenizer") or type(checkpoint.tokenizer).__name__)
        if checkpoint.tokenizer
        else "none in the folder",
        "tokens of a row": f"{order['seq_len']:,}" if order else UNKNOWN,
    }
    if order:
        rows = order["batch_size x processes"]
        facts["rows of a batch, of all processes"] = f"{rows:,}"
        facts["documents held out"] = f"{order['validation_fraction']:.1%} or the data's own split"
    changed = {k: v for k, v in checkpoint.options.items() if k in OPTIMIZATION and v is not None}
    if changed:
        facts["optimization"] = _options(changed)
    if log is None:
        return {**facts, "log": "none found"}
    facts["log"] = ", ".join(str(folder) for folder in log.folders)
    for name, (scalar, summary, form) in LOGGED.items():
        values = [value for _, value in log.curve(scalar)]
        if values:
            facts[name] = form.format(summary(values))
    return facts


OPTIMIZATION = (
    "optimizer", "learning_rate", "gate_learning_rate", "warmup_steps", "weight_decay",
    "gradient_clip_val", "length_curriculum", "mixed_lengths", "window_curriculum",
)  # fmt: skip


def _last(values: Sequence[float]) -> float:
    return values[-1]


LOGGED: dict[str, tuple[str, Callable[[Sequence[float]], float], str]] = {
    "last training loss": ("train_loss", _last, "{:.4f} nats/token"),
    "last validation loss": ("val_loss", _last, "{:.4f} nats/token"),
    "training speed": ("tokens_per_second", statistics.median, "{:,.0f} tokens/s (median)"),
    "peak memory in training": ("peak_memory_gib", max, "{:.2f} GiB"),
}


def curve(checkpoints: Sequence[Checkpoint], logs: Sequence[Log | None]) -> Section | None:
    """The training curves; None if no log has one."""
    known, missing = [], []
    for one, log in zip(checkpoints, logs, strict=True):
        if log is not None and log.curve("train_loss"):
            known.append((one, log))
        else:
            missing.append(one.label)
    if not known:
        return None
    parts: list[Part] = [
        Picture("training_loss", "Loss by training step, from the logs", draw(known))
    ]
    if missing:
        parts.append(f"No log was found for {', '.join(missing)}.")
    numbers = {
        c.label: {name: log.curve(name) for name in ("train_loss", "val_loss")} for c, log in known
    }
    return Section("Training curve", parts, numbers)


def draw(known: Sequence[tuple[Checkpoint, Log]]) -> bytes:
    """Training loss as a line, validation loss as hollow marks, as a PNG."""
    figure, axes = new_figure("Training", "training step", "loss (nats per token)")
    later: list[float] = []
    for one, log in known:
        steps, losses = zip(*log.curve("train_loss"), strict=True)
        later += losses[1:]
        axes.plot(
            steps, losses, color=one.colour, marker=one.mark, markersize=4, label=one.label,
            markevery=max(1, len(steps) // 12),
        )  # fmt: skip
        if log.curve("val_loss"):
            axes.plot(
                *zip(*log.curve("val_loss"), strict=True), one.mark, color=one.colour,
                markersize=9, markerfacecolor="white", label=f"{one.label}, validation",
            )  # fmt: skip
    without_the_fall(axes, later)
    whole_steps(axes)
    return png(figure, axes)
