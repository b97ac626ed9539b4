"""Sparse attention whose range runs on the flash-attn library: version 2, or 4 (flash-attn-4).

The library computes causal windows over sequences, which are concatenated if their lengths differ.
So a call is cut where segments and chunks begin, and each piece is such a sequence.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from longctx_layers.ops.attention.far import FarKeys, far_attention, merge
from longctx_layers.ops.attention.pattern import Pattern
from longctx_layers.ops.second_order import own_backward


def _version(distribution: str) -> TorchVersion | None:
    try:
        return TorchVersion(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return None


# Of the distributions, without importing them: both install into one package, flash_attn.
VERSIONS = {4: _version("flash-attn-4"), 2: _version("flash-attn")}
# The first that can be differentiated with far keys: version 2 by its backward's arguments,
# version 4 by gradients of the log-sum-exp.
MINIMUM = {4: "4.0.0b11", 2: "2.7"}


def refuse(q: Tensor, *_: Any, dropout_p: float, **__: Any) -> str | None:
    """Why flash-attn can't run a call of `sparse_attention` on a GPU, or None."""
    return choose(q, dropout_p)[1]


def choose(q: Tensor, dropout_p: float) -> tuple[int, str | None]:
    """The version of flash-attn that runs a call, 4 or 2; or 0, and why neither does."""
    if torch.version.hip is not None:
        return 0, "needs an NVIDIA GPU"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return 0, f"takes float16 or bfloat16, got {q.dtype}"
    return choose_on(torch.cuda.get_device_properties(q.device).major, q.shape[-1], dropout_p)


def choose_on(major: int, head_dim: int, dropout_p: float) -> tuple[int, str | None]:
    """The same for a GPU of this major compute capability."""
    reasons = []
    for number, version in VERSIONS.items():
        if version is None:
            continue
        limit = 128 if number == 4 else 192 if dropout_p > 0 else 256
        if version < MINIMUM[number]:
            reason = f"is older than {MINIMUM[number]}: upgrade it"
        elif major not in (9, 10, 11) if number == 4 else major < 8:
            # Version 4 has no backward before Hopper, and the one for 12 is hardly tested.
            reason = f"is not used on compute capability {major}"
        elif number == 4 and dropout_p > 0:
            reason = f"drops no attention weights, got dropout_p = {dropout_p}"
        elif head_dim > limit:
            # Version 4 takes some longer ones, but not the same on every GPU.
            reason = f"is used up to head_dim {limit} for this call, got {head_dim}"
        else:
            return number, None
        reasons.append(f"flash-attn {version} {reason}")
    missing = "flash-attn is not installed: pip install 'longctx-layers[flash]' or '[flash4]'"
    return 0, "; ".join(reasons) or missing


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    far: FarKeys | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """`longctx_layers.ops.sparse_attention` on flash-attn."""
    batch, _, length, dim = q.shape
    prefix = k.shape[2] - length
    version, _ = choose(q, dropout_p)
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    packed = pattern.segments is not None or pattern.chunk_size is not None

    def lay(x: Tensor) -> Tensor:  # [B, h, n, ...] -> [B, n, h, ...], or [B * n, h, ...] if packed
        return x.transpose(1, 2).flatten(0, 1) if packed else x.transpose(1, 2)

    def widen(x: Tensor) -> Tensor:  # the kernels take multiples of 8
        return F.pad(x, (0, -dim % 8)) if dim % 8 else x

    q, k, v = (lay(widen(x)) for x in (q, k, v))
    if packed:
        cut = pieces(batch, length, prefix, pattern, q.device)
        if cut.kept is not None:
            k = k.index_select(0, cut.kept)
            v = v.index_select(0, cut.kept)
        options |= {"cu_seqlens_q": cut.queries, "cu_seqlens_k": cut.keys}
        options |= {"max_seqlen_q": cut.most_queries, "max_seqlen_k": cut.most_keys}
    far_part = None
    if far is not None:
        far_y, far_lse = far_attention(far, dropout_p, scale)
        far_part = lay(widen(far_y)), lay(far_lse)
    # The library counts the keys before the query's own, and aligns the last query and last key.
    before = None if pattern.window_size is None else pattern.window_size - 1
    if version == 4:
        y = _version_4(q, k, v, far_part, before, options)
    else:
        y = _version_2(q, k, v, far_part, before, options, dropout_p)
    y = y.unflatten(0, (batch, length)) if packed else y
    return y[..., :dim].transpose(1, 2)


