"""Standard tools applied to DPASSM: what each costs in accuracy, and what it does for speed.

    python -m benchmarks.speed.tools_table    (some minutes; docs/integration.md shows its table)

Accuracy: a byte-level model is trained on Python's standard library, and each version of it is
evaluated on the same held-out files. Speed: a prompt and a step of one token through a layer of a
usual width, eager, compiled, as an AOTInductor package, and with int8 weights (torchao).
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.measuring import command, interleave
from benchmarks.speed.training import train_on_text
from longctx_layers import DPASSM, create_model
from longctx_layers.command_line import Parser, add_output
from longctx_layers.data.byte_text import documents, split, stretch
from longctx_layers.evals import token_losses
from longctx_layers.files import write
from longctx_layers.info import machine

BEGIN, END = "<!-- tools table, begin -->", "<!-- tools table, end -->"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--sequence_length", type=int, default=512)
    parser.add_argument("--validation_documents", type=int, default=56)
    parser.add_argument(
        "--text", type=Path, help="a file or folder of text; default: Python's standard library"
    )
    parser.add_argument("--d_model", type=int, default=768, help="width of the timed layer")
    parser.add_argument("--n_heads", type=int, default=12)
    parser.add_argument("--window_size", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", choices=("accuracy", "speed"), help="write only this table")
    parser.add_argument("--no_compile", action="store_true", help="leave out what needs a compiler")
    add_output(parser, "--output", "bench/tools.md")
    parser.add_argument(
        "--output_dir",
        dest="output",
        type=lambda folder: Path(folder, "tools.md"),
        default=argparse.SUPPRESS,
        help="write tools.md into this folder",
    )
    parser.add_argument(
        "--page", type=Path, help="also write the tables into this page, between its two marks"
    )
    return parser.parse_args(argv)


def int8(module: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig(version=2))
    return module


VERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float32": lambda module: module,
    "bfloat16": lambda module: module.bfloat16(),
    "int8 weights": int8,
}


# ---- Accuracy


@torch.no_grad()
def accuracy(args: argparse.Namespace) -> list[str]:
    """Lines of the table: bytes, loss, its change, agreement on the most likely byte."""
    length = 4 * args.sequence_length
    training, held_out = split(documents(args.text, length + 2), seed=0)
    draw = random.Random(1)
    checks = torch.stack([stretch(d, length, draw) for d in held_out[: args.validation_documents]])
    torch.manual_seed(0)
    options = {"window_size": 16, "ssm_state_dim": 16}
    model = create_model(256, "tiny", "dpassm", block_kwargs=options)
    with torch.enable_grad():
        train_on_text(
            "dpassm",
            model,
            training,
            steps=args.steps,
            batch_size=args.batch_size,
            sequence_length=args.sequence_length,
        )
    lines = [
        "| weights | bytes | loss, nats per byte | more than float32 | same likeliest byte |",
        "|---|---|---|---|---|",
    ]
    reference: tuple[Tensor, Tensor] | None = None
    for name, version in VERSIONS.items():
        changed = version(deepcopy(model)).eval()
        losses = token_losses(changed, checks, tokens_at_once=length)
        likeliest = most_likely(changed, checks)
        reference = reference or (losses, likeliest)
        more = (losses - reference[0]).mean().item()
        same = (likeliest == reference[1]).double().mean().item()
        lines.append(
            f"| {name} | {size(changed):,} | {losses.mean().item():.4f} | {more:+.5f} | "
            f"{100 * same:.2f} % |"
        )
    return lines


def most_likely(model: nn.Module, ids: Tensor) -> Tensor:
    """The most likely byte at each position, `[n, T]`."""
    return torch.cat([model(row[None, :-1]).argmax(-1) for row in ids])


def size(module: nn.Module) -> int:
    """Bytes of the parameters as they are stored."""
    stored = 0
    for parameter in module.parameters():
        parts = [parameter]
        if hasattr(
            parameter, "__tensor_flatten__"
        ):  # a quantized weight consists of several tensors
            parts = [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
        stored += sum(part.nbytes for part in parts)
    return stored


# ---- Speed


class Step(nn.Module):
    """A layer in the form that exporters need: positional arguments, the state a plain tuple."""

    def __init__(self, layer: DPASSM) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: Any = None) -> Any:
        y, state = self.layer(x, None if state is None else self.layer.state_type(*state))
        return y, tuple(state)


def package(layer: DPASSM, inputs: tuple[Any, ...], folder: Path) -> Callable[..., Any]:
    """An AOTInductor package of one call, loaded from its file."""
    path = str(folder / f"{len(inputs)}.pt2")
    program = torch.export.export(Step(layer), inputs)
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    return torch._inductor.aoti_load_package(path)


def versions(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, and for each a prompt and a step of one token, ready to be called."""
    torch.manual_seed(0)
    layer = DPASSM(args.d_model, args.n_heads, window_size=args.window_size).eval()
    prompt, token = (torch.randn(1, n, args.d_model) for n in (args.prompt, 1))
    for name, version in VERSIONS.items():
        changed = version(deepcopy(layer))
        x = prompt.bfloat16() if name == "bfloat16" else prompt
        x_next = token.bfloat16() if name == "bfloat16" else token
        _, state = changed(x)
        yield name, {"prompt": partial(changed, x), "step": partial(changed, x_next, state)}
        if args.no_compile:
            continue
        compiled = torch.compile(changed, dynamic=False)
        calls = {"prompt": partial(compiled, x), "step": partial(compiled, x_next, state)}
        yield f"{name}, torch.compile", calls
        if name == "float32":
            whole = package(layer, (x,), folder)
            single = package(layer, (x_next, tuple(state)), folder)
            calls = {"prompt": partial(whole, x), "step": partial(single, x_next, state)}
            yield f"{name}, AOTInductor", calls


