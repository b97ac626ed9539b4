"""What one sees of a run, and that its numbers are right."""

import math
import time

import pytest
import torch
from support.program import SMALL, fit, merged, scalars
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from longctx_layers import LAYERS, build_layer, create_model
from longctx_layers.layers import layer_options
from longctx_layers.ops import use_backend
from longctx_layers.testing import MemoryMeter, small_model
from longctx_layers.training.checkpoints import read_checkpoint
from longctx_layers.training.flops import forward_flops, matmul_peak, training_flops
from longctx_layers.training.inspection import kept_activations, memory_statistics

OPTIONS = {"window_size": 5, "chunk_size": 6, "ssm_state_dim": 4, "state_dim": 4}


def options(block):
    return {name: OPTIONS[name] for name in layer_options(block) if name in OPTIONS}


def test_scalars_start_lines_and_plain_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli = fit(*SMALL, "--model.window_size=8", "--trainer.accumulate_grad_batches=2")
    said = capsys.readouterr().out
    loss, rates = scalars(tmp_path / "logs"), scalars(tmp_path / "logs", "learning_rate")
    assert list(loss) == [1, 2]
    perplexity = scalars(tmp_path / "logs", "train_perplexity")
    assert perplexity == pytest.approx({s: math.exp(x) for s, x in loss.items()}, rel=1e-5)
    assert rates[2] < rates[1] <= 1e-3
    for name in ("gradient_norm", "tokens_per_second", "peak_memory_gib", "val_loss"):
        assert min(scalars(tmp_path / "logs", name).values()) > 0, name
    assert 0 < scalars(tmp_path / "logs", "model_flops_utilisation")[2] < 1
    for layer in range(4):
        assert 0 < scalars(tmp_path / "logs", f"gate/layer_{layer:02d}")[2] < 1
        assert scalars(tmp_path / "logs", f"time_scale/layer_{layer:02d}")[2] > 1
    model = cli.model.model
    count = sum(p.numel() for p in model.parameters())
    assert f"{count:,} parameters: embedding" in said
    assert "tokens a step: 256 (2 rows of 64 x 2 accumulated)" in said
    assert "memory, estimated: 0.0" in said
    assert "backend of ssd: cpu; triton needs a GPU" in said or torch.cuda.is_available()
    assert f"step 2  loss {loss[2]:.4f}  lr " in said
    assert said.count("step 2  val_loss") == 1


def test_no_logging_and_one_validation_of_the_last_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    every = ("--trainer.log_every_n_steps=0", "--trainer.val_check_interval=1")
    cli = fit(*merged(*SMALL, "--model.window_size=8", *every))
    said = capsys.readouterr().out
    assert cli.trainer.global_step == 2
    assert "tokens/s  MFU" not in said
    assert scalars(tmp_path / "logs") == {}
    assert [said.count(f"step {step}  val_loss") for step in (1, 2)] == [1, 1]
    assert list(scalars(tmp_path / "logs", "val_loss")) == [1, 2]


def test_validation_loss_is_that_of_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f for f in SMALL if "limit_val" not in f]
    cli = fit(*merged(*flags, "--trainer.precision=64-true"))
    model, _ = read_checkpoint("logs/checkpoints/step=00000002.ckpt")
    total, count = 0.0, 0
    with torch.no_grad():
        for b in cli.datamodule.val_dataloader():
            loss = model.loss(b["ids"], b["labels"], segment_ids=b["segment_ids"], reduction="sum")
            total, count = total + loss.item(), count + (b["labels"] >= 0).sum().item()
    assert scalars(tmp_path / "logs", "val_loss")[2] == pytest.approx(total / count, rel=1e-6)


# Options without a state path, through which a query sees all earlier tokens.
ATTENTION = {
    "vanilla": {},
    "window": {"window_size": 5},
    "dpassm": {"window_size": 5, "ssm": None, "n_global_tokens": 2},
    "blade": {"chunk_size": 6, "state_update": None},
    "baseline_longformer": {"window_size": 5, "n_global_tokens": 2},
    "baseline_bigbird": {"window_size": 5, "n_random_tokens": 3, "n_global_tokens": 2},
}


