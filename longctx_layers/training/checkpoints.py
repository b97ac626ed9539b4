"""Trained models from files: a checkpoint of the training program, or a saved folder.

Reading a checkpoint verifies its checksums and runs no code.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from longctx_layers import LongContextLM, ModelConfig
from longctx_layers.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from longctx_layers.training.checkpoint_files import FOLDER, damage, newest_checkpoint

CONFIG_FILE = "config.json"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Trained:
    """A trained language model and what its file says about the training.

    Attributes:
        path: the file or folder that it was loaded from.
        model: in evaluation mode.
        tokenizer: None for a folder without one.
        tokenizer_name: what `LongContextData(tokenizer=...)` takes to use the same tokenizer:
            `bytes`, or a folder, which lives as long as this object; None without a tokenizer.
        step: optimizer steps before the checkpoint was written; None for a folder.
        options: the options of `LanguageModel` in that training; empty for a folder.
        order: what the order of the training data depended on (`seq_len`, `seed`,
            `validation_fraction`, `content`, ...); empty for a folder.
    """

    path: Path
    model: LongContextLM
    tokenizer: Tokenizer | None = None
    tokenizer_name: str | None = None
    step: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    order: Mapping[str, Any] = field(default_factory=dict)
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)


def load_trained(
    path: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> Trained:
    """Load a trained model with its tokenizer, for evaluation.

    Args:
        path: a checkpoint of the training program (`.ckpt`), or a folder that `save_pretrained` or
            the export of a checkpoint wrote.
        device: where the weights go; the CPU by default.

    Raises:
        FileNotFoundError: if there is nothing at this path, or the folder holds no model.
        ValueError: if the file is damaged or another program's, if weights are NaN or infinite, or
            if the tokenizer has more ids than the model.

    >>> from longctx_layers import create_model
    >>> folder = tempfile.mkdtemp()
    >>> create_model(256, "tiny", "window").save_pretrained(folder)
    >>> trained = load_trained(folder)
    >>> trained.model.config.pattern, trained.tokenizer, trained.step
    (('window',), None, None)
    """
    path = Path(path)
    try:
        trained = _load_folder(path) if path.is_dir() else _load_file(path)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # a file may hold anything
        raise not_a_checkpoint(path, f"which cannot be read ({error})") from error
    broken = [n for n, p in trained.model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise ValueError(
            f"{path}: expected finite weights, got NaN or infinity in {len(broken)} parameters, "
            f"first in {broken[0]}; use an earlier checkpoint of this run"
        )
    size = trained.model.config.vocab_size
    if trained.tokenizer and trained.tokenizer.vocab_size > size:
        raise ValueError(
            f"{path}: expected a tokenizer with ids below {size}, got one with "
            f"{trained.tokenizer.vocab_size} ids; it belongs to another model"
        )
    trained.model.to(device)
    return trained


def _load_folder(path: Path) -> Trained:
    if not (path / CONFIG_FILE).is_file():
        newest = newest_checkpoint(path.parent if path.name == FOLDER else path)
        if newest is not None:
            raise FileNotFoundError(
                f"checkpoint: expected a file, or a folder that save_pretrained wrote, got {path}, "
                f"which has no {CONFIG_FILE}; did you mean {newest}?"
            )
    model = LongContextLM.from_pretrained(path)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return Trained(path, model)
    tokenizer = load_tokenizer(path)
    return Trained(path, model, tokenizer, _tokenizer_name(tokenizer, path))


def _load_file(path: Path) -> Trained:
    content = read_content(path)
    model, files = model_of(content, path)
    folder = tempfile.TemporaryDirectory()
    unpack_tokenizer(files, folder.name)
    tokenizer = load_tokenizer(folder.name)
    saved_options = content["hyper_parameters"].items()
    return Trained(
        path,
        model,
        tokenizer,
        _tokenizer_name(tokenizer, folder.name),
        step=content["global_step"],
        options={name: value for name, value in saved_options if not name.startswith("_")},
        order=content["LongContextData"]["order"],
        _folder=folder,
    )


def _tokenizer_name(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> str:
    return "bytes" if isinstance(tokenizer, ByteTokenizer) else str(folder)


# ---- The content of a checkpoint


def read_content(path: str | os.PathLike[str], *, mmap: bool = False) -> dict[str, Any]:
    """Read everything in a checkpoint of the training program, as a dictionary.

    Args:
        path: the file.
        mmap: whether tensors are read only when they are used.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or not a checkpoint of this program.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, got {path}; see logs/checkpoints")
    if problem := damage(path):
        raise not_a_checkpoint(path, problem)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a file may hold anything
        raise not_a_checkpoint(
            path,
            f"which holds something other than tensors and plain values ({type(error).__name__})",
        ) from error
    if not isinstance(content, dict):
        raise not_a_checkpoint(path, f"which holds a {type(content).__name__}")
    missing = [n for n in ("longctx", "state_dict") if not isinstance(content.get(n), dict)]
    if missing:
        names = ", ".join(sorted(map(str, content))[:8]) or "nothing"
        raise not_a_checkpoint(path, f"which holds {names}, but no {' and no '.join(missing)}")
    return content


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[LongContextLM, dict[str, bytes]]:
    """The language model of a checkpoint, in evaluation mode, and its tokenizer's files.

    `load_trained` is more convenient unless the files themselves are needed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or not a checkpoint of this program.
    """
    return model_of(read_content(path), path)


def model_of(
    content: Mapping[str, Any], path: str | os.PathLike[str]
) -> tuple[LongContextLM, dict[str, bytes]]:
    """The model and the tokenizer's files in a checkpoint's content.

    Args:
        content: from `read_content`.
        path: where it was read from, for errors.

    Raises:
        ValueError: if weights and configuration do not fit, or a tokenizer's file would be written
            outside of its folder.
    """
    saved = content["longctx"]
    if outside := [name for name in saved.get("tokenizer", ()) if _leaves_its_folder(name)]:
        raise ValueError(
            f"checkpoint: expected tokenizer files with paths inside their folder, got {outside} "
            f"in {path}; do not trust it"
        )
    if missing := [name for name in ("config", "tokenizer") if name not in saved]:
        raise not_a_checkpoint(path, f"whose part longctx has no {' and no '.join(missing)}")
    prefix = "model."
    weights = {
        name.removeprefix(prefix): value
        for name, value in content["state_dict"].items()
        if name.startswith(prefix)
    }
    try:
        model = LongContextLM(ModelConfig.from_dict(saved["config"]), device="meta")
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise not_a_checkpoint(
            path, f"whose weights and configuration do not fit: {error}"
        ) from error
    files = {name: bytes(tensor.tolist()) for name, tensor in saved["tokenizer"].items()}
    return model.eval(), files


def _leaves_its_folder(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or not path.parts or ".." in path.parts or bool({*"\\:\0"} & {*name})


def not_a_checkpoint(path: str | os.PathLike[str], problem: str) -> ValueError:
    """The error about a file that is not a checkpoint; `problem` begins with `which` or `whose`."""
    return ValueError(
        f"checkpoint: expected one that longctx train wrote, got {path}, {problem}; it is "
        "damaged or another program's: pass another file of logs/checkpoints"
    )


# ---- A tokenizer's files


def packed_tokenizer(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The files of a saved tokenizer as tensors of bytes, so that a checkpoint is complete.

    The names are relative paths: some tokenizers have a folder with several chat templates.
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
    """Write a tokenizer's files, as `read_checkpoint` returns them, into a folder."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
