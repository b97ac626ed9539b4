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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longctx_layers.command_line import Parser, program_name
from longctx_layers.evals.program.options import device, doubling
from longctx_layers.files import check_targets, write_all
from longctx_layers.info import machine
from longctx_layers.reports import html, logs, markdown, results
from longctx_layers.reports.checkpoint import Checkpoint, load
from longctx_layers.reports.content import Picture, Section, Warned, finite
from longctx_layers.reports.sections import (
    card,
    evaluation,
    inside,
    position,
    samples,
    speed,
)
from longctx_layers.reports.text import Text, held_out

LEAST = {"seq_len": 1, "max_len": 64, "documents": 2, "samples": 0, "new_tokens": 1}


@dataclass(frozen=True)
class Flags:
    """The flags, checked as far as they can be without reading files.

    Attributes:
        paths: of the checkpoint, and of those to compare it with.
        output_dir: the folder of the report.
        logs: of the first checkpoint's training; None to look where it lies.
        results: folders of evaluation results: none, one, or one for each checkpoint.
        dataset_name, dataset_config: of text to measure on; None for the training's own data.
        seq_len, max_len: the shortest and the longest length of speed and memory; losses are
            measured up to the longest.
        documents: maximum number of documents to measure losses on.
        samples, new_tokens, seed: of the samples.
        device: to run on.
    """

    paths: tuple[Path, ...]
    output_dir: Path
    logs: Path | None
    results: tuple[Path, ...]
    dataset_name: str | None
    dataset_config: str | None
    seq_len: int
    max_len: int
    documents: int
    samples: int
    new_tokens: int
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Inputs:
    """What a report is made from.

    Attributes:
        checkpoints: the first one and those it is compared with.
        logs, results: of each checkpoint, as far as they were found.
        text: to measure on; None if there is none.
        warnings: about the text.
    """

    checkpoints: Sequence[Checkpoint]
    logs: Sequence[logs.Log | None]
    results: Sequence[results.Results | None]
    text: Text | None
    warnings: Sequence[str]


def parser() -> Parser:
    """The flags of the command line."""
    program = Parser(
        prog=program_name("longctx_layers.reports", "report"),
        description=str(__doc__).splitlines()[0],
    )
    add = program.add_argument
    add("--checkpoint_path", "--pretrained_model", type=Path, required=True, help="file or folder")
    add("--compare", type=Path, nargs="+", default=[], help="further checkpoints")
    add("--output_dir", type=Path, default=Path("runs/report"), help="default: runs/report")
    add("--logs", type=Path, help="of the training, if they are not beside the checkpoint")
    add("--results", type=Path, nargs="+", default=[], help="--output_dir of evaluations")
    add("--dataset_name", help="for held-out text; default: the training's own data")
    add("--dataset_config", help="of that dataset; for --dataset_name=local a path")
    add("--seq_len", type=int, default=512, help="shortest length of speed and memory")
    add("--max_len", type=int, default=2048, help="longest length; lengths double up to it")
    add("--documents", type=int, default=16, help="maximum number to measure the loss on")
    add("--samples", type=int, default=2, help="number of samples")
    add("--new_tokens", type=int, default=200, help="of each sample")
    add("--seed", type=int, default=0, help="of the samples")
    add("--device", default="auto", help="auto, cpu or cuda")
    return program


def parse(argv: Sequence[str] | None = None) -> Flags:
    """Parse and check the flags; nothing is read yet."""
    program = parser()
    args = program.parse_args(argv)
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            program.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    if args.seq_len > args.max_len:
        program.error(f"--seq_len: expected at most --max_len = {args.max_len}, got {args.seq_len}")
    try:
        chosen = device(args.device)
    except ValueError as error:
        program.error(str(error))
    return Flags(
        paths=(args.checkpoint_path, *args.compare),
        output_dir=args.output_dir,
        logs=args.logs,
        results=tuple(args.results),
        dataset_name=args.dataset_name,
        dataset_config=args.dataset_config,
        seq_len=args.seq_len,
        max_len=args.max_len,
        documents=args.documents,
        samples=args.samples,
        new_tokens=args.new_tokens,
        seed=args.seed,
        device=chosen,
    )


