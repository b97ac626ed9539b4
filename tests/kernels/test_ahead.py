"""What Triton's compiler makes of the launches for GPUs that are not there."""

import json

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.kernels import flex_template, launches
from benchmarks.kernels.ahead import (
    MATRIX_PRODUCTS,
    TARGETS,
    compiled_for,
    count,
    loop_lengths,
    matrix_flops,
)

# Bytes of shared memory that a program may have.
SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
ATOMICS = "RED\\.|REDG|ATOM\\.|ATOMG|global_atomic|buffer_atomic"  # on global memory
SPILLS = "LDL|STL|scratch_"
COPIES = "LDGSTS|UTMALDG|UBLKCP"  # asynchronous, from global to shared memory
# Registers and instructions are counted of the Triton that the kernels were tuned with.
TUNED = json.loads(launches.BASELINE.read_text())["triton"] == triton.__version__
slow = pytest.mark.slow

# Ada's compiler is Ampere's, and Blackwell's loops hide more than the others' (see below).
SIBLINGS = ("sm_89", "sm_100")
each_target = pytest.mark.parametrize(
    "target", [pytest.param(t, marks=slow) if t in SIBLINGS else t for t in TARGETS]
)


@each_target
@pytest.mark.parametrize(
    ("invariant", "packed"),
    [
        (True, True),
        pytest.param(True, False, marks=slow),
        pytest.param(False, True, marks=slow),
        pytest.param(False, False, marks=slow),
    ],
)
def test_diagonal(target, invariant, packed):
    with compiled_for(target) as found:
        launches.diagonal_scan(invariant, packed)
    names = [kernel.name for kernel in found]
    assert names == ["_tile_ends", "_pass_on", "_scan", "_tile_ends", "_pass_on", "_scan_back"]
    for kernel in found:
        assert kernel.spills == 0
        # Many programs at once hide the latency of their loads.
        assert not TUNED or kernel.registers <= 80
        assert kernel.count("LDG|global_load|buffer_load") > 0
        assert kernel.count(ATOMICS) == 0


@each_target
@pytest.mark.parametrize("dim", [64, *(pytest.param(n, marks=slow) for n in (48, 256))])
def test_gated_norms(target, dim):
    with compiled_for(target) as found:
        launches.norms(dim)
    assert [kernel.name for kernel in found] == ["_forward", "_backward"]
    for kernel in found:
        assert kernel.spills == 0
        assert not TUNED or kernel.registers <= (128 if dim <= 64 else 168)
        if dim != 48 and not target.startswith("gfx"):
            assert kernel.count(r"LDG\.E\.128|LDG\.E\.\w+\.128") >= 3  # z, o and s


@each_target
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=slow)])
def test_conv_silu(target, packed):
    with compiled_for(target) as found:
        launches.convolution(packed)
    assert [kernel.name for kernel in found] == ["_forward", "_through_silu", "_gather"]
    for kernel in found:
        assert kernel.spills == 0
        assert not TUNED or kernel.registers <= 160
        assert kernel.count(ATOMICS) == 0


@each_target
@pytest.mark.parametrize(
    ("head_dim", "dtype", "groups", "far"),
    [
        (64, torch.bfloat16, 12, True),
        pytest.param(64, torch.bfloat16, 12, False, marks=slow),
        pytest.param(64, torch.float16, 3, True, marks=slow),
        pytest.param(48, torch.bfloat16, 12, True, marks=slow),
        pytest.param(128, torch.bfloat16, 12, True, marks=slow),
        pytest.param(128, torch.bfloat16, 3, False, marks=slow),
        pytest.param(256, torch.bfloat16, 12, True, marks=slow),
        pytest.param(64, torch.float32, 12, True, marks=slow),
        pytest.param(128, torch.float32, 12, True, marks=slow),
    ],
)
def test_sparse_attention(target, head_dim, dtype, groups, far):
    with compiled_for(target) as found:
        launches.sparse_attention(head_dim, dtype, groups=groups, far=far)
    names = ["_forward", "_delta", "_queries", "_keys", *(["_far"] if far else [])]
    assert [kernel.name for kernel in found] == names
    for kernel in found:
        wide = dtype == torch.float32
        # A few outside the loops are paid for once in a program.
        assert all(count(loop, SPILLS) == 0 for loop in kernel.loops)
        assert kernel.spills <= (16 if kernel.loops else 0)
        assert kernel.shared <= 1024 * SHARED[target]
        assert kernel.count(ATOMICS) == 0
        if kernel.name not in launches.TILE_PRODUCTS:
            continue
        assert kernel.count(MATRIX_PRODUCTS) > 0
        if target != "gfx942" and not wide and head_dim in (64, 128) and kernel.name == "_forward":
            assert kernel.count(COPIES) > 0
        needed = launches.attention_products(kernel.constants)[kernel.name]
        assert len(kernel.loops) == len(needed)
        if target == "sm_100" or wide or head_dim not in (64, 128):
            continue  # its instructions hide their sizes; the others are known to repeat some
        assert [matrix_flops(loop, kernel.warps) for loop in kernel.loops] == needed


