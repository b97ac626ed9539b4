"""flash-attn's adapter: the calls that it makes, against a stand-in; its refusals and choices.

No test has a GPU, so that none runs the library's kernels.
"""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.flash_stand_in import FUNCTIONS, installed, stand_in
from support.op_cases import assert_as_precise, assert_equal_in_float64, cases, inputs
from torch.testing import assert_close
from torch.torch_version import TorchVersion

from longctx_layers import explain
from longctx_layers.ops import FarKeys, Pattern, Segments, sparse_attention
from longctx_layers.ops.attention import flash

VERSIONS = pytest.mark.parametrize("version", [2, 4])
LENGTHS = [1, 2, 5, 16, 17, 63, 64, 65, 129]


@VERSIONS
@given(data=st.data())
def test_equal_in_float64(version, data):
    with installed(version):
        case = data.draw(cases("sparse_attention", LENGTHS))
        assert_equal_in_float64("sparse_attention", case, backend="flash")


@VERSIONS
@given(data=st.data())
@settings(max_examples=8)
def test_as_precise_as_the_reference(version, data):
    with installed(version):
        case = data.draw(cases("sparse_attention", [1, 17, 65]))
        assert_as_precise("sparse_attention", case, torch.bfloat16, backend="flash")


@VERSIONS
@pytest.mark.parametrize("window_size", [None, 1, 5])
@pytest.mark.parametrize("with_far", [False, True])
def test_equal_as_a_batch(version, window_size, with_far):
    """Without segments and chunks nothing is packed: other functions of the library."""
    case = {"batch": 2, "length": 17, "rows": None, "seed": 1, "groups": 2, "prefix": 3}
    case["options"] = {"window_size": window_size}
    case["far"] = (2, 17 if window_size is None else 4, (2, 1), 0.5) if with_far else None
    with installed(version):
        assert_equal_in_float64("sparse_attention", case, backend="flash")