class Pieces(NamedTuple):
    """A call as N sequences of queries that see only keys of their own sequence.

    Attributes:
        queries, keys: `[N + 1]` int32, where each sequence begins among the `B * T` queries and
            among the kept keys, and the total.
        most_queries, most_keys: those of the longest sequence.
        kept: indices of the kept keys among the `B * S`, None if all are kept.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    kept: Tensor | None


def pieces(batch: int, length: int, prefix: int, pattern: Pattern, device: torch.device) -> Pieces:
    """Cut a call of `prefix` cached keys and `length` tokens where segments and chunks begin."""
    # Reading the sizes of segments waits for the GPU. Chunks alone are counted on the CPU.
    source = torch.device("cpu") if pattern.segments is None else device
    first = pattern._replace(window_size=None).first_key(length, prefix, source).expand(batch, -1)
    # Along a row, the first key stays the same until it jumps to the query's own.
    begins = first == torch.arange(length, device=source)
    begins[:, 0] = True
    begin = begins.flatten().nonzero().flatten()
    queries = F.pad(begin, (0, 1), value=batch * length)
    # Cached keys belong to the first piece of their row.
    cached = torch.where(begin % length == 0, -first.flatten()[begin], 0)
    keys = F.pad((queries.diff() + cached).cumsum(0), (1, 0))
    sizes = [queries.diff().max(), keys.diff().max(), keys[-1]]
    most_queries, most_keys, total = torch.stack(sizes).tolist()
    kept = None
    if total < batch * (prefix + length):
        seen = torch.arange(-prefix, length, device=source) >= first[:, :1]
        kept = seen.flatten().nonzero().flatten().to(device)
    queries, keys = (x.to(device, torch.int32) for x in (queries, keys))
    return Pieces(queries, keys, most_queries, most_keys, kept)


def _version_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_part: tuple[Tensor, Tensor] | None,
    before: int | None,
    options: dict[str, Any],
) -> Tensor:
    """Version 4, whose log-sum-exp has a gradient, so that autograd differentiates the merge."""
    from flash_attn import cute

    function = cute.flash_attn_varlen_func if "cu_seqlens_q" in options else cute.flash_attn_func
    deterministic = torch.are_deterministic_algorithms_enabled()
    y, lse = function(
        q,
        k,
        v,
        window_size=(before, 0),
        deterministic=deterministic,
        return_lse=far_part is not None,
        **options,
    )
    if far_part is not None:
        y, _ = merge(y, lse.mT, *far_part)
    result: Tensor = y
    return result


def _version_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_part: tuple[Tensor, Tensor] | None,
    before: int | None,
    options: dict[str, Any],
    dropout_p: float,
) -> Tensor:
    import flash_attn

    left = -1 if before is None else before
    options = {**options, "dropout_p": dropout_p}
    result: Tensor
    if far_part is not None:
        options |= {"window_size_left": left, "window_size_right": 0}
        options |= {"softcap": 0.0, "alibi_slopes": None}
        result = _Merged.apply(q, k, v, *far_part, options)
        return result
    packed = "cu_seqlens_q" in options
    function = flash_attn.flash_attn_varlen_func if packed else flash_attn.flash_attn_func
    deterministic = torch.are_deterministic_algorithms_enabled()
    result = function(q, k, v, window_size=(left, 0), deterministic=deterministic, **options)
    return result


class _Merged(torch.autograd.Function):
    """The range and the far keys merged, for version 2, whose log-sum-exp has no gradient.

    The library's backward takes the output and the log-sum-exp of the softmax to differentiate.
    Given those of the merged softmax, it computes the range's share of the merged gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        far_y: Tensor,
        far_lse: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        from flash_attn import flash_attn_interface as low

        packed = "cu_seqlens_q" in options
        forward = low._flash_attn_varlen_forward if packed else low._flash_attn_forward
        y, lse, _, random = forward(q, k, v, **options, return_softmax=False)
        y, lse = merge(y, lse.mT, far_y, far_lse)
        ctx.save_for_backward(q, k, v, far_y, far_lse, y, lse, random)
        ctx.options = options
        return y

    @staticmethod
    @own_backward
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from flash_attn import flash_attn_interface as low

        q, k, v, far_y, far_lse, y, lse, random = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        packed = "cu_seqlens_q" in ctx.options
        backward = low._flash_attn_varlen_backward if packed else low._flash_attn_backward
        backward(
            dy,
            q,
            k,
            v,
            y,
            lse.mT.contiguous(),
            dq,
            dk,
            dv,
            **ctx.options,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=random,
        )
        d_far_y = (far_lse - lse).exp()[..., None] * dy
        return dq, dk, dv, d_far_y, (d_far_y * (far_y - y)).sum(-1), None
