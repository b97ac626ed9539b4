"""Use the language models of this library with Hugging Face transformers (extra `hf`).

Importing this module registers the model type. `AutoConfig` and `AutoModelForCausalLM` then load
folders that these models were saved to, and transformers' Trainer and pipelines recognise them as
causal language models:

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
