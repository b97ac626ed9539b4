"""`torch.use_deterministic_algorithms`: honoured on every backend, or refused by torch by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.op_cases import inputs, results
from torch.utils._python_dispatch import TorchDispatchMode

from longctx_layers.layers import detach_state
from longctx_layers.ops import Segments
from longctx_layers.ops.state_space import tiles
from longctx_layers.testing import LAYER_CASES, small_layer, small_model

KERNELS = Path(__file__).parents[1] / "kernels"
# Of floats on a GPU these raise in deterministic mode: see torch.use_deterministic_algorithms.
NOT_DETERMINISTIC = {"cumsum", "cumprod", "put_", "histc", "bincount", "kthvalue", "median"}


@contextmanager
def deterministic(warn_only: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Called(TorchDispatchMode):
    """Names of the operations that run on tensors of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("warn_only", [False, True])
@pytest.mark.parametrize("case", LAYER_CASES)
def test_a_gpu_runs_nothing_that_has_no_deterministic_form(case, warn_only):
    """Meta tensors take the torch path, as a GPU without Triton does."""
    layer = small_layer(case, dtype=torch.float32).to("meta")
    x = torch.randn(2, 40, 16, device="meta", requires_grad=True)
    with deterministic(warn_only), Called() as called:
        y, state = layer(x)
        y.sum().backward()
        state = detach_state(state)
        # The mlp counts the chunks of continued rows, and meta tensors hold no numbers.
        for ids in () if "mlp" in case else (None, torch.zeros(2, 40, device="meta").long()):
            layer(x, state, segment_ids=ids)[0].sum().backward()
    assert "_softmax_backward_data" in called.names
    assert not called.names & NOT_DETERMINISTIC


def test_sums_without_cumsum(monkeypatch):
    x = torch.randn(3, 100, 2, dtype=torch.float64)
    for length in (1, 2, 63, 64, 100):
        part = x[:, :length]
        found = tiles._doubled_sum(part.mT).mT
        torch.testing.assert_close(found, part.cumsum(1), rtol=1e-14, atol=1e-14)
    with deterministic(False), Called() as called:
        tiles.running_sum(x.to("meta"), 1)
    assert "cumsum" not in called.names


@pytest.mark.parametrize("warn_only", [False, True])
@pytest.mark.parametrize("case", LAYER_CASES)
def test_the_mode_changes_no_bit_on_a_cpu(case, warn_only):
    """In this mode torch fills new memory with NaN: nothing reads what it did not write."""
    layer, x = small_layer(case, dtype=torch.float32), torch.randn(2, 40, 16)

    def run() -> list[torch.Tensor]:
        y, state = layer(x)
        z, state = layer(x, state)
        gradients = torch.autograd.grad((y + z).sum(), list(layer.parameters()))
        return [y, z, *state, *gradients]

    expected = run()
    with deterministic(warn_only):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def test_a_model_trains_and_samples_in_this_mode():
    model, ids = small_model("dpassm", "blade", dtype=torch.float32), torch.arange(12)[None] % 13
    with deterministic(False):
        model.loss(ids, ids).backward()
        options = {"top_k": 5, "top_p": 0.9}
        found = [
            model.generate(ids, 5, generator=torch.Generator().manual_seed(0), **options)
            for _ in range(2)
        ]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["ssd", "diagonal_scan", "block_ssd", "conv_silu"])
def test_operations_in_this_mode(name):
    tensors, options = inputs(name, 2, 33, dtype=torch.float32), {}
    if name == "block_ssd":
        options["chunk_size"] = 10
    start = torch.tensor([[0] * 33, [0] * 5 + [5] * 28])
    options["segments"] = Segments(start, torch.tensor([33, 30]))
    for backend in ("auto", "torch"):
        expected = results(name, tensors, **options, backend=backend)
        with deterministic(False):
            found = results(name, tensors, **options, backend=backend)
        for a, b in zip(found, expected, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in b)


def test_no_kernel_adds_in_the_order_in_which_programs_end():
    sources = list(KERNELS.glob("*.py"))
    assert len(sources) > 10
    assert not [path.name for path in sources if "atomic_" in path.read_text()]
