"""What Triton's compiler makes of the launches for GPUs that are not there."""

import pytest
import torch
from ahead import TARGETS, compiled_for

from longctx_layers.kernels import conv_silu, diagonal, gated_norms


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def launch_diagonal(invariant, packed):
    with torch.device("meta"):
        u = torch.empty(2, 4096, 64, dtype=torch.bfloat16)
        decay = torch.empty(64) if invariant else torch.empty(2, 4096, 64)
        state = torch.empty(2, 64)
        segments = (None, None)
        if packed:
            segments = torch.empty(2, 4096, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    h, final = diagonal.forward(u, decay, state, *segments)
    diagonal.backward(h, final, h, decay, state, *segments)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("invariant", "packed"),
    [
        (True, True),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(False, False, marks=pytest.mark.slow),
    ],
)
def test_diagonal(target, invariant, packed):
    with compiled_for(target) as found:
        launch_diagonal(invariant, packed)
    names = [kernel.name for kernel in found]
    assert names == ["_tile_ends", "_pass_on", "_scan", "_tile_ends", "_pass_on", "_scan_back"]
    for kernel in found:
        assert kernel.spills == 0
        assert kernel.registers <= 80  # many programs at once hide the latency of their loads
        assert kernel.count("LDG|global_load|buffer_load") > 0
        assert kernel.count("RED|ATOM|global_atomic") == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", [64, *(pytest.param(n, marks=pytest.mark.slow) for n in (48, 256))])
def test_gated_norms(target, dim):
    paths = [torch.empty(2, 4096, 12, dim, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    weights = [torch.empty(12, dim, device="meta") for _ in range(2)]
    with compiled_for(target) as found:
        y = gated_norms.forward(*paths, *weights, 1e-5)
        gated_norms.backward(y, *paths, *weights, 1e-5)
    assert [kernel.name for kernel in found] == ["_forward", "_backward"]
    for kernel in found:
        assert kernel.spills == 0
        assert kernel.registers <= 128
        if dim != 48 and not target.startswith("gfx"):
            assert kernel.count(r"LDG\.E\.128|LDG\.E\.\w+\.128") >= 3  # z, o and s


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_conv_silu(target, packed):
    with torch.device("meta"):
        x, weight = torch.empty(2, 4096, 896, dtype=torch.bfloat16), torch.empty(896, 4)
        before = torch.empty(2, 3, 896, dtype=torch.bfloat16)
        start = torch.empty(2, 4096, dtype=torch.int64) if packed else None
    with compiled_for(target) as found:
        y = conv_silu.forward(x, weight, before, start)
        conv_silu.backward(y, x, weight, before, start)
    assert [kernel.name for kernel in found] == ["_forward", "_through_silu", "_gather"]
    for kernel in found:
        assert kernel.spills == 0
        assert kernel.registers <= 160
        assert kernel.count("RED|ATOM|global_atomic") == 0


def test_the_meter_sees_spills_and_tensor_cores():
    """Numbers that are always 0 would prove nothing."""
    import triton
    import triton.language as tl

    @triton.jit
    def greedy(X, Y, N: tl.constexpr):
        i = tl.arange(0, N)
        x = tl.load(X + i[:, None] * N + i[None, :])
        tl.store(Y + i[:, None] * N + i[None, :], tl.dot(x, x))

    x = torch.empty(256, 256, dtype=torch.float16, device="meta")
    with compiled_for("sm_90") as found:
        greedy[(1,)](x, x.float(), 256, num_warps=4)
    assert found[0].spills > 0
    assert found[0].count("HGMMA") > 0
