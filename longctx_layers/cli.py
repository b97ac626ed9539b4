"""The command `longctx`: one name for the programs of the package, each loaded when it is run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from longctx_layers.command_line import closest


class Command(NamedTuple):
    """A program: the module whose `main()` runs it.

    Attributes:
        module: its name.
        purpose: what it is for, in one line.
        extra: what to install for it; empty if a plain install has all.
    """

    module: str
    purpose: str
    extra: str = ""


COMMANDS = {
    "train": Command(
        "longctx_layers.training.train",
        "train a language model, or go on from a checkpoint",
        "train",
    ),
    "evaluate": Command(
        "longctx_layers.evals.synthetic", "measure what a model remembers, and how far", "train"
    ),
    "report": Command(
        "longctx_layers.reports.__main__", "write a page about one checkpoint or several", "train"
    ),
    "export": Command(
        "longctx_layers.training.export",
        "turn a checkpoint into a folder for from_pretrained",
        "train",
    ),
    "info": Command("longctx_layers.info", "print versions, devices, and which backend runs what"),
    "selfcheck": Command(
        "longctx_layers.self_check", "compare each backend with the reference on this machine"
    ),
}


def usage() -> str:
    """What `longctx --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: longctx COMMAND [flags]",
            "",
            "Causal attention layers for long sequences, and models made of them.",
            "",
            "commands:",
            *lines,
            "",
            "longctx COMMAND --help lists the flags of a command; for instance:",
            "  longctx train fit --model.block=dpassm --data.dataset_name=stdlib",
            "  longctx evaluate --task=passkey --checkpoint_path=logs/checkpoints/last.ckpt",
            "",
        ]
    )


@contextmanager
def _started_as(module: str) -> Iterator[None]:
    """Make the running process look like `python -m module`.

    A program that starts itself again, as Lightning does for each device, looks up there how it was
    started. `sys.argv[0]` is no help: it is "longctx", which is no file here.
    """
    main_module = sys.modules["__main__"]
    before = main_module.__spec__
    main_module.__spec__ = sys.modules[module].__spec__
    try:
        yield
    finally:
        main_module.__spec__ = before


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `sys.argv` if no arguments are given."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    name, *rest = arguments
    command = COMMANDS.get(name)
    if command is None:
        sys.exit(f"longctx: error: no command {name!r}{closest(name, COMMANDS)}\n\n{usage()}")
    sys.argv = ["longctx", *rest]  # the programs read it, and name themselves by it
    try:
        program = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if not command.extra or (error.name or "").startswith("longctx_layers"):
            raise
        sys.exit(
            f"longctx {name}: error: this command needs {error.name}, which is not installed; "
            f"pip install 'longctx-layers[{command.extra}]'"
        )
    with _started_as(command.module):
        program.main()


if __name__ == "__main__":
    main()
