"""The checkpoints that a report is about, with their labels and colours."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from longctx_layers import LAYERS, LongContextLM
from longctx_layers.data.tokenizers import Tokenizer
from longctx_layers.reports.content import visible
from longctx_layers.reports.figures import SERIES, style_of
from longctx_layers.training.checkpoints import load_trained


@dataclass(frozen=True)
class Checkpoint:
    """A model, what its file says about its training, and what it looks like in the report.

    Attributes:
        path: of the file or folder.
        model: in evaluation mode.
        tokenizer: None for a folder without one.
        step: optimizer steps before it was written; None for a folder.
        options: the model's options in training; empty for a folder.
        order: what the order of the training data depended on, `seq_len` among it.
        label: its unique name in tables and legends.
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
        """The name of its blocks, as for --block; the names of a hybrid are joined by +."""
        return "+".join(dict.fromkeys(self.model.config.pattern))

    @property
    def trained_length(self) -> int | None:
        """Number of tokens of the rows that it was trained on, if that is known."""
        return self.order.get("seq_len")


def tokenizers_differ(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether tokenizers differ, so that losses per token cannot be compared."""
    return len({c.tokenizer.fingerprint for c in checkpoints if c.tokenizer}) > 1


def load(paths: Sequence[Path], device: torch.device | str = "cpu") -> list[Checkpoint]:
    """Load all of them; each gets a label and a colour of its own.

    Raises:
        FileNotFoundError: if there is nothing at a path.
        ValueError: if a file is damaged or another program's, if weights are not finite, or if a
            checkpoint is named twice.
    """
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise ValueError(f"expected each checkpoint once, got {path} {count} times")
    return _with_labels([read(path, device) for path in paths])


def read(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Load one checkpoint, without a label; see `load`."""
    trained = load_trained(path, device=device)
    return Checkpoint(
        path, trained.model, trained.tokenizer, trained.step, trained.options, trained.order
    )


def _with_labels(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Labels are the blocks if those differ; colours are the blocks' own if possible."""
    blocks = Counter(c.block for c in checkpoints)
    own_colours = max(blocks.values()) == 1 and set(blocks) <= set(LAYERS)
    paths = [c.path.resolve() for c in checkpoints]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    labelled: list[Checkpoint] = []
    for i, (checkpoint, path) in enumerate(zip(checkpoints, paths, strict=True)):
        colour, mark = SERIES[i % len(SERIES)]
        label = checkpoint.block  # of a hybrid, the names of its layers
        if checkpoint.block in LAYERS:
            own_colour, own_mark, label = style_of(checkpoint.block)
            if own_colours:
                colour, mark = own_colour, own_mark
        if blocks[checkpoint.block] > 1:
            label = f"{label}, {path.relative_to(root)}"
        labelled.append(replace(checkpoint, label=visible(label), colour=colour, mark=mark))
    return labelled
