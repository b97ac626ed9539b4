"""Tools of torch and torchao around the layers: export, AOTInductor, FSDP2, functional calls, int8.

torch.compile, torch.export and DDP of a single call are in tests/layers.
"""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.pretrained_models import pretrained
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

from benchmarks.speed import tools_table
from longctx_layers.convert import convert_attention
from longctx_layers.layers import LAYERS
from longctx_layers.testing import small_layer, small_model

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CONSTANT = ["dpassm", "dpassm-global", "blade", "longformer", "window"]


class Step(nn.Module):
    """A layer as a function of its inputs and its state, by position: what an exporter takes.

    The state is a plain tuple: a package's file has no names for our own types.
    """

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, state=None):
        y, state = self.layer(x, None if state is None else self.layer.state_type(*state))
        return y, tuple(state)


def streamed(step, x, state):
    ys = []
    for token in x.split(1, dim=1):
        y, state = step(token.contiguous(), state)
        ys.append(y)
    return torch.cat(ys, dim=1), state


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


# ---- Export, AOTInductor and compiled decoding: one token at a time, with the state


@pytest.mark.parametrize("case", CONSTANT)
@torch.no_grad()
def test_exported_step_streams(case):
    layer, x = small_layer(case, dtype=torch.float32), torch.randn(2, 20, 16)
    _, state = layer(x[:, :3])
    step = torch.export.export(Step(layer), (x[:, :1], tuple(state))).module()
    y, final = streamed(step, x[:, 3:], tuple(state))
    assert_close((y, type(state)(*final)), layer(x[:, 3:], state), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("case", CONSTANT)
@torch.no_grad()
def test_aot_inductor_package(case, tmp_path):
    """A prompt of any length and a step, each one compiled package, loaded from its file."""
    layer, x = small_layer(case, dtype=torch.float32), torch.randn(2, 300, 16)
    lengths = ({1: torch.export.Dim.AUTO},)
    step, kind = Step(layer), layer.state_type
    _, state = step(x[:, :3])
    programs = {
        "prompt": torch.export.export(step, (x,), dynamic_shapes=lengths),
        "step": torch.export.export(step, (x[:, :1].contiguous(), state)),
    }
    runs = {}
    for name, program in programs.items():
        path = str(tmp_path / f"{name}.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        runs[name] = torch._inductor.aoti_load_package(path)
    for length in (64, 300, 1000):
        x = torch.randn(2, length + 5, 16)
        # A package takes the strides that it was made for, unasked.
        y, state = runs["prompt"](x[:, :length].contiguous())
        expected, expected_state = layer(x[:, :length])
        assert_close((y, kind(*state)), (expected, expected_state), **CLOSE)
        y, state = streamed(runs["step"], x[:, length:], tuple(state))
        assert_close((y, kind(*state)), layer(x[:, length:], expected_state), **CLOSE)


@torch.no_grad()
def test_one_graph_decodes_with_a_model():
    model = small_model("dpassm", "blade", dtype=torch.float32)
    ids = torch.randint(0, 13, (2, 30))
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, fullgraph=True, backend=counter)
    _, state = model(ids[:, :9], return_state=True)
    for t in range(9, 30):
        token = ids[:, t : t + 1]
        expected = model(token, state, return_state=True)
        actual = step(token, state, return_state=True)
        assert_close(actual, expected, **CLOSE)
        state = actual[1]
    assert counter.frame_count == 1


# ---- Functional calls


@pytest.mark.parametrize("case", ["vanilla", *CONSTANT])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample(case):
    layer, x = small_layer(case), torch.randn(3, 20, 16, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters, row):
        y, _ = functional_call(layer, parameters, (row[None],))
        return y.square().sum()

    gradients = vmap(grad(loss), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        layer.zero_grad()
        layer(row[None])[0].square().sum().backward()
        for name, parameter in parameters.items():
            assert_close(gradients[name][i], parameter.grad)


# ---- int8 weights


@pytest.fixture
def quantize():
    torchao = pytest.importorskip("torchao.quantization", reason="needs the package torchao")
    config = torchao.Int8WeightOnlyConfig
    if "version" not in inspect.signature(config).parameters:
        pytest.skip("this torchao's int8 weights are not yet those of version 2")
    return lambda module: torchao.quantize_(module, config(version=2))


def dequantized(module):
    """The module in float32 with the weights that the int8 ones stand for."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(part.weight.dequantize().detach().clone())
    return module


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_int8_weights(name, quantize):
    case = {"baseline_longformer": "longformer", "baseline_bigbird": "bigbird"}.get(name, name)
    layers = [small_layer(case, dtype=torch.float32) for _ in range(3)]
    exact, quantized, expected = layers
    quantize(quantized)
    quantize(expected)
    dequantized(expected)
    changed = 0
    for (key, part), (_, stored) in zip(
        exact.named_modules(), expected.named_modules(), strict=True
    ):
        if isinstance(part, nn.Linear):
            step = part.weight.abs().amax(1, keepdim=True) / 127
            assert ((part.weight - stored.weight).abs() <= 0.51 * step).all(), key
            changed += 1
    assert changed >= 4
    x = torch.randn(2, 20, 16)
    assert_close(quantized(x), expected(x), **CLOSE)
    y, state = quantized(x[:, :7])
    rest, state = streamed(quantized, x[:, 7:], state)
    assert_close((torch.cat([y, rest], 1), state), quantized(x), **CLOSE)


@torch.no_grad()
def test_int8_model_generates(quantize):
    model, ids = small_model("dpassm", "blade", dtype=torch.float32), torch.arange(9)[None]
    quantize(model)
    tokens = model.generate(ids, 12, temperature=0)
    expected = model(tokens[:, :-1])[:, 8:].argmax(-1)
    assert_close(tokens[:, 9:], expected, rtol=0, atol=0)


@torch.no_grad()
def test_int8_converted_model_generates(quantize):
    """A pretrained model's own projections and those of the state path."""
    model = convert_attention(pretrained("llama"), "dpassm", window_size=4, ssm_state_dim=4)
    quantize(model)
    ids = torch.arange(5, 14)[None]
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = dequantized(model)(tokens[:, :-1]).logits[:, 8:].argmax(-1)
    assert_close(tokens[:, 9:], expected, rtol=0, atol=0)


# ---- FSDP2

WORKER = """
import sys
from copy import deepcopy
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.testing import assert_close
from longctx_layers.convert import convert_attention
from longctx_layers.testing import small_model
from support.pretrained_models import pretrained

rank, size = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=size)


def check(single, blocks, loss_of, logits_of):
    model = deepcopy(single)
    mesh = init_device_mesh("cpu", (size,))
    for block in model.get_submodule(blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "loss"):
        register_fsdp_forward_method(model, "loss")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (single, model)]
    torch.manual_seed(0)
    for step in range(3):
        ids = torch.randint(0, 13, (2 * size, 12))
        labels = torch.randint(0, 13, (2 * size, 12))
        rows = slice(2 * rank, 2 * rank + 2)
        whole = loss_of(single, ids, labels)
        part = loss_of(model, ids[rows], labels[rows])
        for loss, optimizer in zip((whole, part), optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, sharded), expected in zip(model.named_parameters(), single.parameters()):
        assert size == 1 or sharded.to_local().shape != expected.shape, name
        assert_close(sharded.full_tensor(), expected, rtol=1e-9, atol=1e-9, msg=name)
    assert_close(logits_of(model, ids), logits_of(single, ids), rtol=1e-9, atol=1e-9)


check(
    small_model("dpassm", "blade", "baseline_longformer"),
    "blocks",
    lambda model, ids, labels: model.loss(ids, labels),
    lambda model, ids: model(ids),
)
torch.manual_seed(0)
check(
    convert_attention(pretrained("llama").double(), window_size=4, ssm_state_dim=4),
    "model.layers",
    lambda model, ids, labels: model(ids, labels=labels).loss,
    lambda model, ids: model(ids).logits,
)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_fully_sharded_models_train_as_one(size, tmp_path):
    """One of our own models and one that was converted."""
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],  # where support/ is
        )
        for rank in range(size)
    ]
    for worker in workers:
        _, errors = worker.communicate()
        assert worker.returncode == 0, errors


# ---- The table in docs/integration.md


@pytest.mark.usefixtures("quantize")
def test_table(tmp_path):
    for n in range(24):
        (tmp_path / f"{n}.txt").write_text(f"document {n}: " + "some words to learn. " * 20)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tools_table.BEGIN}\nold\n{tools_table.END}\nbehind\n")
    small = (
        f"--text {tmp_path} --steps 2 --batch-size 2 --sequence-length 32 --no-compile "
        f"--validation-documents 3 --d-model 32 --n-heads 2 --window-size 8 --prompt 20 --rounds 1 "
        f"--output {tmp_path / 'out/tools.md'} --page {page}"
    )
    text = tools_table.main(small.split())
    assert page.read_text() == (f"before\n{tools_table.BEGIN}\n{text}\n{tools_table.END}\nbehind\n")
    assert text in (tmp_path / "out/tools.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| int8 weights |")]
    (_, stored, _, more, same), timed = rows
    assert int(stored.replace(",", "")) < 0.45 * 4 * 1_000_000
    assert 0 < abs(float(more)) < 0.1
    assert timed[2] != "1.00 x"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        tools_table.insert(page, text)
