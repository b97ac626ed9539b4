"""The flags of examples/evaluate.py, and all that is checked before work begins."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from longctx_layers import LAYERS
from longctx_layers.evals import TASKS, Passkey, Task, Vocabulary
from longctx_layers.evals.program.models import MINI
from longctx_layers.layers.registry import canonical_name
from longctx_layers.lm.factory import SIZES
from longctx_layers.training.options import BLOCK_FLAGS, block_options

NEEDLE, STREAMING = "needle", "streaming_ppl"
NAMES = (*TASKS, NEEDLE, STREAMING)
# What makes a task harder or easier; which task has which follows from its class.
KNOBS = {
    "distance": "least tokens between what is told and the question; by default beyond what the "
    "stacked windows reach",
    "n_symbols": "how many symbols values are drawn from",
    "digits": "tokens of the value",
    "distractors": "values with another mark (passkey, needle)",
    "pairs": "pairs of key and value (mqar)",
    "questions": "questions in a sequence (drift_curve)",
}


def parser(description: str) -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = made.add_argument
    add("--task", choices=NAMES, required=True)
    add("--seq_len", type=int, default=256, help="the shortest length")
    add("--max_len", type=int, help="lengths double up to this one; by default seq_len alone")
    add("--output_dir", type=Path, help="reports/evaluation, or a folder of the checkpoint's there")
    add("--device", default="auto", help="auto, cpu or cuda")

    add = made.add_argument_group("the model: loaded").add_argument
    add("--pretrained_model", "--checkpoint_path", type=Path, action="append", dest="checkpoint",
        metavar="PATH", help="a checkpoint of examples/train.py or a save_pretrained folder; its "
        "configuration and tokenizer come with it")  # fmt: skip
    add = made.add_argument_group("the model: built").add_argument
    add(
        "--block",
        type=canonical_name,
        choices=LAYERS,
        help="dpassm by default; a checkpoint has its own",
    )
    add("--num_params", choices=(MINI, *SIZES), help="mini (128 k, the default) or a named size")
    for name in BLOCK_FLAGS:
        add(f"--{name}", type=int)
    add("--block_kwargs", type=json_object, help='further options of the block, {"ssm": null}')

    add = made.add_argument_group("training on the task first").add_argument
    add("--train_steps", "--pretrain_steps", type=int, default=0, help="0: none")
    add("--train_len", type=int, help="training length; seq_len by default")
    add("--learning_rate", type=float, default=3e-3)

    add = made.add_argument_group("the task").add_argument
    for name, meaning in KNOBS.items():
        add(f"--{name}", type=int, help=meaning)
    add("--depths", type=int, default=5, help="rows of the grid (needle)")
    add("--dataset_name", default="stdlib", help="its held-out part is read (streaming_ppl)")
    add("--dataset_config", help="as for training; for --dataset_name=local a path")
    add("--rotations", type=int, default=4, help="places where the text begins (streaming_ppl)")

    add = made.add_argument_group("the measurement").add_argument
    add("--n", type=int, default=64, help="sequences of each length")
    add("--batch_size", type=int, default=16, help="sequences side by side")
    add("--tokens_at_once", type=int, default=8192, help="read at once, of all of them together")
    add("--seed", type=int, default=0)
    add("--no_probe", action="store_true", help="leave the state probe out")
    add("--overwrite", action="store_true", help="replace rows of other settings in output_dir")
    return made


def json_object(text: str) -> dict[str, Any]:
    """The value of a flag that takes a JSON object."""
    try:
        if isinstance(value := json.loads(text), dict):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f'expected a JSON object such as {{"ssm": null}}, got {text!r}; mind the double quotes'
    )


def check(args: argparse.Namespace) -> None:
    """Settle the flags in place.

    Raises:
        ValueError: for what cannot be, with what was expected and the remedy.
    """
    for name, least in (
        ("seq_len", 1), ("max_len", 1), ("train_steps", 0), ("train_len", 1), ("n", 1),
        ("batch_size", 1), ("tokens_at_once", 1), ("depths", 1), ("rotations", 2), ("seed", 0),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name}: expected at least {least}, got {value}")
    if args.seed >= 2**63:
        raise ValueError(f"--seed: expected less than 2**63, got {args.seed}")
    if not 0 < args.learning_rate < 1:
        raise ValueError(
            f"--learning_rate: expected a number from 0 to 1, got {args.learning_rate}"
        )
    args.max_len = args.seq_len if args.max_len is None else args.max_len
    if args.max_len < args.seq_len:
        raise ValueError(
            f"--max_len: expected at least --seq_len = {args.seq_len}, got {args.max_len}"
        )
    args.lengths = doubling(args.seq_len, args.max_len)
    args.train_len = args.train_len or args.seq_len
    args.device = device(args.device)
    _check_model(args)
    _check_knobs(args)
    if args.task == STREAMING and args.train_steps:
        raise ValueError(
            "--train_steps: streaming_ppl reads text, which is trained on by examples/train.py; "
            "pass --checkpoint_path"
        )


def doubling(first: int, last: int) -> list[int]:
    """Lengths from the first to the last, each twice the one before; the last is always there."""
    lengths = [first]
    while 2 * lengths[-1] <= last:
        lengths.append(2 * lengths[-1])
    return lengths if lengths[-1] == last else [*lengths, last]


def device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU if there is one.

    Raises:
        ValueError: for a GPU that is not there, or another name.
    """
    there = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if there else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise ValueError(
            f"--device={name}: torch {torch.__version__} finds {count or 'no'} GPU on this "
            "machine; use --device cpu, or auto for what there is"
        )
    return torch.device(name)


