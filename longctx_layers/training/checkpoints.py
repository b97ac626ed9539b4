"""Checkpoint files: written whole or not at all, checked when read; reading runs no code."""

from __future__ import annotations

import os
import re
import tempfile
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from longctx_layers import LongContextLM, ModelConfig, state_to
from longctx_layers.files import StorageError

FOLDER = "checkpoints"
CALLBACK = "Checkpoints"  # by this name a checkpoint holds the state of training.saving


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames; checks, and loads tensors and plain values only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; after an interruption there is the old file or the new one.

        Raises:
            StorageError: if the file cannot be written; nothing of it is left.
        """
        if "://" in str(path):  # an object store, which writes whole objects anyway
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        writer = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                writer = _Writer(file)
                torch.save(checkpoint, writer)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except (OSError, RuntimeError) as error:
            failed = error if isinstance(error, OSError) else writer and writer.failed
            if failed is None:
                raise
            partial.unlink(missing_ok=True)  # it may fill the disk
            raise StorageError(
                f"checkpoint: could not write {target} ({failed.strerror or failed}). "
                f"{_kept_in(target.parent)}; make room or allow writing there, or choose another "
                "--trainer.default_root_dir, and resume with --ckpt_path"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: if it is damaged.
            pickle.UnpicklingError: if it holds anything but tensors and plain values.
        """
        if "://" not in str(path) and Path(path).is_file() and (problem := damage(path)):
            raise _unfit(path, problem)
        return super().load_checkpoint(path, map_location, weights_only=True)


class _Writer:
    """Remembers why a write failed: torch hides it behind an error about positions in a file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _kept_in(folder: Path) -> str:
    intact = next((one.path for one in _by_progress(folder) if damage(one.path) is None), None)
    return f"The last good checkpoint, {intact}, is kept" if intact else "There is no earlier one"


def damage(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with a file that `torch.save` wrote, in words, or None if it is as written.

    Every record of it has a checksum, which torch itself does not compare when it reads.
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
    """What a checkpoint says about itself: of which run it is, and of which step."""

    path: Path
    step: int
    run: str | None  # None for those written before runs had names
    modified: int
    readable: bool = True


def facts(path: Path) -> Facts:
    """The facts of a file, without reading its tensors; of a damaged one those of its name."""
    modified = path.stat().st_mtime_ns
    try:
        _verify_pickle(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        run = found.get("callbacks", {}).get(CALLBACK, {}).get("run")
        return Facts(path, found["global_step"], run, modified)
    except Exception:  # a file may hold anything
        named = re.search(r"step=(\d+)", path.name)
        return Facts(path, int(named[1]) if named else -1, None, modified, readable=False)


def _verify_pickle(path: Path) -> None:
    """Compare the checksum of the record with everything but the tensors; torch does not."""
    with zipfile.ZipFile(path) as file:
        (name,) = (name for name in file.namelist() if name.endswith("/data.pkl"))
        file.read(name)  # raises BadZipFile where the checksum differs


def folder_facts(folder: Path) -> list[Facts]:
    """The facts of every checkpoint in a folder, in no order."""
    return [facts(path) for path in folder.glob("*.ckpt")]


def _by_progress(folder: Path) -> list[Facts]:
    """The readable checkpoints of the run that wrote last, the one furthest in training first."""
    found = [one for one in folder_facts(folder) if one.readable]
    latest = max(found, key=lambda one: one.modified, default=None)
    own = [one for one in found if latest is not None and one.run == latest.run]
    # Of two of one step the name without a version comes first.
    return sorted(own, key=lambda one: (one.step, "-v" not in one.path.stem), reverse=True)


def newest_checkpoint(root: str | os.PathLike[str], *, skip_damaged: bool = False) -> Path | None:
    """The checkpoint furthest in training, of the run that wrote last under a `default_root_dir`.

    Args:
        root: the `default_root_dir`.
        skip_damaged: take an older, intact one where the newest is damaged.

    Raises:
        ValueError: if the newest file is damaged; it names the newest intact one.
    """
    folder = Path(root, FOLDER)
    own = _by_progress(folder)
    damaged = []
    for one in folder_facts(folder):
        # One that may be of this run and ahead of the others, as far as its name and time tell. A
        # file with another name belongs to somebody else.
        if (
            not one.readable
            and one.step >= 0
            and (
                not own
                or one.modified > own[0].modified
                or (one.step > own[0].step and one.modified >= min(o.modified for o in own))
            )
        ):
            damaged.append(one.path)
    damaged.sort(reverse=True)
    intact = None
    for one in own:
        if damage(one.path) is None:
            intact = one.path
            break
        damaged.append(one.path)
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


def gather_ranks(state: Any) -> list[Any]:
    """The state of every rank, on the CPU; called by all of them."""
    state = None if state is None else state_to(state, "cpu")
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


def packed_tokenizer(tokenizer: Any) -> dict[str, Tensor]:
    """The files of a saved tokenizer as tensors of bytes, so that a checkpoint needs no other.

    Their names are relative paths: some tokenizers have a folder with several chat templates.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {
            path.relative_to(folder).as_posix(): torch.frombuffer(
                bytearray(path.read_bytes()), dtype=torch.uint8
            )
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }


