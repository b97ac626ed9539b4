"""The model to evaluate: built from flags, or loaded with its own configuration and tokenizer."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from longctx_layers import LongContextLM, ModelConfig, create_model
from longctx_layers.evals import SYNTHETIC, Vocabulary, text_vocabulary

MINI = "mini"
MINI_PARAMETERS = 128_000
_MINI_SHAPE = {"d_model": 64, "n_layers": 2, "n_heads": 4}
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass
class Loaded:
    """A model with what its ids mean.

    Attributes:
        block: the names of its layers, joined by `+` for a hybrid.
        vocabulary: of the memory tasks, in the model's ids.
        tokenizer: of text; None for a model whose ids are the tasks' own.
        tokenizer_name: for the data module: `bytes`, or a folder; None likewise.
        fingerprint: equal for equal weights.
        order: what the order of its training data depended on, their split among it; empty where
            that is not known.
        folder: keeps the tokenizer's files for as long as they are needed.
    """

    model: LongContextLM
    block: str
    vocabulary: Vocabulary
    tokenizer: Any
    tokenizer_name: str | None
    fingerprint: str
    folder: Any = None
    order: Mapping[str, Any] = field(default_factory=dict)


def build(
    block: str,
    options: Mapping[str, Any],
    num_params: str = MINI,
    *,
    vocab_size: int = SYNTHETIC.size,
    seed: int = 0,
) -> LongContextLM:
    """A model with random weights: of a named size, or the small one for trials on tasks.

    `mini` has 2 layers of width 64 and 128,000 parameters within 1 %, whatever the block.

    Raises:
        ValueError, TypeError: for options that do not fit the block.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if num_params != MINI:
            return create_model(vocab_size, num_params, block, options)
        config = ModelConfig(
            vocab_size=vocab_size, pattern=(block,), block_kwargs=dict(options), ffn_dim=1,
            **_MINI_SHAPE,
        )  # fmt: skip
        counts = LongContextLM(config, device="meta").parameter_counts()
        fixed = sum(counts.values()) - counts["ffn"]
        width = round((MINI_PARAMETERS - fixed) / counts["ffn"])
        if abs(fixed + width * counts["ffn"] - MINI_PARAMETERS) > 0.01 * MINI_PARAMETERS:
            raise ValueError(
                f"mini: expected {MINI_PARAMETERS:,} parameters, but the layers and the embedding "
                f"alone have {fixed:,}; use --num_params tiny, or smaller states"
            )
        return LongContextLM(replace(config, ffn_dim=width))


def load(path: Path) -> Loaded:
    """A checkpoint of examples/train.py, or a folder that `save_pretrained` wrote.

    Raises:
        FileNotFoundError, ValueError: if it is neither, or damaged.
    """
    if path.is_dir():
        model, folder, order = LongContextLM.from_pretrained(path), None, {}
        has_tokenizer = any((path / name).is_file() for name in TOKENIZER_FILES)
        place = path if has_tokenizer else None
    else:
        # Imports lightning: only where needed.
        from longctx_layers.training.checkpoints import model_of, read_content, unpack_tokenizer

        content = read_content(path)
        model, files = model_of(content, path)
        order = content["LongContextData"]["order"]
        folder = tempfile.TemporaryDirectory()
        place = Path(folder.name)
        unpack_tokenizer(files, place)
    return replace(_with_tokenizer(model, place, folder), order=order)


def own(model: LongContextLM) -> Loaded:
    """A model whose ids are the tasks' own."""
    return _with_tokenizer(model, None, None)


def _with_tokenizer(model: LongContextLM, place: Path | None, folder: Any) -> Loaded:
    size = model.config.vocab_size
    tokenizer = name = None
    if place is not None:
        from longctx_layers.data.tokenizers import ByteTokenizer, load_tokenizer

        tokenizer = load_tokenizer(place)
        name = "bytes" if isinstance(tokenizer, ByteTokenizer) else str(place)
        vocabulary = text_vocabulary(tokenizer.encode, tokenizer.decode, tokenizer.vocab_size)
    elif size >= SYNTHETIC.size:
        vocabulary = SYNTHETIC
    else:
        raise ValueError(
            f"model: it has no tokenizer, and with {size} ids too few for the tasks' own "
            f"{SYNTHETIC.size}; save its tokenizer into its folder"
        )
    return Loaded(
        model,
        "+".join(dict.fromkeys(model.config.pattern)),
        vocabulary,
        tokenizer,
        name,
        fingerprint(model),
        folder,
    )


def fingerprint(model: LongContextLM) -> str:
    """Equal for equal weights of equal models."""
    digest = hashlib.blake2b(repr(model.config.to_dict()).encode(), digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
