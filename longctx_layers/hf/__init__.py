"""The models as transformers has them: needs the extra `hf`.

Importing this module registers them, so that `AutoConfig` and `AutoModelForCausalLM` know the
folders that they saved, and transformers' Trainer and pipelines know language models in them.

    import longctx_layers.hf
    model = AutoModelForCausalLM.from_pretrained("folder")
"""

from transformers import AutoConfig, AutoModelForCausalLM

from longctx_layers.hf.cache import LongCtxCache
from longctx_layers.hf.config import LongCtxConfig
from longctx_layers.hf.modeling import LongCtxForCausalLM
from longctx_layers.lm.pretrained import MODEL_TYPE

AutoConfig.register(MODEL_TYPE, LongCtxConfig, exist_ok=True)
AutoModelForCausalLM.register(LongCtxConfig, LongCtxForCausalLM, exist_ok=True)

__all__ = ["LongCtxCache", "LongCtxConfig", "LongCtxForCausalLM"]
