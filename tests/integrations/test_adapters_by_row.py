"""PEFT adapters selected per row, in calls that would otherwise be split into pieces."""

import pytest
import torch
from support.hf_models import every_pattern, hf_model
from torch import nn
from torch.testing import assert_close

from longctx_layers.layers import splitting

peft = pytest.importorskip("peft", reason="adapters need PEFT")


@every_pattern
def test_rows_with_adapters_of_their_own(pattern, monkeypatch):
    """The logits of each row equal those of a separate call with its adapter."""
    monkeypatch.setattr(splitting, "TOKENS_AT_ONCE", 16)
    model = hf_model(*pattern, dtype=torch.float32).eval()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"])
    tuned = peft.get_peft_model(model, config, adapter_name="first")
    tuned.add_adapter("second", config)
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    tuned.eval()
    ids = torch.randint(0, 13, (3, 40), generator=torch.Generator().manual_seed(0))
    names = ["second", "__base__", "first"]
    with torch.no_grad():
        together = tuned(input_ids=ids, adapter_names=names, use_cache=False).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with tuned.disable_adapter():
                    alone = tuned(input_ids=ids[row : row + 1], use_cache=False).logits
            else:
                tuned.set_adapter(name)
                alone = tuned(input_ids=ids[row : row + 1], use_cache=False).logits
            assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)
