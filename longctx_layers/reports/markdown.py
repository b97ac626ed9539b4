"""A report as Markdown, with its pictures as separate files."""

from __future__ import annotations

import re
from collections.abc import Sequence

from longctx_layers.reports.content import Part, Picture, Sample, Section, Table, Warned, visible

PICTURES = "pictures"  # the folder


def render(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The page as Markdown."""
    blocks = [f"# {escaped(title)}", escaped(introduction)]
    for section in sections:
        blocks += [f"## {escaped(section.title)}", *map(_part, section.parts)]
    return "\n\n".join(blocks) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """A table; cells may contain markup.

    Args:
        header: the names of the columns.
        rows: as many cells each as the header has.
        words: whether all columns are aligned to the left, and not only the first.

    >>> print(table(["model", "loss"], [["window", "1.7"]]))
    | model | loss |
    | --- | ---: |
    | window | 1.7 |
    """
    rule = ["---", *["---" if words else "---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def escaped(text: str) -> str:
    """Text that Markdown shows literally: on one line, without markup, links or HTML.

    >>> print(escaped("*not bold*"))
    \\*not bold\\*
    """
    line = " ".join(visible(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    line = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line)
    line = re.sub(r"^([#>+=-])", r"\\\1", line)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def fenced(text: str) -> str:
    """Text in a code block, with a fence that is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{visible(text)}\n{fence}"


def _part(part: Part) -> str:
    if isinstance(part, Table):
        header = [escaped(cell) for cell in part.header]
        rows = [[escaped(cell) for cell in row] for row in part.rows]
        return table(header, rows, words=part.words)
    if isinstance(part, Picture):
        return f"![{escaped(part.shows)}]({PICTURES}/{part.name}.png)"
    if isinstance(part, Sample):
        return "\n\n".join(
            ["Prompt:", fenced(part.prompt), "Continuation:", fenced(part.continuation)]
        )
    if isinstance(part, Warned):
        return f"> **{escaped(part)}**"
    return escaped(part)