@torch.no_grad()
def speed(args: argparse.Namespace) -> list[str]:
    """Lines of the table: medians of interleaved rounds, and their ratios to eager float32."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = dict(versions(args, Path(folder)))
        times = {
            kind: interleave(
                {name: calls[kind] for name, calls in contenders.items()},
                rounds=args.rounds * (1 if kind == "prompt" else 10),
                seconds=args.seconds,
            )
            for kind in ("prompt", "step")
        }
    lines = [
        f"| layer | prompt of {args.prompt:,} tokens | of eager | one token | of eager |",
        "|---|---|---|---|---|",
    ]
    for name in contenders:
        cells = [name]
        for timings in times.values():
            median = timings[name].median
            cells += [f"{1e3 * median:.3g} ms", f"{median / timings['float32'].median:.2f} x"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


# ---- The page


def insert(page: Path, text: str) -> None:
    """Replace what is between the page's two marks by the text."""
    content = page.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ValueError(f"{page}: expected the lines {BEGIN!r} and {END!r}, once each; add them")
    before, rest = content.split(BEGIN)
    write(page, f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main(argv: list[str] | None = None) -> str:
    args = parse(argv)
    lines = []
    if args.only != "speed":
        lines += [
            f"A byte-level DPASSM of a million parameters, after {args.steps} steps of training, "
            f"on {4 * args.sequence_length:,} bytes of each of {args.validation_documents} files "
            "that were held out:",
            "",
            *accuracy(args),
            "",
        ]
    if args.only != "accuracy":
        lines += [
            f"`DPASSM({args.d_model}, {args.n_heads}, window_size={args.window_size})`, one "
            "sequence, medians of interleaved rounds:",
            "",
            *speed(args),
            "",
        ]
    lines.append(f"`{command()}`: {machine()}.")
    text = "\n".join(lines)
    write(args.output, "# Standard tools\n\n" + text + "\n")
    if args.page is not None:
        insert(args.page, text)
    print(text)
    return text


if __name__ == "__main__":
    main()
