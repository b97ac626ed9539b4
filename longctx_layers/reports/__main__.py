"""A report on a trained model: one HTML file, and Markdown with pictures.

    python -m longctx_layers.reports --checkpoint_path logs/checkpoints/step=00000200.ckpt \\
        --output_dir runs/report

The checkpoint is a file of longctx_layers.training.train, or a folder that `save_pretrained` wrote.
`--compare` adds further ones. docs/reports.md describes what is in a report.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from longctx_layers.evals.scoring import doubling
from longctx_layers.files import write_all
from longctx_layers.info import machine
from longctx_layers.reports import html, markdown
from longctx_layers.reports.content import Picture, Section, Warned, finite
from longctx_layers.reports.flags import Flags, parse, parser
from longctx_layers.reports.inputs import Inputs, prepare
from longctx_layers.reports.sections import (
    card,
    evaluation,
    inside,
    position,
    samples,
    speed,
)


def build(flags: Flags, inputs: Inputs) -> list[Section]:
    """All sections, in the order of the page. This measures losses and speed."""
    checkpoints = inputs.checkpoints
    text = inputs.text
    warnings = list(inputs.warnings)
    losses: Section | None = None
    continuations: Section | None = None
    if text is not None:
        try:
            measured = position.measure(checkpoints, text, flags.max_len, flags.documents)
            losses = position.section(measured, text)
        except ValueError as error:
            warnings.append(f"The loss by position was not measured: {error}")
        if flags.samples:
            continuations = samples.section(
                checkpoints, text, flags.samples, flags.new_tokens, flags.seed
            )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    lengths = doubling(flags.seq_len, flags.max_len)
    sections = [
        card.section(checkpoints, inputs.logs),
        card.curve(checkpoints, inputs.logs),
        evaluation.section(checkpoints, inputs.results),
        Section("Held-out text", [Warned(warning) for warning in warnings]) if warnings else None,
        losses,
        inside.section(checkpoints, inputs.logs, text),
        continuations,
        speed.section(checkpoints, speed.measure(checkpoints, lengths)),
    ]
    return [section for section in sections if section is not None]


def files_of(title: str, made_by: str, sections: Sequence[Section]) -> Mapping[str, str | bytes]:
    """The files of a report, by name."""
    pictures = {p.name: p.png for s in sections for p in s.parts if isinstance(p, Picture)}
    numbers = {"made_by": made_by, **{section.title: section.numbers for section in sections}}
    return {
        **{f"{markdown.PICTURES}/{name}.png": png for name, png in pictures.items()},
        "report.json": json.dumps(finite(numbers), indent=1, allow_nan=False) + "\n",
        "report.md": markdown.render(title, made_by, sections),
        "report.html": html.render(title, made_by, sections),
    }


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command line; returns the folder of the report."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    flags = parse(arguments)
    program = parser()
    try:
        inputs = prepare(flags)
    except (OSError, ValueError, ImportError) as error:
        program.exit(2, f"{program.prog}: error: {error}\n")
    sections = build(flags, inputs)
    title = "Report on " + " and ".join(c.label for c in inputs.checkpoints)
    made_by = f"Made by: {program.prog} {shlex.join(arguments)}; on {machine(flags.device)}."
    try:
        write_all(flags.output_dir, files_of(title, made_by, sections))
    except OSError as error:  # a full disk, or a folder that has changed in the meantime
        program.exit(2, f"{program.prog}: error: {error}\n")
    folder = flags.output_dir
    print(f"Written to {folder / 'report.html'}, and report.md and report.json in the same folder.")
    return folder


if __name__ == "__main__":
    main()
