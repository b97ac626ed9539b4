"""The model to evaluate: built from flags, or loaded with its own configuration and tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longctx_layers import LongContextLM, ModelConfig, create_model
from longctx_layers.evals import SYNTHETIC, Vocabulary, text_vocabulary

if TYPE_CHECKING:
    from longctx_layers.data.tokenizers import Tokenizer
    from longctx_layers.training.checkpoints import Trained

MINI = "mini"
MINI_PARAMETERS = 128_000


@dataclass(frozen=True)
class Loaded:
    """A model and the meaning of its token ids.

    Attributes:
        block: the names of its layers, joined by `+` for a hybrid.
        vocabulary: for the memory tasks, in the model's ids.
        fingerprint: equal for equal weights.
        tokenizer: of text; None for a model whose ids are the tasks' own.
        tokenizer_name: for the data module: `bytes` or a folder; None without a tokenizer.
        order: the settings that the order and the split of its training data depended on; empty if
            they are not known.
        trained: what it was loaded from, which keeps the tokenizer's files for as long as they are
            needed; None for a model that was built.
    """

    model: LongContextLM
    block: str
    vocabulary: Vocabulary
    fingerprint: str
    tokenizer: Tokenizer | None = None
    tokenizer_name: str | None = None
    order: Mapping[str, Any] = field(default_factory=dict)
    trained: Trained | None = None


def build(
    block: str,
    options: Mapping[str, Any],
    num_params: str = MINI,
    *,
    vocab_size: int = SYNTHETIC.size,
    seed: int = 0,
) -> LongContextLM:
    """A model with random weights, of a named size or the small size for memory tasks.

    `mini` has 2 layers of width 64 and, whatever the block, 128,000 parameters within 1 %.

    Raises:
        ValueError, TypeError: for options that the block does not accept.

    >>> model = build("dpassm", {"window_size": 16})
    >>> len(model.blocks)
    2
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if num_params != MINI:
            return create_model(vocab_size, num_params, block, options)
        config = ModelConfig(
            vocab_size=vocab_size,
            pattern=(block,),
            block_kwargs=dict(options),
            ffn_dim=1,
            d_model=64,
            n_layers=2,
            n_heads=4,
        )
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
    """A training checkpoint, or a folder that `save_pretrained` wrote.

    Raises:
        FileNotFoundError, ValueError: if it is neither, or damaged.
    """
    from longctx_layers.training.checkpoints import load_trained

    trained = load_trained(path)
    loaded = own(trained.model, vocabulary=_text_vocabulary(trained.tokenizer))
    return replace(
        loaded,
        tokenizer=trained.tokenizer,
        tokenizer_name=trained.tokenizer_name,
        order=trained.order,
        trained=trained,
    )


def own(model: LongContextLM, vocabulary: Vocabulary | None = None) -> Loaded:
    """A model without a tokenizer, whose ids are the tasks' own unless a vocabulary is given."""
    size = model.config.vocab_size
    if vocabulary is None and size < SYNTHETIC.size:
        raise ValueError(
            f"model: expected a tokenizer, or at least the {SYNTHETIC.size} ids of the tasks' own "
            f"vocabulary, got no tokenizer and {size} ids; save its tokenizer into its folder"
        )
    return Loaded(
        model,
        block="+".join(dict.fromkeys(model.config.pattern)),
        vocabulary=vocabulary or SYNTHETIC,
        fingerprint=fingerprint(model),
    )


def _text_vocabulary(tokenizer: Tokenizer | None) -> Vocabulary | None:
    if tokenizer is None:
        return None
    return text_vocabulary(tokenizer.encode, tokenizer.decode, tokenizer.vocab_size)


def fingerprint(model: LongContextLM) -> str:
    """A hash of the configuration and the weights."""
    digest = hashlib.blake2b(repr(model.config.to_dict()).encode(), digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
