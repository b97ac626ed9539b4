"""docs/integration.md: every block of Python runs on its own, and the link targets exist."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs/integration.md"


BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
# The names that each block defines, with their shapes.
LEFT = [
    {"y": (2, 500, 64), "y_next": (2, 1, 64)},
    {"y": (2, 500, 64)},
    {"ids": (1, 252), "text": (1, 42)},
    {"before": (2, 64, 256), "out": (2, 120)},
    {},
]


@pytest.mark.parametrize("number", range(len(LEFT)))
def test_every_block_runs(number, tmp_path, monkeypatch):
    assert len(BLOCKS) == len(LEFT)
    if "transformers" in BLOCKS[number]:
        pytest.importorskip("transformers", reason="needs the extra `hf`")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(BLOCKS[number], names)
    assert {name: tuple(names[name].shape) for name in LEFT[number]} == LEFT[number]


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE.read_text())
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
