"""The smaller operations as graphs of torch.compile and torch.export, and on the meta device."""

import pytest
import torch
from support import op_cases
from torch import Tensor
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("interpret")

OPTIONS = {"block_ssd": {"chunk_size": 3}, "conv_silu": {}, "diagonal_scan": {}, "gated_norms": {}}


class Operation(torch.nn.Module):
    """One operation on Triton's kernels, of tensors by position."""

    def __init__(self, name: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.name, self.names = name, names

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        named = dict(zip(self.names, tensors, strict=True))
        return op_cases.call(self.name, named, **OPTIONS[self.name], backend="triton")


@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_exported_and_on_meta(name):
    length = 5  # no other size is 5
    tensors = op_cases.inputs(name, 2, length)
    operation, inputs = Operation(name, tuple(tensors)), tuple(tensors.values())
    expected = operation(*inputs)

    leaves = [x.clone().requires_grad_() for x in inputs]
    compiled = torch.compile(operation, backend="aot_eager", fullgraph=True)
    runs = [run(*leaves) for run in (operation, compiled)]
    assert_close(*runs)
    gradients = [torch.autograd.grad([x.square().sum() for x in run], leaves) for run in runs]
    assert_close(*gradients)

    def times(x: Tensor) -> list[int]:
        return [dim for dim, size in enumerate(x.shape) if size == length]

    dims = tuple(dict.fromkeys(times(x), torch.export.Dim.AUTO) for x in inputs)
    exported = torch.export.export(operation, inputs, dynamic_shapes={"tensors": dims})
    longer = [torch.cat([x, x], dim=1) if times(x) else x for x in inputs]
    # Its guards ask for the size of an argument that is None.
    assert_close(exported.module(check_guards=False)(*longer), operation(*longer))

    shapes = [(y.shape, y.dtype) for y in operation(*(x.to("meta") for x in inputs))]
    assert shapes == [(y.shape, y.dtype) for y in expected]
