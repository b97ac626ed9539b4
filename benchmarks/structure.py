"""Measures how the project is built: its import graph, the path of a call through it, its lines.

    python benchmarks/structure.py [--root CHECKOUT] [--json FILE] [--before FILE]

Works on any checkout of the project, and imports none of it but for the trace, which runs a few
layers in a process of its own. `--before` adds a column with the JSON of an earlier run.

Import graph. A room is a file or folder directly under `longctx_layers`; `kernels/` is one too,
since it is installed as `longctx_layers.kernels`. The programs (`APPLICATION`) and `__main__.py`
are left out. An arrow is a pair of rooms of which the first imports the second anywhere, in
functions and under `TYPE_CHECKING` as well. A circle is a set of rooms, or files, that reach one
another. Floors are the rooms on the longest chain of imports: imports under `TYPE_CHECKING` add no
floor, and a circle of other imports is a single floor. The package's own `__init__.py`, its public
face, is not counted as a room; the numbers with it are given as well.

Trace. One forward of 512 tokens on the CPU without gradients, after a first one that warms caches.
A change is a Python call in the library whose file differs from that of the call before; returns
do not count. Python 3.12 no longer calls comprehensions: compare numbers of one Python version.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import resolve_name
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = "longctx_layers"
LIBRARY = {PACKAGE: PACKAGE, f"{PACKAGE}.kernels": "kernels"}  # import name -> folder
APPLICATION = re.compile(
    rf"{PACKAGE}\.(cli|data|training|reports|evals\.(program|synthetic))\b|.*__main__$"
)
TRACED: dict[str, tuple[str, dict[str, int]]] = {  # label -> name in the registry, options
    "DPASSM": ("dpassm", {"window_size": 128}),
    "CausalAttention": ("vanilla", {}),
    "window": ("window", {"window_size": 128}),
    "BLADE": ("blade", {"chunk_size": 128}),
}
PRODUCT = (PACKAGE, "kernels", "examples", "benchmarks", "gpu")
AREAS = (*PRODUCT, "tests", "docs")
Arrows = set[tuple[str, str, bool]]  # importer, imported, whether it runs (not only for types)


def modules(root: Path) -> dict[str, Path]:
    """The library's files by import name; a package's `__init__.py` has the package's name."""
    files = {}
    for name, folder in LIBRARY.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            files[".".join([name, *parts]).removesuffix(".__init__")] = path
    return files


def imports(node: ast.AST, package: str, runs: bool = True) -> Iterator[tuple[str, bool]]:
    """Full names that the code of a package imports, and whether the import runs."""
    children = dict.fromkeys(ast.iter_child_nodes(node), runs)
    match node:
        case ast.Import(names=names):
            yield from ((alias.name, runs) for alias in names)
        case ast.ImportFrom(module=base, names=names, level=dots):
            origin = resolve_name("." * dots + (base or ""), package)
            yield from ((f"{origin}.{alias.name}", runs) for alias in names)
        case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            children |= dict.fromkeys(node.body, False)
    for child, child_runs in children.items():
        yield from imports(child, package, child_runs)


def file_arrows(files: dict[str, Path]) -> Arrows:
    """Who imports whom among the files, which are named by module."""
    arrows = set()
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for name, runs in imports(ast.parse(path.read_text(encoding="utf-8")), package):
            while name and name not in files:  # a name in a module: the module
                name = name.rpartition(".")[0]
            if name and name != module:
                arrows.add((module, name, runs))
    return arrows


def room(module: str) -> str:
    return ".".join(module.split(".")[1:2]) or PACKAGE


def groups(nodes: set[str], arrows: Arrows) -> list[list[str]]:
    """Sets of nodes that reach one another; a node in no circle is a set of its own."""
    reach = {node: {node} for node in nodes}
    for _ in nodes:  # no path is longer
        for importer, imported, _ in arrows:
            reach[importer] |= reach[imported]
    mutual = {frozenset(b for b in reach[a] if a in reach[b]) for a in nodes}
    return sorted(sorted(group) for group in mutual)


def floors(nodes: set[str], arrows: Arrows) -> list[list[str]]:
    """The nodes by the length of the longest chain of running imports below them, ground first."""
    running = {arrow for arrow in arrows if arrow[2]}
    home = {node: group for group in groups(nodes, running) for node in group}

    def height(group: list[str]) -> int:
        below = [home[b] for a, b, _ in running if a in group and b not in group]
        return 1 + max(map(height, below), default=0)

    heights = {node: height(home[node]) for node in sorted(nodes)}
    return [[n for n in heights if heights[n] == h] for h in sorted(set(heights.values()))]


def graph(root: Path) -> dict[str, Any]:
    files = modules(root)
    library = {name for name in files if not APPLICATION.match(name)}
    arrows = {arrow for arrow in file_arrows(files) if library.issuperset(arrow[:2])}
    between_rooms = {(room(a), room(b), runs) for a, b, runs in arrows if room(a) != room(b)}
    rooms = {room(name) for name in library}
    result: dict[str, Any] = {}
    for suffix, nodes in ((" with `__init__`", rooms), ("", rooms - {PACKAGE})):
        between = {arrow for arrow in between_rooms if nodes.issuperset(arrow[:2])}
        result[f"rooms{suffix}"] = len(nodes)
        result[f"floors{suffix}"] = len(floors(nodes, between))
        result[f"arrows{suffix}"] = len({arrow[:2] for arrow in between})
    result["floor by floor"] = [", ".join(floor) for floor in floors(nodes, between)]
    result["circles between rooms"] = [g for g in groups(nodes, between) if len(g) > 1]
    result["circles between files"] = [g for g in groups(library, arrows) if len(g) > 1]
    return result


