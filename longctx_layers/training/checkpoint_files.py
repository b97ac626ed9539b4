"""The checkpoint files of a run: whether one is damaged, which one is furthest in training."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

FOLDER = "checkpoints"  # below a run's `default_root_dir`
CALLBACK = "Checkpoints"  # under this key a checkpoint holds the state of training.saving


def damage(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with a file that `torch.save` wrote, in words; None if it is intact.

    Every record in the file has a checksum, which torch itself does not compare when it reads.
    """
    if not Path(path).stat().st_size:
        return "which is empty"
    try:
        with zipfile.ZipFile(path) as file:
            record = file.testzip()
    except Exception as error:  # a file may hold anything
        return f"which is cut short, or is no checkpoint ({type(error).__name__})"
    if record is not None:
        return f"which has changed since it was written (the checksum of {record} is another)"
    return None


class Facts(NamedTuple):
    """What a checkpoint file says about itself.

    Attributes:
        path: of the file.
        step: optimizer steps before it was written; -1 if neither content nor name tell.
        run: the id of the run that wrote it; None for files of versions without ids.
        modified: time of the last change, in nanoseconds.
        readable: whether the content could be read.
    """

    path: Path
    step: int
    run: str | None
    modified: int
    readable: bool = True


def facts(path: Path) -> Facts:
    """Read the facts of a file without its tensors; of a damaged file, what its name says."""
    modified = path.stat().st_mtime_ns
    try:
        _verify_pickle(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        run = content.get("callbacks", {}).get(CALLBACK, {}).get("run")
        return Facts(path, content["global_step"], run, modified)
    except Exception:  # a file may hold anything
        in_name = re.search(r"step=(\d+)", path.name)
        step = int(in_name[1]) if in_name else -1
        return Facts(path, step, None, modified, readable=False)


def _verify_pickle(path: Path) -> None:
    """Compare the checksum of the record that holds everything but the tensors."""
    with zipfile.ZipFile(path) as file:
        (name,) = (name for name in file.namelist() if name.endswith("/data.pkl"))
        file.read(name)  # raises BadZipFile where the checksum differs


def folder_facts(folder: Path) -> list[Facts]:
    """The facts of every checkpoint in a folder, in no particular order."""
    return [facts(path) for path in folder.glob("*.ckpt")]


def by_progress(folder: Path) -> list[Facts]:
    """The readable checkpoints of the run that wrote last, the one furthest in training first."""
    readable = [file for file in folder_facts(folder) if file.readable]
    latest = max(readable, key=lambda file: file.modified, default=None)
    own = [file for file in readable if latest is not None and file.run == latest.run]
    # Of two files of the same step, the one without a version in its name comes first.
    return sorted(own, key=lambda file: (file.step, "-v" not in file.path.stem), reverse=True)


def newest_checkpoint(root: str | os.PathLike[str], *, skip_damaged: bool = False) -> Path | None:
    """Find the checkpoint to resume from: the one furthest in training of the run that wrote last.

    Args:
        root: the run's `default_root_dir`.
        skip_damaged: return an older, intact checkpoint where the newest one is damaged.

    Returns:
        The file, or None if there is no checkpoint yet.

    Raises:
        ValueError: if the newest file is damaged; it names the newest intact one.

    >>> print(newest_checkpoint("logs-of-no-run"))
    None
    """
    folder = Path(root, FOLDER)
    own = by_progress(folder)
    damaged = [file.path for file in folder_facts(folder) if _may_be_newest(file, own)]
    damaged.sort(reverse=True)
    intact = None
    for file in own:
        if damage(file.path) is None:
            intact = file.path
            break
        damaged.append(file.path)
    if damaged and not (skip_damaged and intact):
        remedy = "there is no intact one of the run that wrote last"
        if intact is not None:
            remedy = (
                f"the newest intact one is {intact}: pass it as --ckpt_path, or "
                "--checkpoint.skip_damaged=True with --ckpt_path=last"
            )
        raise ValueError(
            f"checkpoint: expected a whole file, got {damaged[0]}, {damage(damaged[0])}; {remedy}"
        )
    return intact


def _may_be_newest(file: Facts, own: list[Facts]) -> bool:
    """Whether an unreadable file may belong to the run `own` and be ahead of its readable files.

    Only its name and time can tell. A file without a step in its name is not a run's checkpoint.
    """
    if file.readable or file.step < 0:
        return False
    if not own or file.modified > own[0].modified:
        return True
    return file.step > own[0].step and file.modified >= min(other.modified for other in own)
