"""Models in a folder: `config.json` and `model.safetensors`, and no pickle."""

from __future__ import annotations

import importlib.metadata
import json
import os
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longctx_layers.files import write_folder
from longctx_layers.layers.init import mark_drawn
from longctx_layers.lm.config import ModelConfig

ModelT = TypeVar("ModelT", bound=nn.Module)
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT, FORMAT_VERSION, SAVE_ID = "longctx_layers", 1, "save_id"
MODEL_TYPE = "longctx"
CHECKSUM = "weights_crc32"  # of the weights' whole file


def save(
    directory: str | os.PathLike[str], config: ModelConfig, weights: Mapping[str, Tensor]
) -> None:
    """Write a model's config and weights to a folder, which is created if it does not exist.

    Both files are written under temporary names and then renamed: an interruption leaves the old
    file or the new one, never part of one. If either cannot be written, both stay as they were.

    Args:
        directory: the folder. `config.json` and `model.safetensors` in it are replaced.
        config: the model's config.
        weights: its state dict, written in the weights' own dtypes.

    Raises:
        TypeError: if an option of a block cannot be written as JSON.
        OSError: if the folder or a file cannot be written.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "model_type": MODEL_TYPE,  # how transformers knows it: see longctx_layers.hf
        "format_version": FORMAT_VERSION,
        "library_version": _library_version(),
        # In both files, so that loading notices a save that was interrupted between them.
        SAVE_ID: uuid.uuid4().hex,
        "model": config.to_dict(),
    }
    try:
        json.dumps(content)
    except TypeError as error:
        raise TypeError(
            f"save_pretrained: expected block_kwargs of numbers, strings, lists and dicts, got "
            f"{content['model']['block_kwargs']}; {error}"
        ) from error
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    with write_folder(Path(directory)) as folder:
        config_path = folder / CONFIG_FILE
        weights_path = folder / WEIGHTS_FILE
        try:
            save_file(contiguous, weights_path, metadata={SAVE_ID: content[SAVE_ID]})
        except SafetensorError as error:  # it reports a full disk in this way too
            raise OSError(
                f"save_pretrained: could not write {Path(directory) / WEIGHTS_FILE} ({error}); "
                "make room or choose another folder"
            ) from error
        # safetensors has no checksum of its own.
        content[CHECKSUM] = _crc32(weights_path)
        config_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        weights_path.chmod(config_path.stat().st_mode)  # what the umask allows


def load(
    directory: str | os.PathLike[str],
    build: Callable[[ModelConfig], ModelT],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ModelT:
    """Load the model that `save` wrote, in evaluation mode.

    Args:
        directory: the folder.
        build: makes a model of a config, on the meta device.
        device: where to load the weights; the CPU by default.
        dtype: what to cast floating-point weights to; by default they stay as they were saved.

    Raises:
        FileNotFoundError: if the folder or one of its two files is missing.
        ValueError: if the config is another program's, has a later format or unknown keys; if the
            weights are damaged or do not fit the config.
    """
    folder = Path(directory)
    device = torch.device("cpu" if device is None else device)
    if device.type == "meta":
        raise ValueError(
            "from_pretrained: expected a device that holds weights, got 'meta'; for a model "
            "without weights use LongContextLM(config, device='meta')"
        )
    config, save_id, checksum = _read_config(_existing(folder / CONFIG_FILE))
    weights, weights_id = _read_weights(_existing(folder / WEIGHTS_FILE), device)
    if None not in (save_id, weights_id) and save_id != weights_id:
        raise ValueError(
            f"{folder}: expected {CONFIG_FILE} and {WEIGHTS_FILE} of one save, got "
            f"{save_id} and {weights_id}; a save was interrupted between them: save the model again"
        )
    # Weights without an id were written by another program, after the config.
    if weights_id is not None and checksum not in (None, _crc32(folder / WEIGHTS_FILE)):
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: expected the checksum {checksum}, which {CONFIG_FILE} has, "
            "got another; the weights have changed since they were saved: copy or save them again"
        )
    model = build(config)
    _check_fit(weights, model.state_dict(), folder)
    model.load_state_dict(weights, assign=True)
    mark_drawn(model)
    if dtype is not None:
        model.to(dtype)
    return model.eval()


def _library_version() -> str:
    try:
        return importlib.metadata.version("longctx-layers")
    except importlib.metadata.PackageNotFoundError:  # imported from a checkout, not installed
        return "unknown"


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.parent.is_dir():
        problem = "there is no such folder"
    else:
        problem = f"the folder has {sorted(p.name for p in path.parent.iterdir())[:20]}"
    raise FileNotFoundError(
        f"from_pretrained: expected the file {path}, but {problem}; "
        "pass the folder that save_pretrained wrote"
    )


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _read_config(path: Path) -> tuple[ModelConfig, str | None, int | None]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path}: expected JSON, got {error}; save the model again") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT or not isinstance(content.get("model"), dict):
        raise ValueError(
            f"{path}: expected a config with 'format': {FORMAT!r} and a 'model', got "
            f"{list(content)[:20] if isinstance(content, dict) else type(content).__name__}; "
            f"{_way_out(content, path.parent)}"
        )
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format version {FORMAT_VERSION}, got "
            f"{content.get('format_version')!r}, written by longctx_layers "
            f"{content.get('library_version')}; install that version or a later one"
        )
    return ModelConfig.from_dict(content["model"]), content.get(SAVE_ID), content.get(CHECKSUM)


def _way_out(content: Any, folder: Path) -> str:
    """What loads a folder whose config is not ours."""
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind == MODEL_TYPE:
        return (
            "the model was saved through transformers: load it with longctx_layers.hf."
            f"LongCtxForCausalLM.from_pretrained({str(folder)!r}), whose to_native() returns a "
            "LongContextLM"
        )
    if kind is not None and "longctx_attention" in content:
        return (
            f"it is a converted model: use longctx_layers.convert.load_converted({str(folder)!r})"
        )
    if kind is not None:
        return (
            f"it is a model of transformers, of type {kind!r}: load it with AutoModelForCausalLM; "
            "longctx_layers.convert puts these layers into it"
        )
    return "it is another program's: pass the folder that save_pretrained wrote"


def _read_weights(path: Path, device: torch.device) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return weights, (file.metadata() or {}).get(SAVE_ID)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected whole safetensors weights, got: {error}; "
            "the file is damaged or cut short: copy or save it again"
        ) from error


def _check_fit(weights: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    missing = sorted(expected.keys() - weights.keys())
    surplus = sorted(weights.keys() - expected.keys())
    shapes = [
        f"{name}: {list(weights[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems = {"missing": missing, "not in the model": surplus, "of another shape": shapes}
    found = [f"{len(names)} {what} ({names[0]})" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"{folder}: expected the {len(expected)} weights that {CONFIG_FILE} describes, got "
            f"weights {', '.join(found)}; the two files are of different models: save them again"
        )
