"""Stream a million tokens through a model of 150 million parameters, in memory that stays flat.

    python examples/stream.py [--length 1000000] [--piece 4096] [--text FILE]

A text goes through in pieces; all that is kept between two of them is the model's state, whose
size is constant. Then the model decodes, as fast as it did after the first thousand tokens. Writes
a page, its numbers and a picture. Linux only, for the resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longctx_layers import LAYERS, LongContextLM, create_model
from longctx_layers.command_line import Parser, add_output
from longctx_layers.files import write_all
from longctx_layers.info import machine
from longctx_layers.layers.registry import canonical_name
from longctx_layers.lm.factory import SIZES
from longctx_layers.lm.model import ModelState
from longctx_layers.reports import figures
from longctx_layers.reports.markdown import table

EARLY = 1_000  # tokens after which decoding is timed for comparison
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--length", type=int, default=1_000_000, help="tokens to prefill")
    parser.add_argument("--piece", type=int, default=4096, help="tokens in a call")
    parser.add_argument("--decode", type=int, default=100, help="tokens to decode, at both places")
    parser.add_argument("--size", choices=SIZES, default="150m")
    parser.add_argument("--block", type=canonical_name, choices=LAYERS, default="dpassm")
    parser.add_argument("--checkpoint", type=Path, help="a folder of save_pretrained")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and state")
    parser.add_argument("--text", type=Path, help="file whose bytes are the tokens, repeated")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser, "--output_dir", "stream")
    args = parser.parse_args(argv)
    for name in ("piece", "decode"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.length <= EARLY:
        parser.error(f"--length: expected more than {EARLY}, got {args.length}")
    return args


def load(args: argparse.Namespace) -> LongContextLM:
    """The checkpoint's model, or a new one over bytes."""
    torch.manual_seed(args.seed)
    if args.checkpoint is not None:
        model = LongContextLM.from_pretrained(args.checkpoint)
    else:
        model = create_model(256, args.size, args.block)
    return model.to(DTYPES[args.dtype]).eval()


def pieces(args: argparse.Namespace, vocab_size: int) -> Iterator[Tensor]:
    """The tokens `[1, n]`: first `EARLY` of them, then `--piece` each; random without a text."""
    generator = torch.Generator().manual_seed(args.seed)
    text = b"" if args.text is None else args.text.read_bytes()
    if args.text is not None and not text:
        raise ValueError(f"--text: expected at least one byte, but {args.text} is empty")
    begin = 0
    while begin < args.length:
        end = min(begin + args.piece, args.length) if begin else EARLY
        if text:
            piece = bytes(text[i % len(text)] for i in range(begin, end))
            yield torch.frombuffer(bytearray(piece), dtype=torch.uint8).long()[None]
        else:
            yield torch.randint(vocab_size, (1, end - begin), generator=generator)
        begin = end


def resident() -> int:
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def prefill(
    model: LongContextLM, args: argparse.Namespace
) -> tuple[ModelState, ModelState, list[dict[str, float]]]:
    """The states after `EARLY` and after all tokens, and a record of every piece."""
    state: ModelState | None = None
    early: ModelState | None = None
    records: list[dict[str, float]] = []
    position = 0
    with tqdm(total=args.length, unit="token", unit_scale=True, disable=None) as bar:
        for ids in pieces(args, model.config.vocab_size):
            begin = time.perf_counter()
            _, state = model(ids, state, return_state=True, last_only=True)
            seconds = time.perf_counter() - begin
            position += ids.shape[1]
            early = state if early is None else early
            speed = ids.shape[1] / seconds
            record = {
                "position": position,
                "seconds": round(seconds, 4),
                "tokens_per_second": round(speed, 1),
                "resident_bytes": resident(),
            }
            records.append(record)
            bar.update(ids.shape[1])
            bar.set_postfix_str(f"{resident() / 2**20:,.0f} MiB resident")
            if bar.disable and len(records) % 20 == 1:
                print(f"{position:,} tokens, {speed:,.0f} tokens/s", flush=True)
    assert early is not None
    assert state is not None
    return early, state, records


