"""A report on a checkpoint that people read: one HTML file, and Markdown with pictures.

    python examples/report.py --checkpoint_path logs/checkpoints/step=00000200.ckpt \\
        --output_dir runs/report

The checkpoint is one of examples/train.py, or a folder that `save_pretrained` wrote. `--compare`
lays further ones beside it. docs/reports.md says what is in a report and where it comes from.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longctx_layers.evals.program.options import device, doubling
from longctx_layers.files import check_targets
from longctx_layers.reports import html, logs, markdown, results
from longctx_layers.reports.checkpoint import Checkpoint, load
from longctx_layers.reports.content import Picture, Section, Warned
from longctx_layers.reports.files import finite, write_all
from longctx_layers.reports.sections import (
    card,
    evaluation,
    inside,
    position,
    samples,
    speed,
)
from longctx_layers.reports.text import Text, held_out


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked, with the checkpoints and logs that they name loaded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint_path", "--pretrained_model", type=Path, required=True, help="file or folder")
    add("--compare", type=Path, nargs="+", default=[], help="further ones, to lay beside it")
    add("--output_dir", type=Path, default=Path("runs/report"), help="default: runs/report")
    add("--logs", type=Path, help="of the training, if they are not beside the checkpoint")
    add("--results", type=Path, nargs="+", help="--output_dir of examples/evaluate.py, one or each")
    add("--dataset_name", help="for held-out text; by default the training's own data")
    add("--dataset_config", help="of that; for --dataset_name=local a path")
    add("--seq_len", type=int, default=512, help="shortest length of speed and memory")
    add("--max_len", type=int, default=2048, help="longest length; lengths double up to it")
    add("--documents", type=int, default=16, help="to measure the loss on, at most")
    add("--samples", type=int, default=2)
    add("--new_tokens", type=int, default=200, help="of each sample")
    add("--seed", type=int, default=0, help="of the samples")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    for name, least in (
        ("seq_len", 1), ("max_len", 64), ("documents", 2), ("samples", 0), ("new_tokens", 1),
    ):  # fmt: skip
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    if args.seq_len > args.max_len:
        parser.error(
            f"--seq_len: expected at most --max_len, got {args.seq_len} above {args.max_len}"
        )
    try:
        check_targets(args.output_dir, targets(args.output_dir))
        args.device = device(args.device)
        args.checkpoints = load([args.checkpoint_path, *args.compare], args.device)
        args.found_logs = find_logs(args)
        args.found_results = find_results(args)
        args.text, args.said = find_text(args)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"report.py: error: {error}\n")
    return args


def targets(folder: Path) -> list[str]:
    """The files of a report in a folder, as far as they are known before it is made."""
    pictures = {speed.PICTURE, *(path.stem for path in folder.glob(f"{markdown.PICTURES}/*.png"))}
    names = [f"{markdown.PICTURES}/{name}.png" for name in sorted(pictures)]
    return ["report.html", "report.md", "report.json", *names]


def find_logs(args: argparse.Namespace) -> list[logs.Log | None]:
    """Of each checkpoint; `--logs` is that of the first."""
    first, *others = args.checkpoints
    return [logs.find(first, args.logs), *(logs.find(other) for other in others)]


def find_results(args: argparse.Namespace) -> list[results.Results | None]:
    """Of each checkpoint; one folder for all of them, or one for each."""
    folders = args.results or [None]
    if len(folders) == 1:
        folders = folders * len(args.checkpoints)
    if len(folders) != len(args.checkpoints):
        raise ValueError(
            f"--results: expected one folder, or one for each of {len(args.checkpoints)} "
            f"checkpoints, got {len(folders)}"
        )
    pairs = zip(args.checkpoints, folders, strict=True)
    found = [results.find(one, folder) for one, folder in pairs]
    if args.results and not any(found):
        raise FileNotFoundError(
            f"--results: expected TASK.jsonl with rows of these checkpoints, got "
            f"{', '.join(map(str, args.results))}; pass the --output_dir of examples/evaluate.py"
        )
    return found


def find_text(args: argparse.Namespace) -> tuple[Text | None, list[str]]:
    """Held-out documents of the first checkpoint's data, and what there is to be said of them.

    Raises:
        ValueError: if data that a flag names cannot be had; None for the checkpoint's own.
    """
    (first, *others), log = args.checkpoints, args.found_logs[0]
    if not any(one.tokenizer for one in args.checkpoints):
        return None, ["No checkpoint has a tokenizer: no loss of text, and no samples."]
    options = {} if log is None else log.data
    given = {"dataset_name": args.dataset_name, "dataset_config": args.dataset_config}
    if args.dataset_name:  # other data: nothing of the training's options belongs to them
        options = {n: options[n] for n in ("cache_dir", "seed") if n in options}
    try:
        text = held_out(options, **given)
    except (OSError, ValueError, ImportError) as error:
        # The data module names its own flags, of examples/train.py.
        reason = str(error).replace("--data.dataset_", "--dataset_")
        if any(given.values()):
            raise ValueError(
                f"--dataset_name: expected data with held-out documents, got "
                f"{' '.join(filter(None, given.values()))}: {reason}"
            ) from error
        return None, [f"Nothing was measured on text: {reason}"]
    said = []
    if args.dataset_name and log is None:
        said.append(
            f"The data of {first.label} are not known: whether it was trained on these documents "
            "is not, either."
        )
    elsewhere = [c.label for c in others if split_of(c) != split_of(first)]
    if elsewhere:
        said.append(
            f"{', '.join(elsewhere)}: trained on other data, or with another split, as far as "
            "is known: these documents may have been among them."
        )
    return text, said


def split_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What says which documents its training held out."""
    return {n: checkpoint.order.get(n) for n in ("content", "validation_fraction", "seed")}


