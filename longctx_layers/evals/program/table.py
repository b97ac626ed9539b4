"""What an evaluation prints at its end."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from longctx_layers.evals import effective_length

THRESHOLD = 0.9
UNTRAINED = """\
!!! THIS MODEL WAS NOT TRAINED: its weights are random, and what it scores is chance, not a result.
!!! Train it on the task with --train_steps, or pass a model with --checkpoint_path. Its rows are
!!! marked "trained": false.
"""


def warn_untrained() -> None:
    """Say loudly that nothing was learnt."""
    print(f"\n{UNTRAINED}", flush=True)


def table(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """The rows by length, what they mean, and where they are."""
    lines = [
        "",
        f"{rows[0]['task']}, {rows[0]['block']}: {rows[0]['n']:,} "
        + ("tokens" if rows[0]["task"] == "streaming_ppl" else "sequences a length"),
        "",
        "  length  accuracy  95 % interval   chance  state zeroed     loss",
    ]
    for row in rows:
        zeroed = row["accuracy_state_zeroed"]
        lines.append(
            f"{row['length']:>8,}  {row['accuracy']:>8.3f}  {row['low']:.3f} - {row['high']:.3f}  "
            f"{row['chance']:>7.3f}  {'-' if zeroed is None else f'{zeroed:.3f}':>12}  "
            f"{row['loss']:>7.3f}" + (f"  n = {row['n']}" if row["n"] != rows[0]["n"] else "")
        )
    reach = rows[0]["reach"]
    lines += ["", "reach of the stacked windows: " + _tokens(reach, "everything")]
    if rows[0]["task"] != "streaming_ppl":
        found = effective_length({r["length"]: r["accuracy"] for r in rows}, THRESHOLD)
        lines.append(f"effective length (accuracy at least {THRESHOLD}): {_tokens(found, 'none')}")
    else:
        slope, low, high = (rows[-1][name] for name in ("slope", "slope_low", "slope_high"))
        lines.append(
            f"drift of the loss behind {rows[-1]['slope_from']:,} tokens: "
            + (
                "not measured, there is too little text; make --max_len longer"
                if slope is None
                else f"{slope:.5f} nats per 1000 tokens ({low:.5f} to {high:.5f})"
            )
        )
        if rows[-1]["held_out"] is None and rows[-1]["trained"]:
            lines.append("Whether the model was trained on this text is not known.")
    guessed = [r["length"] for r in rows if r["low"] <= r["chance"]]
    if guessed and rows[0]["trained"]:
        lines.append(f"At {guessed} tokens it does no better than chance, within the interval.")
    within = [r["length"] for r in rows if reach is None or r["length"] <= reach + 1]
    if within and reach is not None:
        lines.append(f"At {within} tokens windows alone reach everything: no test of the memory.")
    if not rows[0]["trained"]:
        lines += ["", UNTRAINED]
    lines.append(f"Written to {args.output_dir}/")
    return "\n".join(lines)


def _tokens(count: int | None, none: str) -> str:
    return none if count is None else f"{count:,} tokens"
