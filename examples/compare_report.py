"""The comparison's page and pictures."""

from __future__ import annotations

import math
from typing import Any

from figures import STYLES, lengths_along, mark_place, new_figure, png, without_the_fall
from output import buckets

BLOCKS = tuple(STYLES)


def draw_losses(metrics: dict[str, Any]) -> bytes:
    """Training loss by step, the last tenth of the axis's range in view, as a PNG."""
    figure, axes = new_figure(
        "Training: same tokens, same number of parameters",
        "training step",
        "training loss (nats per token)",
    )
    for block, result in metrics["blocks"].items():
        colour, mark, label = STYLES[block]
        steps, losses = zip(*result["train_loss"], strict=True)
        axes.plot(
            steps, losses, color=colour, marker=mark, markersize=4, label=label,
            markevery=max(1, len(steps) // 12),
        )  # fmt: skip
    lasts = [loss for r in metrics["blocks"].values() for _, loss in r["train_loss"][1:]]
    without_the_fall(axes, lasts)
    return png(figure, axes)


def draw_positions(metrics: dict[str, Any]) -> bytes:
    """Validation loss by position in the long sequences, as a PNG."""
    figure, axes = new_figure(
        "Loss by position, in files that no model saw",
        "position in the sequence (tokens)",
        "validation loss (nats per token)",
    )
    for block, result in metrics["blocks"].items():
        colour, mark, label = STYLES[block]
        length = max(result["validation"], key=int)
        rows = buckets(result["validation"][length]["by_position"])
        places = [math.sqrt(first * last) for first, last, _ in rows]
        means = [mean for *_, mean in rows]
        axes.plot(places, means, color=colour, marker=mark, markersize=5, label=label)
    lengths_along(axes)
    mark_place(axes, metrics["settings"]["seq_len"], "training\nlength")
    return png(figure, axes)


def draw_lengths(metrics: dict[str, Any]) -> bytes:
    """Perplexity against training speed, at both lengths, as a PNG."""
    figure, axes = new_figure(
        "What a block learnt, and how fast it trains",
        "training speed (tokens per second)",
        "validation perplexity per token",
    )
    for block, result in metrics["blocks"].items():
        colour, mark, label = STYLES[block]
        short, long = (v["perplexity"] for _, v in sorted(_by_length(result)))
        speed = result["tokens_per_second"]
        axes.plot([speed, speed], [short, long], color=colour, linewidth=1)
        axes.plot(speed, short, mark, color=colour, markersize=8, label=label)
        axes.plot(speed, long, mark, color=colour, markersize=8, markerfacecolor="white")
    axes.plot([], [], "o", color="#555555", label="filled: training length")
    axes.plot(
        [], [], "o", color="#555555", markerfacecolor="white", label="hollow: 8 x that length"
    )
    axes.set_xlim(left=0)
    return png(figure, axes)


def _by_length(result: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return [(int(n), v) for n, v in result["validation"].items()]


def paired(first: list[float], second: list[float]) -> tuple[float, float]:
    """Mean difference of two rows, and half of its 95 % interval (normal, paired)."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return mean, 1.96 * math.sqrt(variance / len(differences))


def page(metrics: dict[str, Any]) -> str:
    """The Markdown page."""
    settings, blocks = metrics["settings"], metrics["blocks"]
    trained = settings["seq_len"]
    long = max(int(n) for n in next(iter(blocks.values()))["validation"])
    seen = settings["steps"] * settings["batch_size"] * trained
    rows = []
    for block, r in blocks.items():
        gain = "-"
        if "window" in blocks and block != "window":
            mean, half = paired(
                *(b["validation"][str(long)]["by_document"] for b in (blocks["window"], r))
            )
            gain = f"{mean:.3f} ± {half:.3f}"
        rows.append(
            f"| {STYLES[block][2]} | {r['parameters']:,} | "
            f"{r['validation'][str(trained)]['perplexity']:.3f} | "
            f"{r['validation'][str(long)]['perplexity']:.3f} | {gain} | "
            f"{r['tokens_per_second']:,.0f} | {r['peak_memory_gib']:.2f} |"
        )
    measured = metrics["measured_on"]
    return "\n".join(
        [
            "# The blocks beside each other",
            "",
            f"`{metrics['command'].strip()}` on {metrics['machine']}. Every block saw the same "
            f"{seen:,} tokens of `{settings['dataset_name']}` in {settings['steps']} steps, in "
            f"sequences of {trained}; windows of {settings['window_size']}, BLADE's chunks of "
            f"{2 * settings['window_size']} (a query sees as many keys on average). Perplexity is "
            f"per token of the same {measured['tokens']:,} tokens of {measured['documents']} "
            f"documents that no model saw, once in sequences of {trained} that begin anew and once "
            f"in sequences of {long:,}. The gain is that in loss over the window alone at "
            f"{long:,}, paired by document, with its 95 % interval. The speed is that of a loss "
            "with its gradients, in float32, all blocks in turns.",
            "",
            f"| block | parameters | perplexity at {trained} | perplexity at {long:,} | gain over "
            "the window (nats) | training tokens/s | peak memory (GiB, whole process) |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "![training loss](loss_curves.png)",
            "",
            "![loss by position](loss_by_position.png)",
            "",
            "![perplexity and speed](lengths.png)",
            "",
        ]
    )