def prepare(flags: Flags) -> Inputs:
    """Load everything that the report needs, and check that it can be written.

    Raises:
        OSError, ValueError, ImportError: if something is missing or damaged.
    """
    check_targets(flags.output_dir, targets(flags.output_dir))
    checkpoints = load(flags.paths, flags.device)
    first, *others = checkpoints
    found_logs = [logs.find(first, flags.logs), *(logs.find(other) for other in others)]
    found_results = find_results(checkpoints, flags.results)
    text, warnings = find_text(checkpoints, found_logs[0], flags.dataset_name, flags.dataset_config)
    return Inputs(checkpoints, found_logs, found_results, text, warnings)


def targets(folder: Path) -> list[str]:
    """The files of a report in a folder, as far as they are known before it is made."""
    pictures = {speed.PICTURE, *(path.stem for path in folder.glob(f"{markdown.PICTURES}/*.png"))}
    names = [f"{markdown.PICTURES}/{name}.png" for name in sorted(pictures)]
    return ["report.html", "report.md", "report.json", *names]


def find_results(
    checkpoints: Sequence[Checkpoint], folders: Sequence[Path]
) -> list[results.Results | None]:
    """The evaluation results of each checkpoint.

    Args:
        checkpoints: whose results are wanted.
        folders: none, for where each evaluation writes by default; one; or one for each.
    """
    places: list[Path | None] = list(folders) or [None]
    if len(places) == 1:
        places *= len(checkpoints)
    if len(places) != len(checkpoints):
        raise ValueError(
            f"--results: expected one folder, or one for each of {len(checkpoints)} checkpoints, "
            f"got {len(folders)}"
        )
    pairs = zip(checkpoints, places, strict=True)
    found = [results.find(checkpoint, place) for checkpoint, place in pairs]
    if folders and not any(found):
        raise FileNotFoundError(
            "--results: expected TASK.jsonl with rows of these checkpoints, got "
            f"{', '.join(map(str, folders))}; pass the --output_dir of an evaluation"
        )
    return found


def find_text(
    checkpoints: Sequence[Checkpoint],
    log: logs.Log | None,
    dataset_name: str | None,
    dataset_config: str | None,
) -> tuple[Text | None, list[str]]:
    """Held-out documents of the first checkpoint's data, and warnings about them.

    Raises:
        ValueError: if data that a flag names are not available. For the checkpoint's own data
            there is a warning instead.
    """
    first, *others = checkpoints
    if not any(checkpoint.tokenizer for checkpoint in checkpoints):
        return None, ["No checkpoint has a tokenizer: no loss of text, and no samples."]
    options = {} if log is None else log.data
    named = {"dataset_name": dataset_name, "dataset_config": dataset_config}
    if dataset_name:  # the training's other options do not apply to other data
        options = {n: options[n] for n in ("cache_dir", "seed") if n in options}
    try:
        text = held_out(options, **named)
    except (OSError, ValueError, ImportError) as error:
        # The data module names the flags of the training program.
        reason = str(error).replace("--data.dataset_", "--dataset_")
        if any(named.values()):
            raise ValueError(
                "--dataset_name: expected data with held-out documents, got "
                f"{' '.join(filter(None, named.values()))}: {reason}"
            ) from error
        return None, [f"Nothing was measured on text: {reason}"]
    warnings: list[str] = []
    if dataset_name and log is None:
        warnings.append(
            f"The training data of {first.label} are not known; these documents may have been "
            "among them."
        )
    elsewhere = [c.label for c in others if split_of(c) != split_of(first)]
    if elsewhere:
        warnings.append(
            f"{', '.join(elsewhere)}: trained on other data or with another split, as far as is "
            "known; these documents may have been among them."
        )
    return text, warnings


def split_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings that decide which documents its training held out."""
    return {n: checkpoint.order.get(n) for n in ("content", "validation_fraction", "seed")}


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
