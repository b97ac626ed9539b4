"""Small models of transformers that its tests share, one of each block and a hybrid."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longctx_layers import LAYERS
from longctx_layers.hf import LongCtxForCausalLM
from longctx_layers.testing import small_model

PATTERNS = [*((name,) for name in LAYERS), ("dpassm", "blade", "vanilla")]
VOCABULARY = 13

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)


def some_ids(*shape: int, seed: int = 0) -> Tensor:
    """Token ids of the small models, the same for a seed."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def hf_model(*pattern: str, **config: Any) -> LongCtxForCausalLM:
    """In evaluation mode, in float64 unless another dtype is given."""
    return LongCtxForCausalLM.from_native(small_model(*pattern, **config).eval())