@pytest.mark.skipif(not TUNED, reason="tiles were chosen with the baseline's Triton")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hot_loops_are_no_longer_than_those_of_flex_attention(head_dim):
    """Instructions for a matrix operation of the tensor cores, without a mask and with one."""
    with compiled_for("sm_90") as found:
        launches.sparse_attention(head_dim, backward=False)
        flex_template.window_attention(head_dim)
    ours, theirs = (
        [len(loop) * kernel.warps / matrix_flops(loop, kernel.warps) for loop in kernel.loops]
        for kernel in (found[0], found[-1])
    )
    assert len(ours) == len(theirs) == 2
    assert all(a < b for a, b in zip(ours, theirs, strict=True))


@each_target
@pytest.mark.parametrize("head_dim", [128, *(pytest.param(n, marks=slow) for n in (64, 256))])
def test_sparse_attention_of_one_token(target, head_dim):
    with compiled_for(target) as found:
        launches.sparse_attention(head_dim, groups=2, far=True, length=1)
    assert {kernel.name for kernel in found} <= {"_forward", "_merge"}
    for kernel in found:
        assert kernel.spills == 0
        assert kernel.shared <= 1024 * SHARED[target]
        assert kernel.count(ATOMICS) == 0


@each_target
@pytest.mark.parametrize("launch", [launch for launch in launches.REPRESENTATIVE if launch.fast])
def test_hot_loops_stay_as_short_as_they_were(target, launch):
    """Within 5 % of `baseline.json`, which `make kernels PUBLISH=1` renews."""
    baseline = json.loads(launches.BASELINE.read_text())
    if baseline["triton"] != triton.__version__:
        pytest.skip(f"the baseline is of Triton {baseline['triton']}")
    with compiled_for(target) as found:
        launch.run()
    lengths, before = loop_lengths(found), baseline["loops"][target][launch.label]
    assert lengths.keys() == before.keys()
    for kernel, loops in lengths.items():
        pairs = zip(loops, before[kernel], strict=True)
        assert all(length <= 1.05 * old for length, old in pairs), kernel


# Work over the least of 1.00. Warps repeat some where fewer of them would spill registers.
REPEATED = {("sm_90", "_back_to_directions"): 1.34, ("gfx942", "_back_to_directions"): 1.09}


@each_target
@pytest.mark.parametrize(
    ("directions", "dtype", "packed", "pending"),
    [
        (64, torch.bfloat16, True, False),
        pytest.param(64, torch.bfloat16, True, True, marks=slow),
        pytest.param(128, torch.bfloat16, False, False, marks=slow),
        pytest.param(64, torch.float16, False, False, marks=slow),
        pytest.param(64, torch.float32, True, True, marks=slow),
    ],
)
def test_state_space(target, directions, dtype, packed, pending):
    with compiled_for(target) as found:
        launches.state_space(64, directions, dtype, packed=packed, pending=pending)
        launches.state_space(64, directions, dtype, packed=packed, pending=pending, length=1)
    names = {"_states", "_pass_on", "_scan", "_back_to_writes", "_back_to_directions", "_step"}
    assert names <= {kernel.name for kernel in found}
    for kernel in found:
        assert kernel.spills == 0
        assert kernel.shared <= 1024 * SHARED[target]
        assert kernel.count(ATOMICS) == 0
        needed = launches.state_space_products(dtype, kernel.constants).get(kernel.name)
        if needed is None:
            continue
        assert kernel.count(MATRIX_PRODUCTS) > 0
        # sm_100's instructions hide their sizes, float32 is made of a number of products, gfx942
        # takes the branches of pending states for loops, and longer states repeat some.
        hidden = target == "sm_100" or (target == "gfx942" and pending)
        if not hidden and dtype == torch.bfloat16 and directions == 64:
            assert len(kernel.loops) == 1
            times = matrix_flops(kernel.loops[0], kernel.warps) / needed[0]
            assert 1 <= times <= REPEATED.get((target, kernel.name), 1)


def test_the_meter_sees_spills_and_tensor_cores():
    """Numbers that are always 0 would prove nothing."""

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
