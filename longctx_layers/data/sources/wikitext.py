"""Wikitext comes in lines; here its articles are put together again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

HUB_NAME = "Salesforce/wikitext"
CONFIGS = ("wikitext-2-raw-v1", "wikitext-2-v1", "wikitext-103-raw-v1", "wikitext-103-v1")
TITLE = re.compile(r" = (?!=).+(?<!=) = \n?")


def articles(lines: Iterable[dict[str, str]]) -> Iterator[str]:
    """Articles with their titles; together they are exactly the text of all lines.

    A title is ` = Title = ` between two blank lines: without blank lines it is a line of a text.
    """
    article: list[str] = []
    blank = True  # the line before
    title: str | None = None  # maybe: known with the next line
    for example in lines:
        line = example["text"]
        if title is not None:
            if not line.strip() and "".join(article).strip():
                yield "".join(article)
                article = []
            article.append(title)
            title = None
        if blank and TITLE.fullmatch(line):
            title = line
        else:
            article.append(line)
        blank = not line.strip()
    if title is not None:
        article.append(title)
    if article:
        yield "".join(article)
