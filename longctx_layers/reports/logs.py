"""The logs of a training: the options of its runs, and their TensorBoard scalars."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longctx_layers.reports.checkpoint import Checkpoint

FOLDER = "lightning_logs"
EVENTS = "events.out.tfevents.*"


@dataclass
class Log:
    """One training, in one run or in several of which each resumed the one before.

    Attributes:
        folders: of its runs, `version_*`.
        options: config.yaml of the last run.
        scalars: by name and step, up to the checkpoint.
    """

    folders: list[Path]
    options: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def data(self) -> dict[str, Any]:
        """The options of the data module."""
        return self.options.get("data") or {}

    def curve(self, name: str) -> list[tuple[int, float]]:
        """A scalar by step, in order; empty if it was not logged."""
        return sorted(self.scalars.get(name, {}).items())


def find(checkpoint: Checkpoint, place: Path | None = None) -> Log | None:
    """The log of the training that wrote a checkpoint, or None.

    A folder may hold the logs of several trainings. The right one has the checkpoint's model
    options; of several, it is the last one that began before the checkpoint was written.

    Args:
        checkpoint: to find the log of.
        place: where to look: a run's `version_*`, or the folder of a training. By default it is the
            folder of the training that a checkpoint lies in.

    Raises:
        FileNotFoundError: if a place was given that has no suitable log.
        ValueError: for the model of a folder, and a place with several trainings.
    """
    if place is None and checkpoint.step is None:
        return None
    training = Path(os.path.normpath(checkpoint.path.parent / ".."))
    runs = {folder: _options(folder) for folder in versions(place or training)}
    trainings = _trainings(runs, checkpoint.options)
    if place is not None and not trainings:
        raise FileNotFoundError(
            f"logs: expected training runs with this model's options, got {place}; pass a folder "
            f"with {FOLDER}/ in it, or one of the folders version_* in there"
        )
    if not trainings:
        return None
    if checkpoint.step is None and len(trainings) > 1:
        raise ValueError(
            f"logs: expected one training, got {len(trainings)} in {place}; the model of a folder "
            "does not say which of them is its own: pass one of the folders version_*, such as "
            f"{trainings[-1][-1]}"
        )
    written = checkpoint.path.stat().st_mtime
    before = [folders for folders in trainings if _began(folders[0]) <= written]
    folders = (before or trainings)[-1]
    return Log(folders, runs[folders[-1]], scalars(folders, checkpoint.step))


def versions(place: Path) -> list[Path]:
    """The folders of runs in a place, in order; the place itself if it is one."""
    if any(place.glob(EVENTS)):
        return [place]
    root = place / FOLDER if (place / FOLDER).is_dir() else place
    runs = [p for p in root.glob("version_*") if p.name[8:].isdecimal() and any(p.glob(EVENTS))]
    return sorted(runs, key=lambda path: int(path.name[8:]))


def _options(folder: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):  # a run that was killed at its beginning
        return {}
    return options if isinstance(options, dict) else {}


def _trainings(runs: Mapping[Path, dict[str, Any]], wanted: Mapping[str, Any]) -> list[list[Path]]:
    """Runs whose model has these options (any model without them), joined where they resumed."""
    trainings: list[list[Path]] = []
    previous: Any = None
    for folder, options in runs.items():
        model = options.get("model")
        if not isinstance(model, dict) or (wanted and _plain(model) != _plain(wanted)):
            continue
        if trainings and options.get("ckpt_path") and _plain(model) == previous:
            trainings[-1].append(folder)
        else:
            trainings.append([folder])
        previous = _plain(model)
    return trainings


def _plain(options: Mapping[str, Any]) -> Any:
    # As JSON, because the keys of schedules are strings in one file and numbers in the other.
    return json.loads(json.dumps(options, default=str))


def _began(folder: Path) -> float:
    # TensorBoard puts the second of their creation into the names of its files.
    return min(int(path.name.split(".")[3]) for path in folder.glob(EVENTS))


def scalars(folders: list[Path], step: int | None = None) -> dict[str, dict[int, float]]:
    """TensorBoard scalars of runs up to a step, by name and step; later runs take precedence."""
    values: dict[str, dict[int, float]] = {}
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            by_step = values.setdefault(name, {})
            by_step.update(
                (e.step, e.value) for e in events.Scalars(name) if step is None or e.step <= step
            )
    return values
