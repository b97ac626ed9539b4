"""Replace the attention of pretrained transformers models by layers of this library (extra `hf`).

from longctx_layers.convert import convert_attention
model = AutoModelForCausalLM.from_pretrained(...)
model = convert_attention(model, "dpassm", window_size=1024)
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "longctx_layers.convert: expected the package transformers, which is not installed; "
        "pip install 'longctx-layers[hf]'"
    ) from error

from longctx_layers.convert.api import convert_attention, load_converted
from longctx_layers.convert.attention import ConvertedAttention

__all__ = ["ConvertedAttention", "convert_attention", "load_converted"]
