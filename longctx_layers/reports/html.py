"""A report as one HTML file that loads nothing from elsewhere and runs no scripts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2

from longctx_layers.reports.content import Part, Picture, Sample, Section, Table, Warned, visible

TEMPLATE = "page.html"
KINDS = {Table: "table", Picture: "picture", Sample: "sample", Warned: "warning"}


def render(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The page as HTML; everything that goes into the template is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) else value,
    )
    environment.filters["kind"] = _kind
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    page: str = environment.get_template(TEMPLATE).render(
        title=title, introduction=introduction, sections=sections
    )
    return page


def _kind(part: Part) -> str:
    return KINDS.get(type(part), "paragraph")
