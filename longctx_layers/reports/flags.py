"""The flags of the report program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longctx_layers.command_line import Parser, device, program_name

DESCRIPTION = "A report on a trained model: one HTML file, and Markdown with pictures."
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


def parser() -> Parser:
    """The flags of the command line."""
    program = Parser(
        prog=program_name("longctx_layers.reports", "report"),
        description=DESCRIPTION,
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
