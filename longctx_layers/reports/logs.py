"""What a training left in its folder: the options of the run, and the scalars of TensorBoard."""

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
    """One training, in one run or in several that went on from each other.

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
    """The log of the training that made a checkpoint, or None.

    Several trainings may have logged beside each other. Taken is the one whose model has the
    checkpoint's options, and of those that began before the checkpoint was written the last.

    Args:
        place: where to look: a run's `version_*`, or the folder of a training. By default the
            training's folder that a checkpoint of examples/train.py lies in.

    Raises:
        FileNotFoundError: if a place was given and no log that fits is there.
        ValueError: for a folder's model and a place with several trainings.
    """
    if place is None and checkpoint.step is None:
        return None
    training = Path(os.path.normpath(checkpoint.path.parent / ".."))
    runs = {folder: _options(folder) for folder in versions(place or training)}
    trainings = _trainings(runs, checkpoint.options)
    if place is not None and not trainings:
        raise FileNotFoundError(
            f"logs: expected runs of examples/train.py with this model's options, got {place}; "
            f"pass a folder with {FOLDER}/ in it, or one of the folders version_* in there"
        )
    if not trainings:
        return None
    if checkpoint.step is None and len(trainings) > 1:
        raise ValueError(
            f"logs: expected one training, got {len(trainings)} in {place}; a folder's model does "
            f"not say which is its own: pass one of the folders version_*, as {trainings[-1][-1]}"
        )
    written = checkpoint.path.stat().st_mtime
    before = [folders for folders in trainings if _began(folders[0]) <= written]
    folders = (before or trainings)[-1]
    return Log(folders, runs[folders[-1]], scalars(folders, checkpoint.step))


def versions(place: Path) -> list[Path]:
    """The folders of runs that are a place, or in it, from the first to the last."""
    if any(place.glob(EVENTS)):
        return [place]
    root = place / FOLDER if (place / FOLDER).is_dir() else place
    found = [p for p in root.glob("version_*") if p.name[8:].isdecimal() and any(p.glob(EVENTS))]
    return sorted(found, key=lambda path: int(path.name[8:]))


def _options(folder: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):  # a run that was killed while it began
        return {}
    return options if isinstance(options, dict) else {}


def _trainings(runs: Mapping[Path, dict[str, Any]], wanted: Mapping[str, Any]) -> list[list[Path]]:
    """Runs with these options of the model (any, if there are none), those that resumed joined."""
    found: list[list[Path]] = []
    previous: Any = None
    for folder, options in runs.items():
        own = options.get("model")
        if not isinstance(own, dict) or (wanted and _plain(own) != _plain(wanted)):
            continue
        if found and options.get("ckpt_path") and _plain(own) == previous:
            found[-1].append(folder)
        else:
            found.append([folder])
        previous = _plain(own)
    return found


def _plain(options: Mapping[str, Any]) -> Any:
    # As JSON has it: the keys of schedules are strings in one file and numbers in the other.
    return json.loads(json.dumps(options, default=str))


def _began(folder: Path) -> float:
    # Named after the second it was made in.
    return min(int(path.name.split(".")[3]) for path in folder.glob(EVENTS))


def scalars(folders: list[Path], step: int | None = None) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars of runs, up to a step: by name and step, of which later runs win."""
    found: dict[str, dict[int, float]] = {}
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            own = {e.step: e.value for e in events.Scalars(name) if step is None or e.step <= step}
            found.setdefault(name, {}).update(own)
    return found
