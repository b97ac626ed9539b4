"""examples/train.py as the tests start it, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longctx_layers.training import cli

ROOT = Path(__file__).parents[2]
WIKITEXTS = ("wikitext-2-raw-v1", "wikitext-103-raw-v1", "wikitext-2-v1", "wikitext-103-v1")

# A model of a million parameters, on made text, for a few steps.
SMALL = (
    "--model.num_params=tiny",
    "--data.dataset_name=synthetic",
    "--data.dataset_config=30",
    "--data.seq_len=64",
    "--data.batch_size=2",
    "--data.cache_dir=cache",
    "--trainer.max_steps=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=False",
)


def merged(*flags: str) -> list[str]:
    """Flags of which a later one replaces an earlier one of its name."""
    seq_len = {"--data.max_seq_len": "--data.seq_len"}
    by_name = {seq_len.get(f.partition("=")[0], f.partition("=")[0]): f for f in flags}
    return list(by_name.values())


def fit(*flags: str) -> cli.CLI:
    """Run `fit` in this process and return its command line object with trainer and model."""
    objects = []

    class Recorded(cli.CLI):
        def after_instantiate_classes(self) -> None:
            objects.append(self)

    with mock.patch.object(cli, "CLI", Recorded):
        cli.main(["fit", *flags])
    return objects[0]


def check(*flags: str) -> cli.CLI:
    """Parse `fit` and build model, data and trainer, but run nothing."""
    with mock.patch.object(cli.CLI, "_run_subcommand"):
        return fit(*flags)


def start(
    *flags: str, cwd: Path, program: Path = ROOT / "examples/train.py"
) -> subprocess.Popen[str]:
    """Start `fit` in a process of its own; what it prints is in `stdout`."""
    return subprocess.Popen(
        [sys.executable, "-u", str(program), "fit", *flags],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What a started process prints until it ends well."""
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return out


def scalars(root: Path, name: str = "train_loss", version: int | str = "*") -> dict[int, float]:
    """A scalar by step from TensorBoard's files: of all runs in a folder, of which later ones win,
    or of one.
    """
    values: dict[int, float] = {}
    versions = root.glob(f"lightning_logs/version_{version}")
    versions = sorted(versions, key=lambda p: int(p.name[8:]))
    for version in versions:
        events = EventAccumulator(str(version))
        events.Reload()
        if name in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(name)}
    return values


def local_wikitext(folder: Path) -> None:
    """A folder `wikitext` that `datasets` reads as the hub's: all four configurations."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = []
    for number in range(12):
        lines += ["", f" = Article {number} = \n", ""]
        lines += [
            f" Sentence {i} of the article {number} says {i * number} . \n" for i in range(30)
        ]
    configs = []
    for config in WIKITEXTS:
        (folder / "wikitext" / config).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            table = pa.table({"text": lines if split == "train" else lines[: len(lines) // 4]})
            pq.write_table(table, folder / "wikitext" / config / f"{split}-00000.parquet")
        files = [
            {"split": split, "path": f"{config}/{split}-*"}
            for split in ("train", "validation", "test")
        ]
        configs.append({"config_name": config, "data_files": files})
    front = json.dumps({"configs": configs})
    (folder / "wikitext/README.md").write_text(f"---\n{front}\n---\n")


def local_text(folder: Path) -> None:
    """A folder of text files."""
    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"a word and {number} others. " * 100)
