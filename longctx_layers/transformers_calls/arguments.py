"""Check the arguments that transformers passes to a decoder: unknown ones raise an error."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from transformers import GenerationMixin

from longctx_layers.command_line import closest

# The name of the cache in arguments and outputs, which transformers 5.24 changed.
_arguments = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if "cache" in _arguments else "past_key_values"

# Arguments that transformers or a data collator may pass to any decoder and that can be ignored
# here, as these layers use no mask, position table or token types. Llama ignores them too.
HARMLESS = frozenset(
    {
        "cache_position",  # early versions of transformers 5; the state knows its position
        "token_type_ids",  # from tokenizers that mark pairs of texts
        # The same information as in cu_seq_lens_q.
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    }
)


def expect_known(where: str, arguments: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise TypeError for an unknown argument of a call, unless it can be ignored.

    Args:
        where: the called module, for the error message.
        arguments: the arguments by name. Values of None and False are always accepted.
        known: names that the caller reads itself.
    """
    for name, value in arguments.items():
        if name in known or name in HARMLESS or value is None or value is False:
            continue
        shape = f" {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
        raise TypeError(
            f"{where}: unknown argument {name} (a {type(value).__name__}{shape})"
            f"{closest(name, known)}; correct it or leave it out. If transformers "
            f"{transformers.__version__} itself passes it, that version is too new for this "
            "library: install an older one"
        )


def cache_argument(where: str, arguments: Mapping[str, Any]) -> Any:
    """Return the cache from a call's arguments, under its old or its new name; None without one.

    Raises:
        ValueError: if the two names hold different caches.
    """
    old, new = arguments.get("past_key_values"), arguments.get("cache")
    if old is not None and new is not None and old is not new:
        raise ValueError(
            f"{where}: expected one cache, got two, as past_key_values and as cache (the names "
            "before and since transformers 5.24); pass only one of them"
        )
    return old if new is None else new