@torch.no_grad()
def decode(model: LongContextLM, states: dict[str, ModelState], count: int) -> dict[str, float]:
    """Median seconds of a token after each state; they take turns, so that noise affects both."""
    taken: dict[str, list[float]] = {name: [] for name in states}
    ids = {name: torch.zeros(1, 1, dtype=torch.int64) for name in states}
    states = dict(states)
    for turn in range(count + 3):
        for name, values in taken.items():
            begin = time.perf_counter()
            logits, states[name] = model(ids[name], states[name], return_state=True, last_only=True)
            ids[name] = logits.argmax(-1)
            if turn >= 3:  # the first ones are a warm-up
                values.append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}


def state_bytes(state: ModelState) -> int:
    """Size of all tensors of the model's state."""
    return sum(tensor.nbytes for layer in state for tensor in layer)


def draw(records: list[dict[str, float]], title: str) -> bytes:
    """Resident memory and tokens per second by position, as a PNG."""
    figure, (left, right) = figures.new_panels(2)
    figure.suptitle(title)
    figures.tidy(left, "Memory", "position (tokens)", "resident memory (MiB)")
    figures.tidy(right, "Speed", "position (tokens)", "prefill (tokens/s)")
    x = [record["position"] for record in records]
    memory = [record["resident_bytes"] / 2**20 for record in records]
    speed = [record["tokens_per_second"] for record in records]
    for axes, y, colour in ((left, memory, figures.BLUE), (right, speed, figures.VERMILION)):
        axes.plot(x, y, color=colour)
        axes.set_ylim(0, 1.25 * max(y))
        axes.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
        axes.tick_params("x", rotation=20)
    return figures.png(figure)


def page(m: dict[str, Any]) -> str:
    """The Markdown page."""
    low, high = (bound / 2**20 for bound in m["resident_bytes"])
    rows = [
        [
            f"{place['position']:,} tokens",
            f"{1e3 * place['seconds']:.2f} ms",
            f"{1 / place['seconds']:.1f}",
            f"{place['state_bytes']:,} bytes",
        ]
        for place in (m["early"], m["late"])
    ]
    parts = [
        f"# {m['length']:,} tokens in one stream",
        f"`{m['command']}` on {m['machine']}: {m['model']}, {m['parameters']:,} parameters in "
        f"{m['dtype']}, in pieces of {m['piece']:,}.",
        f"The prefill took **{m['seconds'] / 60:,.1f} minutes**, "
        f"{m['length'] / m['seconds']:,.0f} tokens per second. Between its second and its last "
        f"piece the process held {low:,.0f} to {high:,.0f} MiB.",
        table(["after", "time per token", "tokens/s", "state"], rows),
        "![memory and speed by position](stream.png)",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if argv is None else argv
    args = parse(arguments)
    model = load(args)
    print(model.describe())
    early, late, records = prefill(model, args)
    medians = decode(model, {"early": early, "late": late}, args.decode)
    settled = [record["resident_bytes"] for record in records[2:]] or [resident()]
    places = {"early": (EARLY, early), "late": (args.length, late)}
    metrics: dict[str, Any] = {
        "command": " ".join(["python examples/stream.py", *arguments]),
        "machine": machine(),
        "model": str(args.checkpoint or f"a new {args.size} of {args.block}"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": args.dtype,
        "length": args.length,
        "piece": args.piece,
        "seconds": sum(record["seconds"] for record in records),
        "resident_bytes": [min(settled), max(settled)],
    }
    for name, (position, state) in places.items():
        metrics[name] = {
            "position": position,
            "seconds": medians[name],
            "state_bytes": state_bytes(state),
        }
    metrics["pieces"] = records
    title = f"{metrics['model']}, {args.dtype}, in pieces of {args.piece:,}"
    files: dict[str, str | bytes] = {
        "stream.md": page(metrics),
        "stream.json": json.dumps(metrics, indent=1) + "\n",
        "stream.png": draw(records, title),
    }
    write_all(args.output_dir, files)
    print(f"\n{files['stream.md']!s}\nWritten to {args.output_dir}/")
    return metrics


if __name__ == "__main__":
    main()
