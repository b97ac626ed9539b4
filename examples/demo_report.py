"""The demo's page and pictures."""

from __future__ import annotations

from typing import Any

from figures import STYLES, lengths_along, mark_place, new_figure, png
from output import buckets

COLOURS = {name: STYLES[name][0] for name in ("dpassm", "window")}
LABELS = {"dpassm": "DPASSM (window and state)", "window": "window alone"}


def draw_loss_curves(metrics: dict[str, Any]) -> bytes:
    """Training loss by step, smoothed over ten steps, as a PNG."""
    figure, axes = new_figure(
        "Same tokens, same number of parameters", "training step", "training loss (nats per byte)"
    )
    for name, result in metrics["models"].items():
        losses = result["train_loss"]
        smooth = [sum(losses[max(0, i - 9) : i + 1]) / min(10, i + 1) for i in range(len(losses))]
        axes.plot(range(1, len(losses) + 1), smooth, color=COLOURS[name], label=LABELS[name])
    return png(figure, axes, columns=2)


def draw_positions(metrics: dict[str, Any]) -> bytes:
    """Validation loss by position, as a PNG."""
    figure, axes = new_figure(
        "Loss by position, in files that neither model saw",
        "position in the sequence (bytes)",
        "validation loss (nats per byte)",
    )
    zeroed = metrics["zeroed"]
    lines = [
        (name, result["by_position"], "o-", LABELS[name])
        for name, result in metrics["models"].items()
    ]
    label = f"DPASSM, state zeroed every {metrics['reach']} bytes"
    lines.append(("dpassm", zeroed["by_position"], "o:", label))
    for name, losses, style, label in lines:
        rows = buckets(losses)
        places = [(first * last) ** 0.5 for first, last, _ in rows]
        means = [mean for _, _, mean in rows]
        axes.plot(places, means, style, color=COLOURS[name], label=label)
    lengths_along(axes)
    mark_place(axes, metrics["reach"], "reach of the\nstacked windows")
    mark_place(axes, metrics["settings"]["sequence_length"], "training\nlength")
    return png(figure, axes, columns=2)


def page(metrics: dict[str, Any]) -> str:
    """The Markdown page."""
    gain, settings = metrics["window_minus_dpassm"], metrics["settings"]
    zeroed = metrics["zeroed"]
    cost = zeroed["minus_dpassm"]
    seen = settings["steps"] * settings["batch_size"] * settings["sequence_length"]
    rows = [
        f"| {LABELS[name]} | {r['parameters']:,} | {r['loss']:.4f} | {r['bits_per_byte']:.3f} | "
        f"{r['perplexity']:.3f} | {r['tokens_per_second']:,.0f} | {r['train_seconds']:.0f} | "
        f"{r['state_bytes'][1000000]:,} |"
        for name, r in metrics["models"].items()
    ]
    both = zip(
        buckets(metrics["models"]["dpassm"]["by_position"]),
        buckets(metrics["models"]["window"]["by_position"]),
        strict=True,
    )
    positions = [
        f"| {first} to {last} | {with_state:.3f} | {alone:.3f} | {alone - with_state:.3f} |"
        for (first, last, with_state), (_, _, alone) in both
    ]
    return "\n".join(
        [
            "# A small DPASSM beside its window alone",
            "",
            f"`{metrics['command'].strip()}` on {metrics['machine']}. Both models saw the same "
            f"{seen:,} bytes in "
            f"sequences of {settings['sequence_length']}, with windows of "
            f"{settings['window_size']}; validation is on {metrics['validation_length']:,} bytes "
            f"of each of {metrics['validation_documents']} files that neither saw.",
            "",
            "| model | parameters | validation loss (nats/byte) | bits/byte | perplexity/byte | "
            "training tokens/s | training s | state bytes at 1,000,000 tokens |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Window minus DPASSM, paired: **{gain['mean']:.4f} nats per byte**, 95 % interval "
            f"{gain['low']:.4f} to {gain['high']:.4f}. With its state zeroed every "
            f"{metrics['reach']} bytes, as far as the stacked windows reach, DPASSM loses "
            f"{cost['mean']:.4f} nats ({cost['low']:.4f} to {cost['high']:.4f}): so much at most "
            "is memory of what lies further back. "
            f"One pass and pieces of {settings['sequence_length']} bytes differ by at most "
            f"{metrics['largest_difference_in_pieces']:.1e} nats in any token.",
            "",
            "![training loss](loss_curves.png)",
            "",
            "![loss by position](loss_by_position.png)",
            "",
            "| position | DPASSM | window alone | gain |",
            "|---|---|---|---|",
            *positions,
            "",
            "Two hundred bytes that DPASSM wrote after a prompt out of a held-out file:",
            "",
            "```python",
            (metrics["prompt"] + " ⟦model writes⟧ " + metrics["continuation"]).replace(
                "```", "'''"
            ),
            "```",
            "",
        ]
    )