def _check_model(args: argparse.Namespace) -> None:
    paths = set(args.checkpoint or [])
    if len(paths) > 1:
        raise ValueError(
            f"--pretrained_model, --checkpoint_path: one option, got {sorted(map(str, paths))}; "
            "pass one path"
        )
    args.checkpoint = next(iter(paths), None)
    flags = {name: getattr(args, name) for name in BLOCK_FLAGS}
    if args.checkpoint is None:
        args.block, args.num_params = args.block or "dpassm", args.num_params or MINI
        args.options = block_options([args.block], flags, args.block_kwargs)[args.block]
        return
    given = [
        n for n in ("num_params", "block_kwargs", *BLOCK_FLAGS) if getattr(args, n) is not None
    ]
    if given:
        raise ValueError(
            f"--{', --'.join(given)}: a checkpoint has its own configuration; leave them out"
        )
    if not args.checkpoint.exists():
        raise ValueError(
            f"--checkpoint_path: expected a checkpoint of examples/train.py or a save_pretrained "
            f"folder, but there is no {args.checkpoint}"
        )


def _check_knobs(args: argparse.Namespace) -> None:
    known = knobs(args.task)
    stray = [name for name in KNOBS if getattr(args, name) is not None and name not in known]
    if stray:
        raise ValueError(
            f"--{', --'.join(stray)}: {args.task} has the options {known or 'none'}; leave it out"
        )


def knobs(name: str) -> list[str]:
    """Those of `KNOBS` that a task has."""
    if name == STREAMING:
        return []
    fields = {f.name for f in dataclasses.fields(TASKS.get(name, Passkey))}
    return [knob for knob in KNOBS if knob in fields]


def make_task(args: argparse.Namespace, vocabulary: Vocabulary, reach: int | None) -> Task:
    """The task with its knobs; `distance` is beyond `reach` unless it is given or does not fit.

    Raises:
        ValueError: for knobs that cannot be, or a shortest length that is too short.
    """
    kind = TASKS.get(args.task, Passkey)
    given: dict[str, Any] = {name: getattr(args, name) for name in knobs(args.task)}
    given = {name: value for name, value in given.items() if value is not None}
    if "n_symbols" not in given:
        # A tokenizer may have fewer symbols than the tasks' own vocabulary.
        parts = 2 if args.task in ("copy_recall", "mqar") else 1
        default = next(f.default for f in dataclasses.fields(kind) if f.name == "n_symbols")
        given["n_symbols"] = min(default, len(vocabulary.symbols) // parts)
    if args.task == "chunk_transfer":
        given["chunk_size"] = args.chunk_of_model
    task = kind(vocabulary=vocabulary, **given)
    shortest = min(args.lengths[0], args.train_len if args.train_steps else args.lengths[0])
    if "distance" not in given:
        wanted = 0 if reach is None else reach + 1
        task = _with_distance(task, wanted, shortest)
    if task.shortest > shortest:
        raise ValueError(
            f"--seq_len: expected at least the {task.shortest} tokens that {task.name} takes "
            f"(distance {task.distance}), got {shortest}; make it longer, or --distance shorter"
        )
    return task


def _with_distance(task: Task, wanted: int, length: int) -> Task:
    """The task at the distance that is wanted, or as far as the length lets it."""
    task = dataclasses.replace(task, distance=wanted)
    surplus = max(0, task.shortest - length)
    return dataclasses.replace(task, distance=max(0, wanted - surplus))
