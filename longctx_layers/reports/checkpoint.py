"""The checkpoints that a report is about: of examples/train.py, or folders of `save_pretrained`."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longctx_layers import LAYERS, LongContextLM
from longctx_layers.data.tokenizers import Tokenizer, load_tokenizer
from longctx_layers.reports.content import visible
from longctx_layers.reports.figures import SERIES, style_of
from longctx_layers.training.checkpoints import (
    FOLDER,
    model_of,
    newest_checkpoint,
    read_content,
    unpack_tokenizer,
)


@dataclass
class Checkpoint:
    """A model with what its file says about where it comes from.

    Attributes:
        path: as it was given.
        model: in evaluation mode.
        tokenizer: None for a folder that has none.
        step: optimizer steps behind it; None for a folder.
        options: the model's options in training, `{}` for a folder.
        order: what the order of its training data depended on, `seq_len` among it.
        label: what tables and legends call it; no two are the same.
        colour, mark: of its lines.
    """

    path: Path
    model: LongContextLM
    tokenizer: Tokenizer | None
    step: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    order: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    colour: str = SERIES[0][0]
    mark: str = SERIES[0][1]

    @property
    def block(self) -> str:
        """The name of its blocks, as --block has it; of a hybrid, those of all, joined by +."""
        return "+".join(dict.fromkeys(self.model.config.pattern))

    @property
    def trained_length(self) -> int | None:
        """Tokens of the rows that it was trained on, where that is known."""
        return self.order.get("seq_len")


def tokenizers_differ(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether their losses per token are not comparable, as far as their tokenizers are known."""
    return len({one.tokenizer.fingerprint for one in checkpoints if one.tokenizer}) > 1


def load(paths: Sequence[Path], device: torch.device | str = "cpu") -> list[Checkpoint]:
    """All of them, told apart by their labels.

    Raises:
        FileNotFoundError: if there is nothing at a path.
        ValueError: if a file is cut short, damaged or another program's; if its weights are not
            finite; if one is named twice.
    """
    twice = [str(path) for path, n in Counter(p.resolve() for p in paths).items() if n > 1]
    if twice:
        raise ValueError(f"expected each checkpoint once, got {twice[0]} again; name it once")
    found = [read(path) for path in paths]
    _tell_apart(found)
    for one in found:
        one.model.to(device)
    return found


def read(path: Path) -> Checkpoint:
    """One checkpoint; see `load`."""
    try:
        found = _read_folder(path) if path.is_dir() else _read_file(path)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # a file may hold anything
        raise ValueError(
            f"checkpoint: expected one of examples/train.py or a folder that save_pretrained "
            f"wrote, got {path}, which is damaged or another program's: {error}"
        ) from error
    broken = [n for n, p in found.model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise ValueError(
            f"{path}: expected finite weights, got NaN or infinity in {len(broken)} parameters, "
            f"first in {broken[0]}; report on an earlier checkpoint of this run"
        )
    if found.tokenizer and found.tokenizer.vocab_size > found.model.config.vocab_size:
        raise ValueError(
            f"{path}: expected a tokenizer with ids below {found.model.config.vocab_size}, got one "
            f"with {found.tokenizer.vocab_size} ids; it is another model's"
        )
    return found


def _read_folder(path: Path) -> Checkpoint:
    if not (path / "config.json").is_file():
        newest = newest_checkpoint(path.parent if path.name == FOLDER else path)
        hint = f"did you mean {newest}?" if newest else "pass a .ckpt file or such a folder"
        raise FileNotFoundError(
            f"checkpoint: expected a folder that save_pretrained wrote, got {path}, which has no "
            f"config.json; {hint}"
        )
    model = LongContextLM.from_pretrained(path)
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    return Checkpoint(path, model, load_tokenizer(path) if has_tokenizer else None)


def _read_file(path: Path) -> Checkpoint:
    content = read_content(path)
    model, files = model_of(content, path)
    options = dict(content["hyper_parameters"])
    options.pop("_instantiator", None)
    order = content["LongContextData"]["order"]
    return Checkpoint(path, model, _unpacked(files), content["global_step"], options, order)


def _unpacked(files: Mapping[str, bytes]) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        unpack_tokenizer(files, folder)
        return load_tokenizer(folder)


def _tell_apart(checkpoints: Sequence[Checkpoint]) -> None:
    """Give labels, by block where that is enough, and colours: a block's own, or in turn."""
    blocks = Counter(one.block for one in checkpoints)
    alone = max(blocks.values()) == 1 and set(blocks) <= set(LAYERS)
    paths = [one.path.resolve() for one in checkpoints]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    for i, (one, path) in enumerate(zip(checkpoints, paths, strict=True)):
        colour, mark = SERIES[i % len(SERIES)]
        name = one.block  # of a hybrid, those of its layers
        if one.block in LAYERS:
            own_colour, own_mark, name = style_of(one.block)
            if alone:
                colour = own_colour
                mark = own_mark
        one.label = name if blocks[one.block] == 1 else f"{name}, {path.relative_to(root)}"
        one.label = visible(one.label)
        one.colour = colour
        one.mark = mark
