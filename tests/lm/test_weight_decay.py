"""Which parameters decay: of every layer, in models of others, and however a model is wrapped."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from longctx_layers import DPASSM, create_model, no_weight_decay, parameter_groups
from longctx_layers.testing import LAYER_CASES, small_layer, small_model

# Written apart from the library: what a reader of the pages expects not to decay.
QUIET = re.compile(
    r"(A_log|dt_bias|skip|log_rate|memory_[kv]|bias|(^|[._])norm(_\w)?\.weight)$"
    r"|(mixer|layer|^)\.?gate_proj\.weight$"
)


def grouped(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names with and without decay; every trainable parameter is in one group, once."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.1)
    found = {group["weight_decay"]: [names[id(p)] for p in group["params"]] for group in groups}
    listed = [name for group in found.values() for name in group]
    assert sorted(listed) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    return set(found.get(0.1, [])), set(found.get(0.0, []))


def quiet(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if QUIET.search(name)}


def marked(model: nn.Module) -> set[str]:
    """Parameters that carry mamba-ssm's mark."""
    return {n for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}


@pytest.mark.parametrize("case", LAYER_CASES)
def test_every_layer(case: str) -> None:
    layer = small_layer(case)
    assert grouped(layer)[1] == quiet(layer)
    # Marked: all that a rule by dimensions would miss, but nothing that should decay.
    missed = {n for n, p in layer.named_parameters() if n in quiet(layer) and p.dim() > 1}
    assert missed <= marked(layer) <= quiet(layer)


def test_what_decays_in_a_language_model() -> None:
    model = small_model("dpassm", "blade", tie_embeddings=False)
    decaying, kept = grouped(model)
    assert {name.split(".")[-2] for name in decaying if name.endswith("weight")} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "dt_proj", "gate_proj", "up_proj",
        "down_proj", "embedding", "head",
    }  # fmt: skip
    assert {name.split(".")[-1] for name in decaying} == {"weight", "conv"}
    # As timm asks: by the names that the model's parameters have.
    assert model.no_weight_decay() == no_weight_decay(model) == kept == quiet(model)


class GPT(nn.Module):
    """In nanoGPT's manner: tied, with LayerNorms, and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 16)
        self.ln_1, self.attn = nn.LayerNorm(16), DPASSM(16, 4, window_size=4, ssm_state_dim=3)
        self.ln_2 = nn.RMSNorm((2, 8))  # two dimensions, and no name that says what it is
        self.lm_head = nn.Linear(16, 11, bias=False)
        self.lm_head.weight = self.wte.weight
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.timescale = nn.Parameter(torch.zeros(3, 3))
        self.timescale._no_weight_decay = True  # type: ignore[attr-defined]


def test_a_model_of_ones_own() -> None:
    model = GPT()
    decaying, kept = grouped(model)
    assert {"wte.weight", "attn.q_proj.weight", "attn.state_space.conv"} <= decaying
    own = {"ln_1.weight", "ln_1.bias", "ln_2.weight", "timescale"}
    assert kept == own | {f"attn.{name}" for name in quiet(model.attn)}
    model.wte.weight._no_weight_decay = True  # type: ignore[attr-defined]
    assert "wte.weight" in grouped(model)[1]
    assert {"wte.weight", "lm_head.weight"} <= no_weight_decay(model)


def test_declarations_outlive_what_replaces_parameters() -> None:
    model = small_model("dpassm", "blade")
    expected = marked(model)
    assert len(expected) == 2 * 7  # A_log, dt_bias, skip, two norms, the gate's weight and bias
    copied = deepcopy(model)
    empty = small_model("dpassm", "blade").to("meta").to_empty(device="cpu")
    assigned = small_model("dpassm", "blade")
    assigned.load_state_dict(model.state_dict(), assign=True)
    cast = deepcopy(model).half().float()
    for changed in (copied, empty, assigned, cast):
        assert marked(changed) == expected
        assert grouped(changed)[1] == quiet(model)


@pytest.mark.slow  # for the import of the compiler
def test_wrapped_by_torch_compile() -> None:
    model = torch.compile(small_model("dpassm"))
    assert {name.removeprefix("_orig_mod.") for name in grouped(model)[1]} == quiet(model._orig_mod)


def test_sharded(tmp_path: Path) -> None:
    """FSDP replaces all parameters, and in its older form they are flat vectors."""
    model = small_model("dpassm", "blade", dtype=torch.float32)
    expected = quiet(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        newer, older = deepcopy(model), deepcopy(model)
        for block in newer.blocks:
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
        assert grouped(fully_shard(newer, mesh=init_device_mesh("cpu", (1,))))[1] == expected
        cpu = torch.device("cpu")
        older = FullyShardedDataParallel(older, device_id=cpu, use_orig_params=True)
        assert {n.replace("_fsdp_wrapped_module.", "") for n in grouped(older)[1]} == expected
        joined = FullyShardedDataParallel(deepcopy(model), device_id=cpu)
        with pytest.raises(ValueError, match=r"expected .*use_orig_params=True"):
            parameter_groups(joined, weight_decay=0.1)
    finally:
        dist.destroy_process_group()


def test_decay_leaves_time_scales_alone() -> None:
    model = create_model(64, "tiny", "dpassm", {"window_size": 8})
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.5), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        # At a rate of 1 and without gradients the step is the decay alone.
        factor = 1.0 if QUIET.search(name) else 0.5
        torch.testing.assert_close(parameter, factor * before[name])


def test_errors() -> None:
    model = small_model("dpassm")
    with pytest.raises(TypeError, match="expected a module, got generator; pass the model"):
        parameter_groups(model.parameters(), weight_decay=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight_decay: expected .* at least 0, got -0\.1"):
        parameter_groups(model, weight_decay=-0.1)
    with pytest.raises(TypeError, match="weight_decay: expected a number, got '0.1'"):
        parameter_groups(model, weight_decay="0.1")  # type: ignore[arg-type]
    assert [g["name"] for g in parameter_groups(nn.Linear(2, 2, False), weight_decay=0)] == [
        "decay"
    ]