@pytest.mark.parametrize("block", ATTENTION)
def test_keys_per_query_are_those_that_reach_a_query(block):
    length = 150
    layer = build_layer(block, 8, 1, **ATTENTION[block], dtype=torch.float64)
    x = torch.randn(1, length, 8, dtype=torch.float64, requires_grad=True)
    with use_backend("reference"):
        y, _ = layer(x)
    seen = 0
    for i in range(length):
        (grad,) = torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)
        seen += int((grad[0].abs().sum(-1) > 0).sum())
    # The formula takes a chunk's, block's or window's edge as if it were always whole.
    assert layer.keys_per_query(length) == pytest.approx(seen / length, abs=0.3)


def test_projections_are_counted_as_torch_counts_them():
    model = small_model("window")
    ids = torch.zeros(1, 32, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter, use_backend("torch"), torch.no_grad():
        model(ids)
    attention = sum(4 * 16 * block.mixer.keys_per_query(32) for block in model.blocks)
    ours = (forward_flops(model, 32) - attention) * 32
    assert ours == pytest.approx(counter.get_total_flops())  # which sees none of SDPA
    assert training_flops(model, 32) == 3 * forward_flops(model, 32)


def test_six_operations_a_parameter_and_token():
    model = create_model(257, "tiny", "window", {"window_size": 1})
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    attention = 4 * 4 * 128  # layers, score and value, width
    assert forward_flops(model, 1000) == pytest.approx(2 * weights + attention, rel=1e-3)


def test_matmul_peak_is_a_speed():
    assert 1e8 < matmul_peak(torch.device("cpu"), torch.float32, seconds=0.01) < 1e15


class Products(TorchDispatchMode):
    """Records the layouts of all matrix products, on a clock on which each layout has its speed.

    Attributes:
        seconds: of a product, by which of its operands are transposed.
        seen: dtype and transposed operands of each product so far.
    """

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.now, self.seen = seconds, 0.0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            transposed = tuple(x.stride(0) == 1 for x in args)
            self.seen.add((args[0].dtype, transposed))
            self.now += self.seconds.get(transposed, 8.0)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fast", [(False, True), (False, False), (True, False)])
def test_no_product_of_a_linear_layer_is_faster_than_the_measured_peak(monkeypatch, fast):
    linear, x = torch.nn.Linear(6, 5, bias=False), torch.randn(7, 6, requires_grad=True)
    with Products({fast: 2.0}) as training, torch.autocast("cpu", torch.bfloat16):
        linear(x).backward(torch.randn(7, 5, dtype=torch.bfloat16))
    layouts = {(torch.bfloat16, t) for t in [(False, True), (False, False), (True, False)]}
    assert training.seen == layouts
    with Products({fast: 2.0}) as measuring:
        monkeypatch.setattr(time, "perf_counter", lambda: measuring.now)
        peak = matmul_peak(torch.device("cpu"), torch.bfloat16, seconds=0.01)
    assert measuring.seen == layouts
    assert peak == 2 * 1024**3 / 2.0


@pytest.mark.parametrize("block", LAYERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimated_activations_are_those_of_a_real_step(block, checkpointing):
    model = create_model(64, "tiny", block, options(block), gradient_checkpointing=checkpointing)
    ids = torch.zeros(1, 200, dtype=torch.int64)
    meter = MemoryMeter()
    with meter:
        loss = model.loss(ids, ids)
        kept = meter._live
    del loss
    estimate = kept_activations(model.config, 200, checkpointing=checkpointing)
    assert estimate == pytest.approx(kept, rel=0.1)


def test_memory_statistics_are_the_layers_own():
    model = create_model(64, "tiny", "dpassm", {"window_size": 4, "ssm_state_dim": 4})
    ids = torch.randint(0, 64, (2, 20))
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.gate_proj.bias.fill_(math.log(3))  # sigmoid: 3/4
            block.mixer.state_space.dt_proj.weight.zero_()
    model.train()
    found = memory_statistics(model, ids, None)
    assert model.training
    assert found["gate/layer_02"].item() == pytest.approx(0.75)
    # Initialised from 16 to 16384 tokens, log-uniformly.
    assert found["time_scale/layer_01"].item() == pytest.approx(512, rel=1e-3)
    assert found["longest_time_scale/layer_01"].item() == pytest.approx(16384, rel=1e-3)
    assert len(found) == 12
    assert memory_statistics(create_model(64, "tiny", "vanilla"), ids, None) == {}
    diagonal = create_model(64, "tiny", "dpassm", {"ssm": "diagonal"})
    longest = memory_statistics(diagonal, ids, None)["longest_time_scale/layer_00"]
    assert longest.item() == pytest.approx(4096, rel=1e-3)