def count_calls(root: Path, call: Callable[..., object], *args: object) -> dict[str, int]:
    """Python calls to the library's files during `call(*args)`, and how often the file changes."""
    folders = tuple(f"{root / folder}{os.sep}" for folder in LIBRARY.values())
    files = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folders):
            files.append(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        call(*args)
    finally:
        sys.setprofile(None)
    changes = sum(a != b for a, b in pairwise(files))
    return {"changes": changes, "files": len(set(files)), "calls": len(files)}


def trace(root: Path) -> dict[str, dict[str, int]]:
    """Needs a process that has not imported the library yet, since it takes that of `root`."""
    sys.path.insert(0, str(root))
    os.environ.pop("LONGCTX_BACKEND", None)
    torch = import_module("torch")
    library = import_module(PACKAGE)
    library.__path__.append(str(root))  # there `kernels/` is found as a part of the library
    torch.set_num_threads(1)
    prompt, token = torch.randn(1, 513, 256).split([512, 1], dim=1)
    result = {}
    with torch.no_grad():
        for label, (layer_name, options) in TRACED.items():
            layer = library.build_layer(layer_name, d_model=256, n_heads=4, **options).eval()
            _, state = layer(prompt)
            layer(token, state)
            result[f"trace, {label}"] = count_calls(root, layer, prompt)
            result[f"trace, {label}, one token"] = count_calls(root, layer, token, state)
    return result


def sources(root: Path, *areas: str, suffix: str = ".py") -> dict[str, str]:
    """The text of every file of these top-level folders."""
    paths = [path for area in areas for path in sorted((root / area).rglob(f"*{suffix}"))]
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def in_library(path: str) -> bool:
    module = path.removesuffix(".py").replace("/", ".")
    return module.startswith(f"{PACKAGE}.") and not APPLICATION.match(module)


def checked(root: Path) -> list[Path]:
    """Files and folders that mypy checks by its settings `packages` and `files`."""
    mypy = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    files = mypy.get("files", [])
    patterns = files.split(",") if isinstance(files, str) else list(files)
    patterns += [name.replace(".", "/") for name in mypy.get("packages", [])]
    return [path for pattern in patterns for path in root.glob(pattern.strip())]


def lines(root: Path) -> dict[str, Any]:
    totals = {
        f"lines, {area} {suffix}": "".join(sources(root, area, suffix=suffix).values()).count("\n")
        for area in AREAS
        for suffix in (".py", ".md")
    }
    product = {path: text.count("\n") for path, text in sources(root, *PRODUCT).items()}
    longest = sorted(product, key=lambda path: -product[path])
    typed = sum(n for p, n in product.items() if any(map((root / p).is_relative_to, checked(root))))
    return {
        "lines in all": sum(totals.values()),
        **{name: n for name, n in totals.items() if n},
        "lines, library without programs": sum(n for p, n in product.items() if in_library(p)),
        "lines under mypy, of all .py but tests": f"{typed / sum(product.values()):.1%}",
        "files over 300 lines, but tests": sum(n > 300 for n in product.values()),
        "longest files, but tests": [f"{path} {product[path]}" for path in longest[:5]],
    }


def kind(node: ast.expr) -> type:
    return type(node.value if isinstance(node, ast.Constant) else node)


def tuple_assignments(text: str) -> list[bool]:
    """For each assignment of several values to several names: whether either side mixes kinds."""
    pairs = [
        (node.targets[0].elts, node.value.elts)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        if isinstance(node.targets[0], ast.Tuple)
    ]
    return [any(len(set(map(kind, side))) > 1 for side in pair) for pair in pairs]


def is_assertion(node: ast.AST) -> bool:
    """`assert`, `pytest.raises` or the call of a function named `assert_...`."""
    name = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
    return isinstance(node, ast.Assert) or name == "raises" or name.startswith("assert_")


def habits(root: Path) -> dict[str, int]:
    files = sources(root, *PRODUCT)
    product = "\n".join(files.values())
    library = "\n".join(text for path, text in files.items() if in_library(path))
    tests = "\n".join(sources(root, "tests").values())
    result = {
        "assertions in tests": sum(map(is_assertion, ast.walk(ast.parse(tests)))),
        "`fmt: skip`": len(re.findall(r"# fmt: skip$", f"{product}\n{tests}", re.MULTILINE)),
    }
    for name, text in (("library", library), ("all but tests", product)):
        mixed = tuple_assignments(text)
        result[f"`Any`, {name}"] = len(re.findall(r"\bAny\b", text))
        result[f"tuple assignments, {name}"] = len(mixed)
        result[f"tuple assignments of unequal kind, {name}"] = sum(mixed)
    return result


def cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{n} {name}" for name, n in value.items())
    if isinstance(value, list):
        items = [" <-> ".join(item) if isinstance(item, list) else str(item) for item in value]
        return "<br>".join([str(len(items)), *items])
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(columns: dict[str, dict[str, Any]]) -> str:
    rows = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for key in dict.fromkeys(key for column in columns.values() for key in column):
        cells = [cell(column.get(key, "")) for column in columns.values()]
        rows.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--before", type=Path, help="JSON of an earlier run, to compare with")
    parser.add_argument("--trace_only", action="store_true", help="print the trace's JSON only")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    if not (root / PACKAGE / "__init__.py").is_file():
        parser.error(f"--root: expected a checkout with {PACKAGE}/__init__.py, got {root}")
    if args.trace_only:
        print(json.dumps(trace(root)))
        return
    command = [sys.executable, __file__, "--trace_only", "--root", root]
    calls = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    now = graph(root) | calls | lines(root) | habits(root)
    if args.json:
        args.json.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    before = {"before": json.loads(args.before.read_text("utf-8"))} if args.before else {}
    print(table({**before, "now": now}))


if __name__ == "__main__":
    main()
