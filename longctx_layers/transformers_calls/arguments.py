"""Which arguments of a call are understood. Any other is refused: never swallowed."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from transformers import GenerationMixin

# The name of a cache among arguments and outputs: transformers renamed it in 5.24.
_arguments = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if "cache" in _arguments else "past_key_values"

# What transformers or a data collator may pass to any decoder, and layers without masks, tables of
# positions and token types have no need of. Llama ignores these as well.
HARMLESS = frozenset(
    {
        "cache_position",  # of early versions of transformers 5; a state knows where it is
        "token_type_ids",  # of tokenizers that mark pairs of texts
        # Beside cu_seq_lens_q, which says the same.
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    }
)


def expect_known(where: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise TypeError for an argument that is neither known nor harmless, nor None or False."""
    for name, value in given.items():
        if name in known or name in HARMLESS or value is None or value is False:
            continue
        shape = f" {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
        raise TypeError(
            f"{where}: expected only arguments that it knows, got {name} (a "
            f"{type(value).__name__}{shape}), with transformers {transformers.__version__}; check "
            "the spelling, or leave it out. If transformers itself passes it, this version is "
            "newer than this library knows: install an older one"
        )


def given_cache(where: str, arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, by either of the names that transformers has for it.

    Raises:
        ValueError: for two different ones.
    """
    old, new = arguments.get("past_key_values"), arguments.get("cache")
    if old is not None and new is not None and old is not new:
        raise ValueError(
            f"{where}: expected one cache, got two, as past_key_values and as cache (their names "
            "before and since transformers 5.24); leave one out"
        )
    return old if new is None else new
