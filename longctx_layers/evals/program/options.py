"""The flags of the evaluation program, and what they amount to once they are checked."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longctx_layers import LAYERS
from longctx_layers.command_line import Parser, device, program_name
from longctx_layers.evals.program.models import MINI
from longctx_layers.evals.scoring import doubling
from longctx_layers.evals.tasks import TASKS, Passkey, Task
from longctx_layers.evals.tasks.base import NEEDLE, STREAMING
from longctx_layers.layers.registry import canonical_name
from longctx_layers.lm.factory import SIZES
from longctx_layers.training.options import BLOCK_FLAGS, block_options

LEAST = {
    "seq_len": 1,
    "max_len": 1,
    "train_steps": 0,
    "train_len": 1,
    "n": 1,
    "batch_size": 1,
    "tokens_at_once": 1,
    "depths": 1,
    "rotations": 2,
    "seed": 0,
}


@dataclass(frozen=True)
class Options:
    """What to evaluate and how, from flags that were checked.

    Attributes:
        task: the name of a task, or `needle` or `streaming_ppl`.
        lengths: numbers of tokens to measure at, in increasing order.
        output_dir: the folder for results; None for the default.
        device: to run on.
        checkpoint: a checkpoint or folder to load; None to build a model.
        block: the name of the layer. With a checkpoint it may be None: the checkpoint knows.
        block_options: of the layer that is built.
        num_params: the size of the model that is built.
        train_steps, train_len, learning_rate: of training on the task first; 0 steps for none.
        knobs: those options of the task that were given.
        depths: number of depths of the needle grid.
        dataset_name, dataset_config, rotations: of the text that streaming_ppl reads.
        n: number of sequences of each length.
        batch_size: number of sequences that are read side by side.
        tokens_at_once: number of tokens that are read at once, over all sequences.
        seed: of the weights, of training and of the sequences.
        probe: whether to measure with the recurrent state cleared too.
        overwrite: whether to replace results that were made with other settings.
    """

    task: str
    lengths: tuple[int, ...]
    output_dir: Path | None
    device: torch.device
    checkpoint: Path | None
    block: str | None
    block_options: Mapping[str, Any]
    num_params: str
    train_steps: int
    train_len: int
    learning_rate: float
    knobs: Mapping[str, Any]
    depths: int
    dataset_name: str
    dataset_config: str | None
    rotations: int
    n: int
    batch_size: int
    tokens_at_once: int
    seed: int
    probe: bool
    overwrite: bool

    @property
    def shortest(self) -> int:
        """The shortest length: --seq_len."""
        return self.lengths[0]

    @property
    def longest(self) -> int:
        """The longest length: --max_len."""
        return self.lengths[-1]

    @property
    def is_trained(self) -> bool:
        """Whether the model has learnt anything: it is loaded, or trained on the task first."""
        return self.checkpoint is not None or self.train_steps > 0


def task_names() -> tuple[str, ...]:
    """All that `--task` accepts, registered tasks among it."""
    return (*TASKS, NEEDLE, STREAMING)


def task_class(name: str) -> type[Task] | None:
    """The class of an evaluation's sequences; None for streaming_ppl, which reads text."""
    if name == STREAMING:
        return None
    return Passkey if name == NEEDLE else TASKS[name]


def knobs(name: str) -> Mapping[str, str]:
    """The task options that an evaluation has, with their help texts."""
    kind = task_class(name)
    return {} if kind is None else kind.knobs


def parser(description: str = "") -> Parser:
    """The flags; `options_of` turns what they say into `Options`."""
    program = Parser(
        prog=program_name("longctx_layers.evals.synthetic", "evaluate"),
        description=description,
        allow_abbrev=False,
    )
    add = program.add_argument
    add("--task", choices=task_names(), required=True)
    add("--seq_len", type=int, default=256, help="the shortest length (default: 256)")
    add("--max_len", type=int, help="lengths double up to this one (default: seq_len alone)")
    add(
        "--output_dir",
        type=Path,
        help="default: reports/evaluation, or a folder in it that is named after the checkpoint",
    )
    add("--device", default="auto", help="auto, cpu or cuda")

    add = program.add_argument_group("a model that is loaded").add_argument
    add(
        "--pretrained_model",
        "--checkpoint_path",
        type=Path,
        action="append",
        dest="checkpoint",
        metavar="PATH",
        help="a training checkpoint or a save_pretrained folder, with its own configuration and "
        "tokenizer",
    )
    add = program.add_argument_group("a model that is built").add_argument
    add(
        "--block",
        type=canonical_name,
        choices=LAYERS,
        help="default: dpassm; a checkpoint has its own",
    )
    add("--num_params", choices=(MINI, *SIZES), help="default: mini, which has 128,000")
    for name in BLOCK_FLAGS:
        add(f"--{name}", type=int)
    add("--block_kwargs", type=json_object, help='more options of the block: {"ssm": null}')

    add = program.add_argument_group("training on the task first").add_argument
    add("--train_steps", "--pretrain_steps", type=int, default=0, help="default: none")
    add("--train_len", type=int, help="default: seq_len")
    add("--learning_rate", type=float, default=3e-3)

    add = program.add_argument_group("the task").add_argument
    for name, (kind, text) in _all_knobs().items():
        add(f"--{name}", type=kind, help=text)
    add("--depths", type=int, default=5, help="number of depths in the grid (needle)")
    add("--dataset_name", default="stdlib", help="text to read the held-out part of, streaming_ppl")
    add("--dataset_config", help="as for training; for --dataset_name=local a path")
    add("--rotations", type=int, default=4, help="number of starting points (streaming_ppl)")

    add = program.add_argument_group("the measurement").add_argument
    add("--n", type=int, default=64, help="number of sequences of each length")
    add("--batch_size", type=int, default=16, help="number of sequences side by side")
    add("--tokens_at_once", type=int, default=8192, help="number of tokens read at once, over all")
    add("--seed", type=int, default=0)
    add("--no_probe", action="store_true", help="do not measure with the state cleared")
    add("--overwrite", action="store_true", help="replace results of other settings in output_dir")
    return program


