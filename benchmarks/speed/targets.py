"""Measures what the CPU path has to reach: a table of targets, each met or not.

    python -m benchmarks.speed.targets [floor sdpa ...] [--length 8192] [--publish]

Ratios are of medians of interleaved rounds in one process. Sections that are not named keep the
numbers of the last run that measured them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.speed import layer_targets, model_targets
from benchmarks.speed.measuring import Row, add_options, command
from longctx_layers import LAYERS
from longctx_layers.command_line import Parser, closest
from longctx_layers.files import write
from longctx_layers.info import machine

Section = Callable[[argparse.Namespace], Iterator[Row]]
SECTIONS: dict[str, Section] = {
    "floor": layer_targets.floor,
    "sdpa": layer_targets.sdpa,
    "peers": layer_targets.peers,
    "slopes": layer_targets.slopes,
    "memory": layer_targets.memory,
    "bf16": layer_targets.bf16,
    "decode": model_targets.decode,
    "training": model_targets.training,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)}; default: all")
    add_options(parser)
    parser.add_argument(
        "--length", type=int, default=8192, help="tokens; other lengths are multiples of this one"
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        choices=LAYERS,
        default=[name for name in LAYERS if name != "vanilla"],
        help="default: all but vanilla",
    )
    parser.add_argument("--compile", action="store_true", help="also measure compiled layers")
    parser.add_argument("--size", default="150m", help="size of the models that decode and train")
    parser.add_argument("--vocab_size", type=int, default=32000)
    args = parser.parse_args(argv)
    for name in args.sections:
        if name not in SECTIONS:
            hint = closest(name, SECTIONS)
            parser.error(f"unknown section {name!r}{hint}; valid ones are {', '.join(SECTIONS)}")
    return args


def table(sections: dict[str, dict[str, Any]]) -> str:
    """The Markdown page."""
    lines = ["# Targets on the CPU", ""]
    for name in sorted(sections, key=list(SECTIONS).index):
        section = sections[name]
        title = SECTIONS[name].__doc__ or name
        lines += [f"## {title.splitlines()[0].rstrip('.')}", ""]
        lines += [f"`{section['command']}`: {section['machine']}.", ""]
        lines += ["| | measured | target | met | of |", "|---|---|---|---|---|"]
        lines += [line(Row(**row)) for row in section["rows"]] + [""]
    return "\n".join(lines)


def line(row: Row) -> str:
    """A line of the table."""
    target = ""
    if row.at_most is not None:
        target = f"at most {row.at_most:.4g}"
    if row.at_least is not None:
        target = f"at least {row.at_least:.4g}"
    met = {True: "yes", False: "**no**", None: ""}[row.met]
    return f"| {row.what} | {row.measured:.4g} {row.unit} | {target} | {met} | {row.detail} |"


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    args = parse(argv)
    path = args.output_dir / "targets.json"
    sections = json.loads(path.read_text()) if path.exists() else {}
    for name in args.sections or SECTIONS:
        rows = []
        for row in SECTIONS[name](args):
            rows.append(row._asdict())
            print(line(row), flush=True)
        sections[name] = {"command": command(), "machine": machine(), "rows": rows}
        # After each section, so that an interrupted run keeps what it has measured.
        write(path, json.dumps(sections, indent=1) + "\n")
        write(args.output_dir / "targets.md", table(sections))
    print(f"Written to {args.output_dir}/targets.md")
    return sections


if __name__ == "__main__":
    main()
