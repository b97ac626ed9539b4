"""Time, memory and state of every layer and operation, by length: tables, plots and slopes.

    python -m benchmarks.speed.by_length [--lengths 1024 4096 ...] [--publish]

Times are medians of rounds in which all contenders take turns, in one process. Peak memory is
measured in a process of its own for each number. Linux only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.common import RUNS, forward
from benchmarks.speed.contenders import FLOOR, case, decode
from benchmarks.speed.drawing import draw
from benchmarks.speed.measuring import add_options, command, interleave, shape_of, slope
from benchmarks.speed.memory import passes, peak_bytes
from benchmarks.speed.operations import FULL, OPERATIONS, operation_case
from benchmarks.speed.peers import SDPA
from longctx_layers import LAYERS
from longctx_layers.info import machine

QUADRATIC = (SDPA, "vanilla", FULL)
CONTENDERS = {"layers": [SDPA, *LAYERS], "operations": list(OPERATIONS)}
Rows = list[dict[str, Any]]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 32768, 65536])
    parser.add_argument("--quadratic-up-to", type=int, default=32768, help="full attention")
    parser.add_argument("--only", choices=CONTENDERS, help="layers or operations; both by default")
    return parser.parse_args(argv)


def measure(kind: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of time and memory by name, run and length, and of decoding by name and context."""
    shape = shape_of(args)
    for length in args.lengths:
        names = [
            n for n in CONTENDERS[kind] if n not in QUADRATIC or length <= args.quadratic_up_to
        ]
        floors = [FLOOR + name for name in names if name in LAYERS]
        for run, through in RUNS.items():
            calls = {name: through(case(name, shape, length)) for name in [*names, *floors]}
            times = interleave(calls, rounds=args.rounds, seconds=args.seconds)
            for name, timing in times.items():
                row = {"name": name, "run": run, "length": length, **timing._asdict()}
                if name not in floors and not args.no_memory:
                    row["peak_bytes"] = peak_bytes(passes, name, run, length, shape)
                yield row
        calls, states = {}, {}
        for name in names:
            if name in OPERATIONS:
                calls[name] = forward(operation_case(name, shape, 1, cached=length))
            elif name in LAYERS:
                calls[name], states[name] = decode(name, shape, length)
        # Single tokens are so short that many of them cost little.
        for name, timing in interleave(calls, rounds=50, seconds=args.seconds).items():
            row = {"name": name, "run": "decode", "length": length, **timing._asdict()}
            yield row | ({"state_bytes": states[name]} if name in states else {})


def tables(rows: Rows, title: str) -> str:
    """Markdown: a table by run, lengths as columns, slopes at the end."""
    times = {(r["name"], r["run"], r["length"]): r["median"] for r in rows}
    lines = [f"# {title}", "", f"`{command()}`: {machine()}; float32, one sequence.", ""]
    if any(row["name"].startswith(FLOOR) for row in rows):
        lines += ["Time, times that of the layer's own linear projections, and peak memory.", ""]
    for run in (*RUNS, "decode"):
        chosen = [r for r in rows if r["run"] == run and not r["name"].startswith(FLOOR)]
        lengths = sorted({r["length"] for r in chosen})
        heads = [f"{run}, {'after ' if run == 'decode' else ''}{n:,}" for n in lengths]
        lines += [_line(["", *heads, "slope of time", "of memory"])]
        lines += ["|---" * (len(heads) + 3) + "|"]
        for name in dict.fromkeys(r["name"] for r in chosen):
            own = {r["length"]: r for r in chosen if r["name"] == name}
            cells = [_cell(own[n], times) if n in own else "" for n in lengths]
            lines.append(_line([name, *cells, *(_slope(own, k) for k in ("median", "peak_bytes"))]))
        lines.append("")
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _slope(own: dict[int, dict[str, Any]], key: str) -> str:
    points = {n: row[key] for n, row in own.items() if row.get(key)}
    return f"{slope(list(points), list(points.values())):.2f}" if len(points) > 1 else ""


def _cell(row: dict[str, Any], times: dict[tuple[str, str, int], float]) -> str:
    if row["run"] == "decode":
        state = f", {row['state_bytes'] / 2**10:,.0f} KiB" if "state_bytes" in row else ""
        return f"{1e3 * row['median']:.3g} ms{state}"
    parts = [f"{row['median']:.3g} s"]
    under = times.get((FLOOR + row["name"], row["run"], row["length"]))
    if under:
        parts.append(f"{row['median'] / under:.2f} x")
    if row.get("peak_bytes"):
        parts.append(f"{row['peak_bytes'] / 2**20:,.0f} MiB")
    return ", ".join(parts)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for kind in CONTENDERS if args.only is None else [args.only]:
        rows = []
        for row in measure(kind, args):
            rows.append(row)
            print(json.dumps(row), flush=True)
        written = {"command": command(), "machine": machine(), "rows": rows}
        (args.output / f"{kind}.json").write_text(json.dumps(written, indent=1) + "\n")
        page = tables(rows, kind.capitalize())
        (args.output / f"{kind}.md").write_text(page)
        for what in ("time",) if args.no_memory else ("time", "memory"):
            draw(
                [r for r in rows if not r["name"].startswith(FLOOR)],
                what,
                args.output / f"{kind}_{what}.png",
            )
        print(page + f"\nWritten to {args.output}/{kind}.md")


if __name__ == "__main__":
    main()