def unpack_tokenizer(files: Mapping[str, bytes], folder: str | os.PathLike[str]) -> None:
    """Write a tokenizer's files, as `read_checkpoint` gives them, below a folder."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _leaves_its_folder(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or not path.parts or ".." in path.parts or bool({*"\\:\0"} & {*name})


def read_content(path: str | os.PathLike[str], *, mmap: bool = False) -> dict[str, Any]:
    """All that is in a checkpoint of examples/train.py.

    Args:
        path: the file.
        mmap: whether tensors are read only when they are used.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint of this program.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, got {path}; see logs/checkpoints")
    if problem := damage(path):
        raise _unfit(path, problem)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a file may hold anything
        raise _unfit(
            path,
            f"which holds something other than tensors and plain values ({type(error).__name__})",
        ) from error
    if not isinstance(found, dict):
        raise _unfit(path, f"which holds a {type(found).__name__}")
    if missing := [n for n in ("longctx", "state_dict") if not isinstance(found.get(n), dict)]:
        names = ", ".join(sorted(map(str, found))[:8]) or "nothing"
        raise _unfit(path, f"which holds {names}, and nothing of {' and '.join(missing)}")
    return found


def _unfit(path: str | os.PathLike[str], what: str) -> ValueError:
    return ValueError(
        f"checkpoint: expected one that examples/train.py wrote, got {path}, {what}; it is damaged "
        "or another program's: pass another file of logs/checkpoints"
    )


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[LongContextLM, dict[str, bytes]]:
    """The language model of a checkpoint, in evaluation mode, and its tokenizer's files.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint of this program.
    """
    return model_of(read_content(path), path)


def model_of(
    checkpoint: dict[str, Any], path: str | os.PathLike[str]
) -> tuple[LongContextLM, dict[str, bytes]]:
    """The same of content that was read already; the path is for errors."""
    saved = checkpoint["longctx"]
    if foreign := [name for name in saved.get("tokenizer", ()) if _leaves_its_folder(name)]:
        raise ValueError(
            f"checkpoint: expected tokenizer files with paths inside their folder, got {foreign} "
            f"in {path}; do not trust it"
        )
    if missing := [name for name in ("config", "tokenizer") if name not in saved]:
        raise _unfit(path, f"whose part longctx has no {' and no '.join(missing)}")
    prefix = "model."
    weights = {
        name.removeprefix(prefix): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    try:
        model = LongContextLM(ModelConfig.from_dict(saved["config"]), device="meta")
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise _unfit(path, f"whose weights and configuration do not fit: {error}") from error
    return model.eval(), {n: bytes(t.tolist()) for n, t in saved["tokenizer"].items()}
