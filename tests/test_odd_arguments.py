"""What is not a plain tensor, has no token, or holds wrong ids: errors that name the remedy."""

import pytest
import torch

from longctx_layers import ops
from longctx_layers.testing import LAYER_CASES, small_layer, small_model

ROWS = torch.randn(3, 16), torch.randn(5, 16)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
NOT_TENSORS = {
    "nested": (torch.nested.nested_tensor(list(ROWS)), r"a nested one; pad it with .*segment ids"),
    "jagged": (torch.nested.nested_tensor(list(ROWS), layout=torch.jagged), r"a nested one; pad"),
    "sparse": (torch.eye(16)[None].to_sparse(), r"layout torch.sparse_coo; use .to_dense"),
    "list": ([[0.0]], r"a list; make one with torch.as_tensor"),
    "None": (None, r"a NoneType; make one with torch.as_tensor"),
}
FIRST = {
    "sparse_attention": ("q", lambda x: ops.sparse_attention(x, x, x)),
    "gated_norms": ("z", lambda x: ops.gated_norms(x, x, x, x, x)),
    "conv_silu": ("x", lambda x: ops.conv_silu(x, x)),
    "diagonal_scan": ("u", lambda x: ops.diagonal_scan(x, x)),
    "ssd": ("x", lambda x: ops.ssd(x, x, x, x, x)),
    "block_ssd": ("x", lambda x: ops.block_ssd(x, x, x, x, x, chunk_size=4)),
}


@pytest.mark.parametrize("kind", NOT_TENSORS)
def test_what_is_no_dense_tensor(kind):
    x, message = NOT_TENSORS[kind]
    layer, model = small_layer("window", dtype=torch.float32), small_model("window")
    for argument, operation in FIRST.values():
        with pytest.raises(TypeError, match=rf"^{argument}: expected a .*{message}"):
            operation(x)
    with pytest.raises(TypeError, match=rf"^WindowAttention: x: expected a .*{message}"):
        layer(x)
    if x is not None:
        with pytest.raises(TypeError, match=rf"segment_ids: expected a .*{message}"):
            layer(torch.randn(2, 3, 16), segment_ids=x)
    for call in (model, lambda ids: model.loss(ids, IDS)):
        with pytest.raises(TypeError, match=rf"^ids: expected a .*{message}"):
            call(x)
    with pytest.raises(TypeError, match=rf"^labels: expected a .*{message}"):
        model.loss(IDS, x)


@pytest.mark.parametrize("name", FIRST)
def test_operations_take_real_numbers_with_a_fraction(name):
    argument, call = FIRST[name]
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=rf"^{argument}: expected floating-point numbers, got"):
            call(torch.ones(1, 2, 3, 4, dtype=dtype))


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "at least one prompt.*got 0 prompts"),
        ([[]], ValueError, r"at least one token in each.*lengths \[0\]; start"),
        (torch.zeros(0, dtype=torch.int64), ValueError, r"at least one token.*lengths \[0\]"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"at least one token.*\[0, 0\]"),
        (torch.tensor(3), ValueError, r"expected a tensor \[T\] or \[B, T\], got \[\]"),
        ([torch.tensor(3)], ValueError, r"expected 1-D tensors.*shapes \[\[\]\]; flatten"),
        ([IDS], ValueError, r"expected 1-D tensors.*shapes \[\[2, 3\]\]; flatten"),
        ([1, 2, 3], TypeError, "put a single list of ids into a tensor"),
        ([["a"]], TypeError, r"expected integer token ids, got \['a'\]; encode text first"),
        ([[1, [2]]], TypeError, "expected integer token ids, got .*; encode text first"),
        ([[1.5]], TypeError, "expected integer token ids, got torch.float32"),
        ([[13]], ValueError, r"token ids in \[0, 13\), got ids from 13 to 13"),
        (torch.nested.nested_tensor(list(IDS)), TypeError, r"got a nested .*list\(prompt.unbind"),
        (
            torch.nested.nested_tensor(list(IDS), layout=torch.jagged),
            TypeError,
            r"got a nested tensor; pass list\(prompt.unbind",
        ),
    ],
)
def test_prompts_that_are_none(prompt, error, message):
    with pytest.raises(error, match=rf"^prompt: .*{message}"):
        small_model("window").generate(prompt, 2)


def test_a_prompt_in_one_dimension_is_one_row():
    model = small_model("dpassm")
    one = model.generate(IDS[0], 3, temperature=0)
    assert torch.equal(one, model.generate(IDS[:1], 3, temperature=0)[0])
    with pytest.raises(ValueError, match=r"^ids: expected \[B, T\] = .* got \[3\]; reshape"):
        model(IDS[0])


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (IDS[0], ValueError, r"expected the shape of ids = \[2, 3\], got \[3\]"),
        (torch.randn(2, 3, 13), ValueError, r"expected the shape of ids = \[2, 3\], got \[2, 3, 1"),
        (IDS.float(), TypeError, "expected int64, got torch.float32; convert"),
        (IDS - 2, ValueError, r"expected -100 or token ids in \[0, 13\), got -1 to 4"),
        (IDS + 8, ValueError, r"expected -100 or token ids in \[0, 13\), got 9 to 14"),
    ],
)
def test_labels_that_are_none(labels, error, message):
    with pytest.raises(error, match=rf"^labels: {message}"):
        small_model("window").loss(IDS, labels)


def test_a_state_of_something_else():
    model = small_model("window", "dpassm")
    for state in (5, model.init_state(2)[:1], torch.zeros(2)):
        with pytest.raises(ValueError, match="^state: expected one for each of 2 blocks, got"):
            model(IDS, state)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_no_token_leaves_the_state_as_it_is(backend):
    x, state = torch.randn(1, 0, 3, 4), torch.randn(1, 3, 4, 2)
    dt, directions, options = x[..., 0], x[:, :, 0, :2], {"backend": backend}
    y, final = ops.ssd(
        x, dt, -torch.rand(3), directions, directions, initial_state=state, **options
    )
    assert y.shape == x.shape
    assert torch.equal(final, state)
    h, final = ops.diagonal_scan(
        x[:, :, 0], -torch.rand(4), initial_state=state[:, 0, :, 0], backend=backend
    )
    assert h.shape == (1, 0, 4)
    assert torch.equal(final, state[:, 0, :, 0])


@pytest.mark.parametrize("case", LAYER_CASES)
@pytest.mark.parametrize("length", [1, 20])
def test_training_continues_a_state_of_inference_mode(case, length):
    layer, x = small_layer(case), torch.randn(2, 9 + length, 16, dtype=torch.float64)
    results = []
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            _, state = layer(x[:, :9])
        y, _ = layer(x[:, 9:], state)
        gradients = torch.autograd.grad(y.sum(), list(layer.parameters()), allow_unused=True)
        results.append([y, *(g for g in gradients if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