def _all_knobs() -> dict[str, tuple[type, str]]:
    """The options of all tasks, with their types, and with the tasks that have them."""
    flags: dict[str, tuple[type, str]] = {}
    for kind in TASKS.values():
        for name, text in kind.knobs.items():
            tasks = [task for task in task_names() if name in knobs(task)]
            known = "" if len(tasks) > len(TASKS) / 2 else f" ({', '.join(tasks)})"
            flags.setdefault(name, (type(getattr(kind, name)), text + known))
    return flags


def json_object(text: str) -> dict[str, Any]:
    """Parse a flag that takes a JSON object."""
    try:
        if isinstance(value := json.loads(text), dict):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f'expected a JSON object such as {{"ssm": null}}, got {text!r}; use double quotes'
    )


def parse(argv: Sequence[str] | None = None) -> Options:
    """The options of a command line.

    Raises:
        ValueError: for values that are impossible; unknown flags end the program.
    """
    return options_of(parser().parse_args(argv))


def options_of(flags: argparse.Namespace) -> Options:
    """Check what the flags say.

    Raises:
        ValueError: for values that are impossible, with what was expected.
    """
    for name, least in LEAST.items():
        value = getattr(flags, name)
        if value is not None and value < least:
            raise ValueError(f"--{name}: expected at least {least}, got {value}")
    if flags.seed >= 2**63:
        raise ValueError(f"--seed: expected less than 2**63, got {flags.seed}")
    if not 0 < flags.learning_rate < 1:
        raise ValueError(
            f"--learning_rate: expected a number between 0 and 1, got {flags.learning_rate}"
        )
    longest = flags.seq_len if flags.max_len is None else flags.max_len
    if longest < flags.seq_len:
        raise ValueError(f"--max_len: expected at least --seq_len = {flags.seq_len}, got {longest}")
    if flags.task == STREAMING and flags.train_steps:
        raise ValueError(
            "--train_steps: streaming_ppl reads text, and a model of text is trained by "
            "longctx_layers.training.train; pass its checkpoint with --checkpoint_path"
        )
    checkpoint = _checkpoint(flags)
    block = flags.block
    layer_options: Mapping[str, Any] = {}
    if checkpoint is None:
        block = block or "dpassm"
        given = {name: getattr(flags, name) for name in BLOCK_FLAGS}
        layer_options = block_options([block], given, flags.block_kwargs)[block]
    return Options(
        task=flags.task,
        lengths=tuple(doubling(flags.seq_len, longest)),
        output_dir=flags.output_dir,
        device=device(flags.device),
        checkpoint=checkpoint,
        block=block,
        block_options=layer_options,
        num_params=flags.num_params or MINI,
        train_steps=flags.train_steps,
        train_len=flags.train_len or flags.seq_len,
        learning_rate=flags.learning_rate,
        knobs=_knob_values(flags),
        depths=flags.depths,
        dataset_name=flags.dataset_name,
        dataset_config=flags.dataset_config,
        rotations=flags.rotations,
        n=flags.n,
        batch_size=flags.batch_size,
        tokens_at_once=flags.tokens_at_once,
        seed=flags.seed,
        probe=not flags.no_probe,
        overwrite=flags.overwrite,
    )


def _checkpoint(flags: argparse.Namespace) -> Path | None:
    """The model to load; then no flag may describe one to build."""
    paths = sorted(set(flags.checkpoint or []))
    if not paths:
        return None
    if len(paths) > 1:
        raise ValueError(
            "--pretrained_model, --checkpoint_path: these are two names of one option, got "
            f"different values {[str(path) for path in paths]}; pass one path"
        )
    described = [
        name
        for name in ("num_params", "block_kwargs", *BLOCK_FLAGS)
        if getattr(flags, name) is not None
    ]
    if described:
        raise ValueError(
            f"--{', --'.join(described)}: a checkpoint has its own configuration; omit them"
        )
    path: Path = paths[0]
    if not path.exists():
        raise ValueError(
            "--checkpoint_path: expected a training checkpoint or a save_pretrained folder, but "
            f"there is no {path}"
        )
    return path


def _knob_values(flags: argparse.Namespace) -> dict[str, Any]:
    """The task options that were given; all of them are options of this task."""
    values = {name: getattr(flags, name) for name in _all_knobs()}
    values = {name: value for name, value in values.items() if value is not None}
    known = list(knobs(flags.task))
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(
            f"--{', --'.join(unknown)}: {flags.task} has the options {known or 'none'}; omit it"
        )
    return values
