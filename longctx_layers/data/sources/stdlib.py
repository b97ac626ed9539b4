"""The source files of Python's standard library: real text that is on every machine."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from longctx_layers.data.sources import local
from longctx_layers.data.sources.base import Request, Source, from_generator

# Folders of the standard library that are left out: tests, and what is not of the library itself.
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def root() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files() -> list[Path]:
    """The library's Python files, sorted.

    >>> any(path.name == "argparse.py" for path in source_files())
    True
    """
    return [
        path
        for path in sorted(root().rglob("*.py"))
        if not SKIPPED & set(path.relative_to(root()).parts)
    ]


def check(config: str | None) -> None:
    """See `Reader`; there are no configurations."""
    if config is not None:
        raise ValueError(f"dataset_config: stdlib has none, got {config!r}; leave it out")


def open_source(request: Request) -> Source:
    """See `Reader`; each file is a document, a long one several."""
    paths = source_files()
    documents = from_generator(local.documents, paths, lone=False)
    return Source(documents, None, local.fingerprint(paths, root()))
