"""Time, memory and state of every layer and operation, by length: tables, plots and slopes.

    python -m benchmarks.speed.by_length [--lengths 1024 4096 ...] [--publish]

Times are medians of interleaved rounds of all contenders in one process. Each peak of memory is
measured in a process of its own. Linux only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.common import RUNS, Shape, forward
from benchmarks.speed.contenders import FLOOR, case, decode, floors, registered
from benchmarks.speed.drawing import draw
from benchmarks.speed.measuring import add_options, command, interleave, shape_of, slope
from benchmarks.speed.memory import passes, peak_bytes
from benchmarks.speed.operations import FULL, OPERATIONS, operation_case
from benchmarks.speed.peers import SDPA
from longctx_layers import LAYERS
from longctx_layers.command_line import Parser
from longctx_layers.files import write
from longctx_layers.info import machine

KINDS = ("layers", "operations")
Rows = list[dict[str, Any]]


def contenders(kind: str) -> list[str]:
    """Everything to measure of a kind; layers are those registered by now."""
    return [SDPA, *LAYERS] if kind == "layers" else list(OPERATIONS)


def is_quadratic(name: str) -> bool:
    """Whether the cost grows with the square of the length: every token sees all before it."""
    if name in LAYERS:
        layer = registered(name, Shape(d_model=16, n_heads=1, local=8))
        return layer.reach is None and not layer.constant_state
    return name in (SDPA, FULL)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 32768, 65536])
    parser.add_argument(
        "--quadratic_up_to", type=int, default=32768, help="the longest sequence for full attention"
    )
    parser.add_argument("--only", choices=KINDS, help="measure only these; default: both")
    return parser.parse_args(argv)


def measure(kind: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of time and memory by name, run and length, and of decoding by name and context."""
    shape = shape_of(args)
    for length in args.lengths:
        names = contenders(kind)
        if length > args.quadratic_up_to:
            names = [name for name in names if not is_quadratic(name)]
        floor_names = floors(names, shape)
        for run, make_run in RUNS.items():
            calls = {n: make_run(case(n, shape, length)) for n in [*names, *floor_names]}
            times = interleave(calls, rounds=args.rounds, seconds=args.seconds)
            for name, timing in times.items():
                row = {"name": name, "run": run, "length": length, **timing._asdict()}
                if name not in floor_names and not args.no_memory:
                    row["peak_bytes"] = peak_bytes(passes, name, run, length, shape)
                yield row
        calls = {}
        states = {}
        for name in names:
            if name in OPERATIONS:
                calls[name] = forward(operation_case(name, shape, 1, cached=length))
            elif name in LAYERS:
                calls[name], states[name] = decode(name, shape, length)
        # Single tokens are short, so that many rounds cost little.
        for name, timing in interleave(calls, rounds=50, seconds=args.seconds).items():
            row = {"name": name, "run": "decode", "length": length, **timing._asdict()}
            yield row | ({"state_bytes": states[name]} if name in states else {})


def tables(rows: Rows, title: str) -> str:
    """Markdown: a table for each run, with lengths as columns and the slopes at the end."""
    times = {(r["name"], r["run"], r["length"]): r["median"] for r in rows}
    lines = [f"# {title}", "", f"`{command()}`: {machine()}; float32, one sequence.", ""]
    if any(row["name"].startswith(FLOOR) for row in rows):
        lines.append("Time, its ratio to that of the layer's own linear projections, peak memory.")
        lines.append("")
    for run in (*RUNS, "decode"):
        chosen = [r for r in rows if r["run"] == run and not r["name"].startswith(FLOOR)]
        lengths = sorted({r["length"] for r in chosen})
        heads = [f"{run}, {'after ' if run == 'decode' else ''}{n:,}" for n in lengths]
        lines.append(_line(["", *heads, "slope of time", "of memory"]))
        lines.append("|---" * (len(heads) + 3) + "|")
        for name in dict.fromkeys(r["name"] for r in chosen):
            by_length = {r["length"]: r for r in chosen if r["name"] == name}
            cells = [_cell(by_length[n], times) if n in by_length else "" for n in lengths]
            slopes = [_slope(by_length, key) for key in ("median", "peak_bytes")]
            lines.append(_line([name, *cells, *slopes]))
        lines.append("")
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _slope(by_length: dict[int, dict[str, Any]], key: str) -> str:
    points = {n: row[key] for n, row in by_length.items() if row.get(key)}
    return f"{slope(list(points), list(points.values())):.2f}" if len(points) > 1 else ""


def _cell(row: dict[str, Any], times: dict[tuple[str, str, int], float]) -> str:
    if row["run"] == "decode":
        state = f", {row['state_bytes'] / 2**10:,.0f} KiB" if "state_bytes" in row else ""
        return f"{1e3 * row['median']:.3g} ms{state}"
    parts = [f"{row['median']:.3g} s"]
    floor = times.get((FLOOR + row["name"], row["run"], row["length"]))
    if floor:
        parts.append(f"{row['median'] / floor:.2f} x")
    if row.get("peak_bytes"):
        parts.append(f"{row['peak_bytes'] / 2**20:,.0f} MiB")
    return ", ".join(parts)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    for kind in KINDS if args.only is None else [args.only]:
        rows = []
        for row in measure(kind, args):
            rows.append(row)
            print(json.dumps(row), flush=True)
        result = {"command": command(), "machine": machine(), "rows": rows}
        write(args.output_dir / f"{kind}.json", json.dumps(result, indent=1) + "\n")
        page = tables(rows, kind.capitalize())
        write(args.output_dir / f"{kind}.md", page)
        drawn = [row for row in rows if not row["name"].startswith(FLOOR)]
        for what in ("time",) if args.no_memory else ("time", "memory"):
            write(args.output_dir / f"{kind}_{what}.png", draw(drawn, what))
        print(page + f"\nWritten to {args.output_dir}/{kind}.md")


if __name__ == "__main__":
    main()