def measured(args: argparse.Namespace) -> list[Section | None]:
    """What is measured on held-out documents: the loss, the gates, the samples."""
    checkpoints, text, said = args.checkpoints, args.text, list(args.said)
    sections: list[Section | None] = []
    if text is not None:
        try:
            found = position.measure(checkpoints, text, args.max_len, args.documents)
            sections.append(position.section(found, text))
        except ValueError as error:
            said.append(f"The loss by position was not measured: {error}")
    sections.append(inside.section(checkpoints, args.found_logs, text))
    if text is not None and args.samples:
        sections.append(
            samples.section(checkpoints, text, args.samples, args.new_tokens, args.seed)
        )
    for one in said:
        print(f"report.py: warning: {one}", file=sys.stderr)
    warned = Section("Held-out text", [Warned(one) for one in said]) if said else None
    return [warned, *sections]


def build(args: argparse.Namespace) -> list[Section]:
    """All sections, in the order of the page."""
    checkpoints, found_logs = args.checkpoints, args.found_logs
    sections = [card.section(checkpoints, found_logs), card.curve(checkpoints, found_logs)]
    sections.append(evaluation.section(checkpoints, args.found_results))
    sections += measured(args)
    lengths = doubling(args.seq_len, args.max_len)
    sections.append(speed.section(checkpoints, speed.measure(checkpoints, lengths)))
    return [section for section in sections if section is not None]


def introduction(argv: Sequence[str], place: torch.device) -> str:
    """How the page was made, and on what."""
    threads = torch.get_num_threads()
    command = shlex.join(["python", "examples/report.py", *argv])
    gpu = f"{torch.cuda.get_device_name(place)}, " if place.type == "cuda" else ""
    return (
        f"Made by: {command}; on {gpu}{platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}, "
        f"torch {torch.__version__}."
    )


def main(argv: list[str] | None = None) -> Path:
    """Run the command line; returns the folder of the report."""
    args = parse(argv)
    title = "Report on " + " and ".join(one.label for one in args.checkpoints)
    sections = build(args)
    said = introduction(sys.argv[1:] if argv is None else argv, args.device)
    pictures = {p.name: p.png for s in sections for p in s.parts if isinstance(p, Picture)}
    numbers = {"made_by": said, **{section.title: section.numbers for section in sections}}
    files: dict[str, str | bytes] = {
        **{f"{markdown.PICTURES}/{name}.png": png for name, png in pictures.items()},
        "report.json": json.dumps(finite(numbers), indent=1, allow_nan=False) + "\n",
        "report.md": markdown.render(title, said, sections),
        "report.html": html.render(title, said, sections),
    }
    try:
        write_all(args.output_dir, files)
    except OSError as error:  # a full disk, or a folder that changed meanwhile
        sys.exit(f"report.py: error: {error}")
    print(f"Written to {args.output_dir / 'report.html'}, and report.md and report.json beside it.")
    return args.output_dir


if __name__ == "__main__":
    main()
