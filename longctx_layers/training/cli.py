"""The program: LightningCLI with this project's model, data, defaults and errors."""

from __future__ import annotations

import difflib
import logging
import re
import sys
import warnings
from argparse import Namespace
from typing import Any, NoReturn

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from longctx_layers.data.errors import DataError, ResumptionError
from longctx_layers.data.module import LongContextData
from longctx_layers.data.store import DamagedCacheError
from longctx_layers.data.trainer_flags import check_end
from longctx_layers.files import UNWRITABLE, StorageError
from longctx_layers.training.checkpoint_files import newest_checkpoint
from longctx_layers.training.checkpoint_io import AtomicCheckpointIO
from longctx_layers.training.checkpoints import read_content
from longctx_layers.training.hardware import settle
from longctx_layers.training.module import LanguageModel, NonFiniteError
from longctx_layers.training.monitoring import Monitor
from longctx_layers.training.saving import Checkpoints

# What Lightning says about choices that are made here on purpose.
SILENCED = (
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*The `srun` command is available.*",
    r".*It is recommended to use `self.log\('val_.*",  # their sums are over all ranks already
    r".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing here works in place
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
)


# Options of the model that say how it is computed, and not what; a resumed run may change them.
HOW = ("gradient_checkpointing", "compile")


class Parser(LightningArgumentParser):
    """Errors about a misspelt flag name the flags that there are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Not even an abbreviation is guessed at.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with one line, without the usage of some hundred flags."""
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
        """The trainer's methods that are commands, and their arguments that are no flags."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the trainer's defaults, and add the checkpoints' flags."""
        parser.set_defaults(
            {
                "trainer.default_root_dir": "logs",
                "trainer.max_steps": 100_000,
                "trainer.devices": 1,
                "trainer.log_every_n_steps": 10,
                "trainer.enable_model_summary": False,  # the monitor's start lines say more
            }
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and find `--ckpt_path=last`."""
        super().parse_arguments(parser, args)
        self.given = parser.parse_args(args, defaults=False)[self.config.subcommand]
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if path == "last":
            root = config.trainer.default_root_dir
            try:
                newest = newest_checkpoint(root, skip_damaged=config.checkpoint.skip_damaged)
            except ValueError as error:
                parser.error(f"--ckpt_path=last: {error}")
            config.ckpt_path = newest and str(newest)
            print(f"--ckpt_path=last: {newest or f'none under {root} yet, so this run begins'}")

    def _parse_ckpt_path(self) -> None:
        """Take the model's options from the checkpoint, and refuse others that were given.

        Lightning's own would replace those that were given without a word.
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
        for name, value in vars(self.given.get("model", Namespace())).items():
            if name in HOW:
                options[name] = value
            elif value != options[name]:
                differing.append(f"--model.{name}={value} (the checkpoint has {options[name]})")
        seed = self.given.get("seed_everything")
        if type(seed) is int and command == "fit" and seed != content["longctx"]["seed"]:
            differing.append(f"--seed_everything={seed} (it has {content['longctx']['seed']})")
        if differing:
            self.parser.error(
                f"--ckpt_path={path}: expected the options that the checkpoint was trained with, "
                f"got {', '.join(differing)}; leave them out of the command line, the --config "
                "file and the environment, or begin a new run without --ckpt_path"
            )

    def before_instantiate_classes(self) -> None:
        """Settle what depends on the machine."""
        try:
            said = settle(self.config[self.subcommand].trainer)
        except ValueError as error:
            self.parser.error(str(error))
        print(*said, sep="\n", end="\n" * bool(said), flush=True)

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; what they refuse is the user's error, in one line."""
        try:
            super().instantiate_classes()
            self.model.check_data(self.datamodule.seq_len, self.datamodule.carry_state)
            if self.subcommand == "fit":
                check_end(self.trainer, self.datamodule.streaming)
        except (ValueError, TypeError, MisconfigurationException) as error:
            self.parser.error(str(error))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add atomic checkpoints, the monitor, and a bar if nobody chose another."""
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
        """Validate the model as it came out, unless that was the last thing done."""
        trainer = self.trainer
        wanted = trainer.limit_val_batches and len(self.datamodule.validation)
        if trainer.fast_dev_run or not wanted or trainer.interrupted:
            return
        if self.model.validated_step == trainer.global_step:
            return
        trainer.validate(self.model, datamodule=self.datamodule, verbose=False)


def main() -> None:
    """Run the command line in `sys.argv`."""
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
            parser_kwargs={"default_env": True, "env_prefix": "LONGCTX"},
            auto_configure_optimizers=False,
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
