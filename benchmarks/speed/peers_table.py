"""Time and peak memory of this library's layers and those of other libraries.

    python -m benchmarks.speed.peers_table [--lengths 2048 8192] [--publish]

Times are medians of interleaved rounds in one process. Before that, each peer's output and gradient
are compared with ours; a peer that differs is not timed. The page names the peers that are not
installed. Linux only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.common import RUNS
from benchmarks.speed.contenders import FLOOR, case, floors
from benchmarks.speed.drawing import draw
from benchmarks.speed.measuring import add_options, command, interleave, shape_of
from benchmarks.speed.memory import passes, peak_bytes
from benchmarks.speed.peers import PEERS, check
from longctx_layers import LAYERS
from longctx_layers.command_line import Parser
from longctx_layers.files import write
from longctx_layers.info import machine


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    return parser.parse_args(argv)


def checked(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Peers that run here and agree with ours, and the reasons against the others."""
    agreeing = []
    reasons = {}
    for name in names:
        if reason := PEERS[name].missing:
            reasons[name] = reason
            continue
        try:
            check(name)
            agreeing.append(name)
        except Exception as error:  # whatever another library may raise
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return agreeing, reasons


def measure(args: argparse.Namespace, peers: list[str]) -> Iterator[dict[str, Any]]:
    """A row by name, run and length."""
    shape = shape_of(args)
    for length in args.lengths:
        for run, make_run in RUNS.items():
            names = [*LAYERS, *floors(LAYERS, shape)]
            for name in peers:
                longest = PEERS[name].longest
                if (PEERS[name].trains or run == "forward") and length <= (longest or length):
                    names.append(name)
            calls = {name: make_run(case(name, shape, length)) for name in names}
            times = interleave(calls, rounds=args.rounds, seconds=args.seconds)
            for name, timing in times.items():
                row = {"name": name, "run": run, "length": length, **timing._asdict()}
                if not name.startswith(FLOOR) and not args.no_memory:
                    row["peak_bytes"] = peak_bytes(passes, name, run, length, shape)
                yield row


def page(rows: list[dict[str, Any]], reasons: dict[str, str], args: argparse.Namespace) -> str:
    """Markdown: a table of all by length and run, and what each peer was compared with."""
    cells: dict[str, dict[tuple[int, str], dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["name"], {})[row["length"], row["run"]] = row
    columns = [(length, run) for length in args.lengths for run in RUNS]
    lines = [
        "# Compared with other libraries",
        "",
        f"`{command()}`: {machine()}; float32, one sequence, {shape_of(args)}.",
        "",
        "In brackets: the ratio to DPASSM's time.",
        "",
        "| | " + " | ".join(f"{run} at {length:,}" for length, run in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name, by_column in cells.items():
        texts = []
        for column in columns:
            measured = by_column.get(column)
            if measured is None:
                texts.append("-")
                continue
            times = measured["median"] / cells["dpassm"][column]["median"]
            peak = measured.get("peak_bytes")
            memory = f", {peak / 2**20:,.0f} MiB" if peak else ""
            texts.append(f"{measured['median']:.3g} s ({times:.2g}){memory}")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    lines += ["", "Compared before the timing, by output and gradient of a short sequence:", ""]
    for name in args.peers:
        if name in reasons:
            lines.append(f"- {name}: not compared and not timed; {reasons[name]}")
        else:
            lines.append(f"- {name} = ours: {PEERS[name].same}")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    agreeing, reasons = checked(args.peers)
    rows = []
    for row in measure(args, agreeing):
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {"command": command(), "machine": machine(), "left_out": reasons, "rows": rows}
    write(args.output_dir / "peers.json", json.dumps(result, indent=1) + "\n")
    text = page(rows, reasons, args)
    write(args.output_dir / "peers.md", text)
    drawn = [row for row in rows if not row["name"].startswith(FLOOR)]
    for what in ("time",) if args.no_memory else ("time", "memory"):
        write(args.output_dir / f"peers_{what}.png", draw(drawn, what))
    print(text + f"\nWritten to {args.output_dir}/peers.md")
    return rows


if __name__ == "__main__":
    main()
