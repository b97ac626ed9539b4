"""The model card: what was trained, on which data, and how the training went."""

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
OPTIMIZATION = (
    "optimizer",
    "learning_rate",
    "gate_learning_rate",
    "warmup_steps",
    "weight_decay",
    "gradient_clip_val",
    "length_curriculum",
    "mixed_lengths",
    "window_curriculum",
)


def _last(values: Sequence[float]) -> float:
    return values[-1]


# What the card says of the log: the scalar, how its values are summarized, and the format.
LOGGED: dict[str, tuple[str, Callable[[Sequence[float]], float], str]] = {
    "last training loss": ("train_loss", _last, "{:.4f} nats/token"),
    "last validation loss": ("val_loss", _last, "{:.4f} nats/token"),
    "training speed": ("tokens_per_second", statistics.median, "{:,.0f} tokens/s (median)"),
    "peak memory in training": ("peak_memory_gib", max, "{:.2f} GiB"),
}


def section(checkpoints: Sequence[Checkpoint], logs: Sequence[Log | None]) -> Section:
    """A table with a column for each checkpoint."""
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
    config = model.config
    counts = model.parameter_counts()
    options = "; ".join(
        f"{name}: {_options(values)}" for name, values in config.block_kwargs.items() if values
    )
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    tied = "tied" if config.tie_embeddings else "not tied"
    window = reach(model)
    return {
        "blocks": f"{config.n_layers} layers of {' + '.join(config.pattern)}",
        "options of the blocks": options or "their defaults",
        "widths": f"d_model {config.d_model}, n_heads {config.n_heads}, ffn_dim {config.ffn_dim}",
        "vocabulary": f"{config.vocab_size:,} ids, {tied}",
        "parameters": f"{sum(counts.values()):,} ({parts})",
        "weights": str(model.embedding.weight.dtype).removeprefix("torch."),
        "reach of the stacked windows": "all" if window is None else f"{window:,} tokens",
        **{f"state after {n:,} tokens": size(model.state_size(n)) for n in STATE_LENGTHS},
    }


def _options(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _training(checkpoint: Checkpoint, log: Log | None) -> dict[str, str]:
    data = {} if log is None else log.data
    dataset = " ".join(str(data[n]) for n in ("dataset_name", "dataset_config") if data.get(n))
    step = checkpoint.step
    order = checkpoint.order
    tokenizer = "none in the folder"
    if checkpoint.tokenizer is not None:
        tokenizer = str(data.get("tokenizer") or type(checkpoint.tokenizer).__name__)
    facts = {
        "step": UNKNOWN if step is None else f"{step:,}",
        "data": dataset or UNKNOWN,
        "tokenizer": tokenizer,
        "tokens of a row": f"{order['seq_len']:,}" if order else UNKNOWN,
    }
    if order:
        rows = order["batch_size x processes"]
        facts["rows of a batch, over all processes"] = f"{rows:,}"
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


def curve(checkpoints: Sequence[Checkpoint], logs: Sequence[Log | None]) -> Section | None:
    """The training curves; None if no log has one."""
    known: list[tuple[Checkpoint, Log]] = []
    missing: list[str] = []
    for checkpoint, log in zip(checkpoints, logs, strict=True):
        if log is not None and log.curve("train_loss"):
            known.append((checkpoint, log))
        else:
            missing.append(checkpoint.label)
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
    """Training loss as a line, validation loss as hollow markers, as a PNG."""
    figure, axes = new_figure("Training", "training step", "loss (nats per token)")
    later: list[float] = []
    for checkpoint, log in known:
        steps, losses = zip(*log.curve("train_loss"), strict=True)
        later += losses[1:]
        axes.plot(
            steps,
            losses,
            color=checkpoint.colour,
            marker=checkpoint.mark,
            markersize=4,
            label=checkpoint.label,
            markevery=max(1, len(steps) // 12),
        )
        if validation := log.curve("val_loss"):
            axes.plot(
                *zip(*validation, strict=True),
                checkpoint.mark,
                color=checkpoint.colour,
                markersize=9,
                markerfacecolor="white",
                label=f"{checkpoint.label}, validation",
            )
    without_the_fall(axes, later)
    whole_steps(axes)
    return png(figure, axes)
