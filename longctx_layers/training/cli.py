"""The training program: LightningCLI with this library's model, data, defaults and errors."""

from __future__ import annotations

import difflib
import logging
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NoReturn

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from longctx_layers.command_line import program_name, underscored
from longctx_layers.data.errors import DataError, ResumptionError
from longctx_layers.data.module import LongContextData
from longctx_layers.data.store import DamagedCacheError
from longctx_layers.data.trainer_flags import check_end, is_trial
from longctx_layers.files import UNWRITABLE, StorageError
from longctx_layers.training.checkpoint_files import newest_checkpoint
from longctx_layers.training.checkpoint_io import AtomicCheckpointIO
from longctx_layers.training.checkpoints import read_content
from longctx_layers.training.hardware import trainer_changes
from longctx_layers.training.module import LanguageModel, NonFiniteError
from longctx_layers.training.monitoring import Monitor
from longctx_layers.training.saving import Checkpoints

# Lightning's warnings about choices that are made here on purpose.
SILENCED = (
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*The `srun` command is available.*",
    r".*It is recommended to use `self.log\('val_.*",  # their sums are over all ranks already
    r".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing here works in place
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
)

# Options of how a model is computed, not of what it computes; a resumed run may change them.
HOW = ("gradient_checkpointing", "compile")


class Parser(LightningArgumentParser):
    """Accepts hyphens in the names of flags; errors about an unknown flag name the closest one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with one line, without the usage, which is hundreds of flags."""
        unknown = re.findall(r"--([\w.]+)", message) if "nrecognized arguments" in message else []
        for flag in unknown:
            group = flag.rpartition(".")[0]
            flags = [f"--{a.dest}" for a in self._actions if a.dest.rpartition(".")[0] == group]
            near = difflib.get_close_matches(f"--{flag}", flags, n=2, cutoff=0.75)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            message += f"{hint} Valid: {' '.join(flags)}"
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)


class CLI(LightningCLI):
    """`fit` and `validate` of a language model on long documents."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods that are commands, and their arguments that are not flags."""
        methods = LightningCLI.subcommands()
        return {name: methods[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the trainer's defaults, and add the checkpoints' flags."""
        parser.set_defaults(
            {
                "trainer.default_root_dir": "logs",
                "trainer.max_steps": 100_000,
                "trainer.devices": 1,
                "trainer.log_every_n_steps": 10,
                "trainer.enable_model_summary": False,  # the monitor prints more
            }
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and find the file for `--ckpt_path=last`."""
        arguments = underscored(sys.argv[1:] if args is None else args)
        self.config = parser.parse_args(arguments)
        # Without defaults: what the command line, a file or the environment sets.
        self.explicit = parser.parse_args(arguments, defaults=False)[self.config.subcommand]
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if path == "last":
            root = config.trainer.default_root_dir
            try:
                newest = newest_checkpoint(root, skip_damaged=config.checkpoint.skip_damaged)
            except ValueError as error:
                parser.error(f"--ckpt_path=last: {error}")
            config.ckpt_path = newest and str(newest)
            print(f"--ckpt_path=last: {newest or f'none under {root} yet, so this run starts'}")

    def _parse_ckpt_path(self) -> None:
        """Take the model's options from the checkpoint, and refuse different explicit ones.

        Lightning's own method would silently replace explicit options.
        """
        command = self.config.subcommand
        path = self.config[command].get("ckpt_path")
        if not path or path == "hpc" or "://" in path:
            return
        try:
            content = read_content(path, mmap=True)
        except (OSError, ValueError) as error:
            self.parser.error(f"--ckpt_path: {error}")
        saved = {k: v for k, v in content["hyper_parameters"].items() if not k.startswith("_")}
        self.config = self.parser.parse_object({command: {"model": saved}}, self.config)
        options = self.config[command].model
        differing = []
        for name, value in vars(self.explicit.get("model", Namespace())).items():
            if name in HOW:
                options[name] = value
            elif value != options[name]:
                differing.append(f"--model.{name}={value} (the checkpoint has {options[name]})")
        seed = self.explicit.get("seed_everything")
        if type(seed) is int and command == "fit" and seed != content["longctx"]["seed"]:
            differing.append(f"--seed_everything={seed} (it has {content['longctx']['seed']})")
        if differing:
            self.parser.error(
                f"--ckpt_path={path}: expected the options that the checkpoint was trained with, "
                f"got {', '.join(differing)}; leave them out of the command line, the --config "
                "file and the environment, or start a new run without --ckpt_path"
            )

    def before_instantiate_classes(self) -> None:
        """Change options that this machine cannot run as they are, and print the changes."""
        trainer = self.config[self.subcommand].trainer
        try:
            changes, lines = trainer_changes(trainer)
        except ValueError as error:
            self.parser.error(str(error))
        for name, value in changes.items():
            trainer[name] = value
        for line in lines:
            print(line, flush=True)

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; errors about options end the program with one line."""
        try:
            super().instantiate_classes()
            self.model.check_data(self.datamodule.seq_len, self.datamodule.carry_state)
            if self.subcommand == "fit":
                check_end(self.trainer, self.datamodule.streaming)
        except (ValueError, TypeError, MisconfigurationException) as error:
            self.parser.error(str(error))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add atomic checkpoints, the monitor, and a progress bar unless there is one."""
        config = self._get(self.config_init, "trainer")
        bar = config.enable_progress_bar
        if bar is None:
            bar = sys.stdout.isatty()
        callbacks = config.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        own_bars = [c for c in callbacks if isinstance(c, ProgressBar)]
        if not bar:
            callbacks = [c for c in callbacks if c not in own_bars]
        elif not own_bars:
            callbacks = [*callbacks, TQDMProgressBar()]
        plugins = config.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        return super().instantiate_trainer(
            enable_progress_bar=bar,
            callbacks=[*callbacks, Monitor(plain_lines=not bar)],
            plugins=[*plugins, AtomicCheckpointIO()],
            **kwargs,
        )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> L.Trainer:
        if config.get("enable_checkpointing") is False:
            callbacks = [c for c in callbacks if not isinstance(c, Checkpoints)]
        return super()._instantiate_trainer(config, callbacks)

    def after_fit(self) -> None:
        """Validate the final model, unless its last step was followed by a validation."""
        trainer = self.trainer
        has_batches = trainer.limit_val_batches and len(self.datamodule.validation)
        if is_trial(trainer) or not has_batches or trainer.interrupted:
            return
        if self.model.validated_step == trainer.global_step:
            return
        trainer.validate(self.model, datamodule=self.datamodule, verbose=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the training program.

    Args:
        arguments: the command line, `["fit", "--model.block=dpassm", ...]`; `sys.argv[1:]` by
            default.
    """
    for message in SILENCED:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    try:
        CLI(
            LanguageModel,
            LongContextData,
            parser_class=Parser,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "default_env": True,
                "env_prefix": "LONGCTX",
                "prog": program_name("longctx_layers.training.train", "train"),
                "description": "Train a language model over any of the layers.",
            },
            auto_configure_optimizers=False,
            args=None if arguments is None else list(arguments),
        )
    except (
        NonFiniteError,
        DataError,
        ResumptionError,
        StorageError,
        DamagedCacheError,
        MisconfigurationException,
        ConnectionError,
    ) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        sys.exit(
            f"error: could not write {error.filename or 'the logs'} ({error.strerror}); make room "
            "or allow writing there, or choose another --trainer.default_root_dir"
        )
