"""The state-space kernels: sizes, views and offsets, one token, and the operator."""

import pytest
import torch
from support import op_cases
from torch import Tensor
from torch.testing import assert_close

from longctx_layers import ops
from longctx_layers.kernels import ssd

pytestmark = pytest.mark.usefixtures("interpret")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def views(length: int, heads: int, dim: int, directions: int) -> dict[str, Tensor]:
    """x, B and C out of one tensor, as the layers make them."""
    sizes = [heads * dim, directions, directions]
    x, B, C = draw(2, length, sum(sizes)).split(sizes, dim=-1)
    x = x.unflatten(-1, (heads, dim))
    return {"x": x, "dt": draw(2, length, heads).abs(), "A": -draw(heads).abs(), "B": B, "C": C}


def everything(operation: str, inputs: dict[str, Tensor], **options) -> list[Tensor]:
    """y without its pads, the final states, and the gradients of all inputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, final = getattr(ops, operation)(**leaves, **options)
    if "segments" in options:
        y = torch.where(options["segments"].real()[..., None, None], y, 0)
    results = [y, *(final if isinstance(final, tuple) else [final])]
    weights = [torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z) for z in results]
    return [*results, *torch.autograd.grad(results, list(leaves.values()), weights)]


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize(
    ("dim", "directions"), [(1, 1), pytest.param(20, 5, marks=pytest.mark.slow), (16, 17)]
)
@pytest.mark.parametrize(
    ("operation", "options"), [("ssd", {}), ("block_ssd", {"chunk_size": 7, "chunk_shift": 2})]
)
def test_sizes_of_states_and_views(operation, options, length, dim, directions):
    inputs = views(length, 4, dim, directions)  # more heads than one program adds up
    actual = everything(operation, inputs, **options, backend="triton")
    assert_close(actual, everything(operation, inputs, **options, backend="reference"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("operation", "options"),
    [("ssd", {}), *(("block_ssd", {"chunk_size": n, "chunk_shift": 3}) for n in (5, 80))],
)
def test_states_and_gradients_pass_many_spans(operation, options, packed):
    inputs = views(100, 1, 2, 2)  # 4 spans
    inputs["dt"] *= 0.05  # what is written in the first is still there in the last
    if packed:
        # The second row's segments begin in a tile, and with one.
        start = torch.tensor([[-4] * 100, [-1] * 40 + [40] * 24 + [64] * 36])
        options = {**options, "segments": ops.Segments(start, torch.tensor([100, 90]))}
    actual = everything(operation, inputs, **options, backend="triton")
    assert_close(actual, everything(operation, inputs, **options, backend="reference"))


# Each shift lets the token stand elsewhere in its chunk.
BLOCKS = [("block_ssd", {"chunk_size": 3, "chunk_shift": shift}) for shift in range(3)]


@pytest.mark.parametrize("start", [None, [[-4], [0]]])
@pytest.mark.parametrize(("operation", "options"), [("ssd", {}), *BLOCKS])
def test_one_token_on_states(operation, options, start):
    inputs = op_cases.inputs(operation, 2, 1)
    if start is not None:
        options = {**options, "segments": ops.Segments(torch.tensor(start), torch.tensor([1, 1]))}
    actual = op_cases.results(operation, inputs, **options, backend="triton")
    assert_close(actual, op_cases.results(operation, inputs, **options, backend="reference"))


def test_states_too_large_are_refused():
    with pytest.raises(ValueError, match="N of at most"):
        ops.ssd(**views(2, 1, 1, 257), backend="triton")


def test_offsets_beyond_32_bits():
    length, dim, stride = 20, 4, 2**27
    # Virtual memory alone: pages that are never touched cost nothing.
    memory = torch.UntypedStorage(2 * length * stride)
    shape, strides = (1, length, 1, dim), (length * stride, stride, dim, 1)
    spread = torch.empty(0, dtype=torch.float16).set_(memory, 0, shape, strides)
    x = torch.randn(shape, dtype=torch.float16)
    spread.copy_(x)
    rest = {"dt": torch.rand(1, length, 1), "A": -torch.ones(1)}

    def run(x: Tensor, backend: str) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y, _ = ops.ssd(x, B=x[:, :, 0], C=x[:, :, 0], **rest, backend=backend)
        return [y, *torch.autograd.grad(y.sum(), x)]

    for found, expected in zip(run(spread, "triton"), run(x, "reference"), strict=True):
        largest = expected.abs().max().item()
        assert_close(found, expected, rtol=0, atol=1e-2 * largest)  # rounding of fp16, not garbage


def call(pending: bool) -> tuple:
    """Arguments of the operator, in its own order."""
    length = 3
    inputs = views(length, 1, 2, 2)
    state = draw(2 if pending else 1, 2, 1, 2, 2)
    start = torch.tensor([[-1, -1, -1], [-2, 1, 1]])
    until = torch.tensor([[-1, 1, 1, 3], [0, 1, 1, 1]]) if pending else None
    x, dt, A, B, C = inputs.values()
    tensors = (x, dt, dt * A, B, C, state)
    return (*(z.clone().requires_grad_() for z in tensors), start, until)


@pytest.mark.parametrize("pending", [False, True])
def test_the_operator_is_registered_whole(pending):
    inputs = call(pending)
    assert torch.autograd.gradcheck(ssd.ssd, inputs, fast_mode=True)
    torch.library.opcheck(ssd.ssd, inputs)


def test_compiled_exported_and_on_meta():
    class Module(torch.nn.Module):
        # In lower case: an exported program looks for its inputs by such names.
        def forward(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return ops.ssd(x, dt, a, b, c, backend="triton")[0]

    # Copies: torch.export fails on views of one tensor, whatever the backend.
    inputs = tuple(x.clone() for x in views(5, 2, 3, 2).values())
    expected = Module()(*inputs)
    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)
    assert_close(compiled(*inputs), expected)
    time = {1: torch.export.Dim.AUTO}
    exported = torch.export.export(Module(), inputs, dynamic_shapes=(time, time, {}, time, time))
    longer = [x if x.dim() == 1 else torch.cat([x, x], dim=1) for x in inputs]
    # Its guards ask for the size of an argument that is None.
    assert_close(exported.module(check_guards=False)(*longer), Module()(*longer))
    y = Module()(*(x.to("meta") for x in inputs))
    assert (y.shape, y.device.type) == (expected.shape, "meta")