def far_keys(q, k, v, generator=None):
    shape = (len(q), k.shape[1], -(-q.shape[2] // 4), 3, q.shape[3])
    far_k, far_v = (torch.randn(shape, dtype=q.dtype, generator=generator) for _ in range(2))
    mask = torch.rand(1, 1, q.shape[2], 3, generator=generator) < 0.6
    return FarKeys(q, far_k, far_v, mask, 4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_far", [False, True])
def test_gradients_are_those_of_what_dropout_left(packed, with_far):
    q, k, v = (x.requires_grad_() for x in inputs("sparse_attention", 1, 6, prefix=2).values())
    far = far_keys(q, k, v, torch.Generator().manual_seed(0))
    leaves = [q, k, v, far.k.requires_grad_(), far.v.requires_grad_()]
    segments = Segments(torch.tensor([[-1, -1, 2, 2, 4, 4]]), torch.tensor([6]))

    def dropped(q, k, v, far_k, far_v):
        torch.manual_seed(3)  # the same weights each time
        return sparse_attention(
            q, k, v, window_size=2, segments=segments if packed else None, dropout_p=0.3,
            far=far._replace(q=q, k=far_k, v=far_v) if with_far else None, backend="flash",
        )  # fmt: skip

    with installed(2):
        assert torch.autograd.gradcheck(dropped, leaves)


def test_dropout_keeps_the_mean():
    q, k, v = inputs("sparse_attention", 2, 400, dtype=torch.float32).values()
    far, v = far_keys(q, k, v), torch.ones_like(v)
    far = far._replace(v=torch.ones_like(far.v))
    with installed(2):
        y = sparse_attention(q, k, v, window_size=64, far=far, dropout_p=0.4, backend="flash")
    assert y.std() > 0.01
    assert_close(y.mean(), torch.tensor(1.0), rtol=0, atol=0.02)


def test_pieces_are_cut_where_segments_and_chunks_begin():
    # Row 0: a segment with two cached tokens, of which one's chunk is over, and one from 3 on.
    # Row 1: one that begins with the call, and pads.
    segments = Segments(torch.tensor([[-2, -2, -2, 3, 3], [0, 0, 0, 0, 0]]), torch.tensor([5, 4]))
    cut = flash.pieces(2, 5, 3, Pattern(None, 3, 0, segments), torch.device("cpu"))
    assert cut.queries.tolist() == [0, 1, 3, 5, 8, 10]
    assert cut.keys.tolist() == [0, 3, 5, 7, 10, 12]
    assert cut.kept.tolist() == [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15]
    assert (cut.most_queries, cut.most_keys) == (3, 3)


def test_no_key_is_copied_without_cached_ones():
    cut = flash.pieces(2, 7, 0, Pattern(None, 4, 1), torch.device("cpu"))
    assert cut.queries.tolist() == cut.keys.tolist() == [0, 1, 5, 7, 8, 12, 14]
    assert cut.kept is None


@pytest.mark.parametrize(
    ("versions", "major", "head_dim", "dropout_p", "expected"),
    [
        (("4.0.0b36", "2.8.3"), 9, 128, 0.0, 4),
        (("4.0.0b36", "2.8.3.post2"), 9, 128, 0.1, 2),
        (("4.0.0b36", "2.8.3"), 8, 64, 0.0, 2),
        (("4.0.0b36", "2.7.4.post1"), 10, 256, 0.0, 2),
        ((None, "2.7.0"), 9, 64, 0.0, 2),
        (("4.0.0", None), 10, 64, 0.0, 4),
        ((None, None), 9, 64, 0.0, "is not installed: pip install"),
        ((None, "2.6.3"), 9, 64, 0.0, "flash-attn 2.6.3 is older than 2.7"),
        (("4.0.0b8", None), 9, 64, 0.0, "flash-attn 4.0.0b8 is older than 4.0.0b11"),
        ((None, "2.8.3"), 7, 64, 0.0, "compute capability 7"),
        (("4.0.0b36", None), 8, 64, 0.0, "compute capability 8"),
        (("4.0.0b36", None), 9, 64, 0.1, "drops no attention weights, got dropout_p = 0.1"),
        (("4.0.0b36", "2.8.3"), 9, 264, 0.0, "up to head_dim 128 for this call, got 264; flash"),
        ((None, "2.8.3"), 9, 256, 0.1, "up to head_dim 192 for this call, got 256"),
    ],
)
def test_versions(monkeypatch, versions, major, head_dim, dropout_p, expected):
    found = (x if x is None else TorchVersion(x) for x in versions)
    monkeypatch.setattr(flash, "VERSIONS", dict(zip((4, 2), found, strict=True)))
    version, reason = flash.choose_on(major, head_dim, dropout_p)
    if isinstance(expected, int):
        assert (version, reason) == (expected, None)
    else:
        assert version == 0
        assert expected in reason


def test_refusals(monkeypatch):
    def reason(x, **options):
        rows = explain(sparse_attention, x, x, x, **options)
        return next(row.reason for row in rows if row.backend == "flash")

    assert reason(torch.zeros(1, 2, 3, 8)) == "needs a GPU, got a tensor on 'cpu'"
    assert "empty" in reason(torch.zeros(1, 2, 0, 8))
    with pytest.raises(ValueError, match="'flash' was asked for and can't run this call: needs a"):
        sparse_attention(*[torch.zeros(1, 2, 3, 8)] * 3, backend="flash")
    gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(1, 2, 3, 8))
    assert "float16 or bfloat16, got torch.float32" in flash.choose(gpu, 0.0)[1]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in flash.choose(gpu, 0.0)[1]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match="not traced"):
        sparse_attention(*[torch.zeros(1, 2, 3, 8)] * 3, backend="flash")


@pytest.mark.parametrize(
    ("version", "module", "name"),
    [(*place, name) for place, names in FUNCTIONS.items() for name in names],
)
def test_the_stand_in_has_the_library_s_arguments(version, module, name):
    if flash.VERSIONS[version] is None:
        pytest.skip(f"flash-attn {version} is not installed: nothing to compare the stand-in with")
    function = getattr(importlib.import_module(module), name)
    function = getattr(function, "_init_fn", function)  # of a torch.library.custom_op
    theirs, ours = (inspect.signature(f).parameters for f in (function, stand_in(version, name)))
    assert [x for x in theirs if x in ours] == [x for x in ours if x in theirs]
    assert ours.keys() - theirs.keys() <= {
        "zero_tensors"
    }  # of 2.7.4 on; the adapter never gives it
    for x, parameter in theirs.items():
        if x in ours:
            assert parameter.default == ours[x].default
        else:
            assert parameter.default is not inspect.Parameter.empty


@VERSIONS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_far", [False, True])
@pytest.mark.parametrize("mode", [False, True])
def test_deterministic_algorithms_are_asked_for(monkeypatch, version, packed, with_far, mode):
    """The library adds gradients atomically unless it is told not to."""
    asked = []
    with installed(version):
        for (number, module), names in FUNCTIONS.items():
            for name in names if number == version else ():
                library = importlib.import_module(module)
                function = getattr(library, name)

                def spy(*args, function=function, **kwargs):
                    asked.append(kwargs.get("deterministic"))
                    return function(*args, **kwargs)

                monkeypatch.setattr(library, name, spy)
        tensors = inputs("sparse_attention", 2, 9)
        q, k, v = (x.requires_grad_() for x in tensors.values())
        far = far_keys(q, k, v) if with_far else None
        options = {"chunk_size": 4} if packed else {"window_size": 4}
        torch.use_deterministic_algorithms(mode)
        try:
            y = sparse_attention(q, k, v, far=far, backend="flash", **options)
            y.sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    # What is None is the low-level forward, which has no such argument.
    assert {x for x in asked if x is not None} == {mode}
