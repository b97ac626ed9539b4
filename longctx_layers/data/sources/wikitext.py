"""Wikitext: the dataset's lines are put together into articles again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from longctx_layers.data.sources.base import Request, Source
from longctx_layers.data.sources.hub_datasets import open_hub_dataset

HUB_NAME = "Salesforce/wikitext"
CONFIGS = ("wikitext-2-raw-v1", "wikitext-2-v1", "wikitext-103-raw-v1", "wikitext-103-v1")
TITLE = re.compile(r" = (?!=).+(?<!=) = \n?")


def check(config: str | None) -> None:
    """See `Reader`; the config is one of `CONFIGS`."""
    if config is not None and config not in CONFIGS:
        raise ValueError(f"dataset_config: wikitext has {', '.join(CONFIGS)}, got {config!r}")


def open_source(request: Request) -> Source:
    """See `Reader`; by default the small one of raw text."""
    name = request.name
    if name == "wikitext" and not Path(name).is_dir():
        name = HUB_NAME
    request = request._replace(name=name, config=request.config or CONFIGS[0])
    return open_hub_dataset(request, articles)


def articles(lines: Iterable[dict[str, str]]) -> Iterator[str]:
    """Articles with their titles; together they are exactly the text of all lines.

    A title is ` = Title = ` between two blank lines: without blank lines it is a line of a text.

    >>> texts = ["", " = A = \\n", "", " of a \\n", "", " = B = \\n", "", " of b \\n"]
    >>> list(articles({"text": text} for text in texts))
    [' = A = \\n of a \\n', ' = B = \\n of b \\n']
    """
    article: list[str] = []
    after_blank = True
    title: str | None = None  # possibly: the next line decides
    for example in lines:
        line = example["text"]
        if title is not None:
            if not line.strip() and "".join(article).strip():
                yield "".join(article)
                article = []
            article.append(title)
            title = None
        if after_blank and TITLE.fullmatch(line):
            title = line
        else:
            article.append(line)
        after_blank = not line.strip()
    if title is not None:
        article.append(title)
    if article:
        yield "".join(article)
