"""The examples in docs/huggingface.md run, one after another."""

import re
import sys
import types
from pathlib import Path

import pytest
import transformers

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"


def test_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="the page's Trainer needs accelerate")
    pytest.importorskip("peft", reason="the page's adapters need peft")
    transformers.logging.set_verbosity_error()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 7
    page = types.ModuleType("page")
    monkeypatch.setitem(
        sys.modules, "page", page
    )  # early transformers 5 looks up the module of a class
    names = vars(page)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["cu_seqlens"].tolist() == [0, 3, 5, 7]
    assert names["longest"] == 3
