"""FlexAttention's kernel as torch would generate it for a window, to compare with ours.

The template and its configuration are those of the installed torch. Sizes, strides, the mask and
the store, which inductor would fill in, are filled in here, since inductor needs a GPU.
"""

from __future__ import annotations

import importlib.util
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch._inductor.kernel import flex
from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

from benchmarks.kernels.launches import BATCH, HEADS, LENGTH, empty

ARGUMENTS = [
    "Q",
    "K",
    "V",
    "LSE",
    "MAX",
    "KV_NUM_BLKS",
    "KV_IDX",
    "FULL_KV_NUM_BLKS",
    "FULL_KV_IDX",
    "OUT",
]
SPARSE_BLOCK = 128


def source(window: int, head_dim: int, config: Any) -> str:
    """The text of a module with the kernel `flex_attention` and its helpers."""
    folder = Path(flex.__file__).parent / "templates"
    names = ("flex_attention", "utilities", "common")
    text = "\n".join((folder / f"{name}.py.jinja").read_text() for name in names)
    blocks = -(-LENGTH // SPARSE_BLOCK)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys("QKV", (BATCH, HEADS, LENGTH, head_dim))
    for full in ("", "FULL_"):
        shapes |= {f"{full}KV_NUM_BLKS": (1, 1, blocks), f"{full}KV_IDX": (1, 1, blocks, blocks)}
    constants = {
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "OUTPUT_LOGSUMEXP": True,
        "OUTPUT_MAX": False,
        "FLOAT32_PRECISION": "'ieee'",
        "IS_DIVISIBLE": True,
        "SM_SCALE": head_dim**-0.5,
        "GQA_SHARED_HEADS": 1,
        "HAS_FULL_BLOCKS": True,
        "QK_HEAD_DIM": head_dim,
        "QK_HEAD_DIM_ROUNDED": head_dim,
        "V_HEAD_DIM": head_dim,
        "V_HEAD_DIM_ROUNDED": head_dim,
        "SAFE_HEAD_DIM": True,
        "USE_TMA": False,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SPARSE_Q_BLOCK_SIZE": SPARSE_BLOCK,
        "SPARSE_KV_BLOCK_SIZE": SPARSE_BLOCK,
        "INDEX_DTYPE": "tl.int32",
    }
    defines = "\n".join(f"{name} : tl.constexpr = {value}" for name, value in constants.items())

    def stride(name: str, dim: int | None = None) -> str:
        sizes = shapes[name]
        strides = [torch.Size(sizes[n + 1 :]).numel() for n in range(len(sizes))]
        return str(tuple(strides)) if dim is None else str(strides[dim])

    def modification(subgraph_number: int, output_name: str, **_: Any) -> str:
        score = "qk"  # unchanged
        mask = f"(n <= m) & (m - n < {window})"
        return f"{output_name} = ({(score, mask)[subgraph_number]})"

    def store_output(indices: tuple[str, ...], value: str, mask: str, **_: Any) -> str:
        steps = torch.Size(shapes["Q"]).numel() // BATCH, LENGTH * head_dim, head_dim, 1
        at = " + ".join(f"{step} * {index}" for step, index in zip(steps, indices, strict=True))
        return f"tl.store(OUT + ({at}), {value}.to(OUT.dtype.element_ty), {mask})"

    def indent(text: str, depth: int) -> str:
        first, *rest = text.splitlines()
        return "\n".join([first, *(" " * 4 * depth + line for line in rest)])

    environment = jinja2.Environment()
    environment.filters["indent_except_first"] = indent
    arguments = ", ".join(f"arg_{name}" for name in ARGUMENTS)
    named = "\n".join(f"{name} = arg_{name}" for name in ARGUMENTS)
    head = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
    head += f"def flex_attention({arguments}):\n" + textwrap.indent(f"{defines}\n{named}", "    ")
    rendered = environment.from_string(text).render(
        def_kernel=lambda *_: head,
        gen_argdefs=lambda: arguments,
        gen_defines=lambda: defines,
        size=lambda name, dim: str(shapes[name][dim]),
        stride=stride,
        modification=modification,
        store_output=store_output,
        **{name: constants[name] for name in ("USE_TMA", "HAS_FULL_BLOCKS")},
    )
    return rendered


def configuration(head_dim: int) -> Any:
    """The configuration that torch chooses on an H100."""
    return CUDAConfigHeuristic().h100_default_flex_config[torch.bfloat16, head_dim]


def window_attention(head_dim: int, window: int = 128) -> None:
    """Launch FlexAttention's kernel, inside `compiled_for("sm_90")`."""
    config = configuration(head_dim)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flex_attention.py"
        path.write_text(source(window, head_dim, config))
        spec = importlib.util.spec_from_file_location("flex_attention", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        x = empty(BATCH, HEADS, LENGTH, head_dim)
        rows = empty(BATCH, HEADS, LENGTH, dtype=torch.float32)
        mask = empty(LENGTH, dtype=torch.int32)
        arguments = (x, x, x, rows, rows, mask, mask, mask, mask, x)
        launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        module.flex_attention[(1,)](*arguments, **launch)
