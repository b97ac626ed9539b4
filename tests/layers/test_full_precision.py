"""Rates of state spaces stay in float32, whatever a model is cast to or loaded in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from longctx_layers import LongContextLM, build_layer
from longctx_layers.testing import parameter_dtypes, rates, small_layer, small_model

CASES = ("dpassm", "dpassm-diagonal", "blade")
LOW = (torch.bfloat16, torch.float16)

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda m: m.to(torch.bfloat16),
    "to with a device": lambda m: m.to("cpu", torch.bfloat16),
    "like a tensor": lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "type": lambda m: m.type(torch.bfloat16),
    "inside another": lambda m: nn.Sequential(nn.Linear(2, 2), m).bfloat16()[1],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("swap", [False, True], ids=["", "swapped"])
def test_casts(case: str, cast: str, swap: bool) -> None:
    layer = small_layer(case, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in rates(layer).items()}
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        changed = CASTS[cast](layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    low = torch.float16 if cast == "half" else torch.bfloat16
    assert parameter_dtypes(changed) == ({torch.float32}, {low})
    for name, parameter in rates(changed).items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    y, _ = changed(torch.randn(2, 9, 16, dtype=low))
    assert y.dtype == low
    assert parameter_dtypes(changed.double()) == ({torch.float64}, {torch.float64})
    assert parameter_dtypes(changed.to(low)) == ({torch.float32}, {low})


@pytest.mark.parametrize("case", CASES)
def test_float64_is_narrowed_as_asked(case: str) -> None:
    assert parameter_dtypes(small_layer(case).float()) == ({torch.float32}, {torch.float32})


@pytest.mark.parametrize("dtype", LOW)
def test_built_in_low_precision(dtype: torch.dtype) -> None:
    assert parameter_dtypes(build_layer("blade", 16, 4, dtype=dtype)) == ({torch.float32}, {dtype})
    torch.set_default_dtype(dtype)
    try:
        layer = build_layer("dpassm", 16, 4, device="meta")
    finally:
        torch.set_default_dtype(torch.float32)
    assert parameter_dtypes(layer.to_empty(device="cpu")) == ({torch.float32}, {dtype})


def test_loaded(tmp_path: Path) -> None:
    model = small_model("dpassm", "blade", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = LongContextLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert parameter_dtypes(loaded) == ({torch.float32}, {torch.bfloat16})
    assert all(torch.equal(p, rates(model)[name]) for name, p in rates(loaded).items())
    # Weights of a file that rounded them all: widened, so that they can be trained again.
    rounded = {name: value.bfloat16() for name, value in model.state_dict().items()}
    loaded.load_state_dict(rounded, assign=True)
    assert parameter_dtypes(loaded) == ({torch.float32}, {torch.bfloat16})


@pytest.mark.parametrize("case", CASES)
def test_small_steps_are_not_lost(case: str) -> None:
    """In bfloat16 a rate of 7 would change in steps of 1/32, and so never by training."""
    layer = small_layer(case).bfloat16()
    before = {name: p.detach().clone() for name, p in rates(layer).items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, weight_decay=0.0)
    layer(torch.randn(2, 12, 16, dtype=torch.bfloat16))[0].square().sum().backward()
    optimizer.step()
    assert all((p != before[name]).all() for name, p in rates(layer).items())


def test_mixed_precision_of_fsdp(tmp_path: Path) -> None:
    """The recipe of docs/integration.md: the state spaces as units of their own, in float32."""
    options = {"dpassm": {"ssm": "diagonal"}, "blade": {"chunk_size": 4}}
    model = small_model("dpassm", "blade", block_kwargs=options, dtype=torch.float32)
    expected = [p.detach().clone() for p in rates(model).values()]
    seen = []
    for block in model.blocks:
        block.mixer.state_space.register_forward_hook(
            lambda module, *_: seen.extend(p.detach().clone() for p in rates(module).values())
        )
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            space = block.mixer.state_space
            for projection in space.children():
                fully_shard(projection, mesh=mesh, mp_policy=low)
            fully_shard(space, mesh=mesh, mp_policy=full)
            if hasattr(space, "add_skip"):
                register_fsdp_forward_method(space, "add_skip")
            fully_shard(block, mesh=mesh, mp_policy=low)
        fully_shard(model, mesh=mesh, mp_policy=low)
        register_fsdp_forward_method(model, "loss")
        ids = torch.randint(0, 13, (2, 12))
        model.loss(ids, ids).backward()
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
        assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()
