"""The data package by itself: what it imports, its face, and sources of other people's."""

import ast
import hashlib
from pathlib import Path

import pytest

import longctx_layers.data
from longctx_layers.data import LongContextData, byte_text, open_source, register_source, texts
from longctx_layers.data.keys import content_key
from longctx_layers.data.sources import SOURCES, Source, from_generator, stdlib, synthetic

FOLDER = Path(longctx_layers.data.__file__).parent
ALLOWED = ("longctx_layers.data", "longctx_layers.files", "longctx_layers.command_line")


def imported(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used here"
            yield node.module


def foreign(source):
    """Modules of the library that a source imports from outside of the data package."""
    names = [name for name in imported(source) if name.split(".")[0] == "longctx_layers"]
    return [n for n in names if not any(n == a or n.startswith(a + ".") for a in ALLOWED)]


@pytest.mark.parametrize("path", FOLDER.rglob("*.py"), ids=lambda path: path.name)
def test_data_imports_nothing_else_of_the_library(path):
    assert foreign(path.read_text()) == []


def test_planted_import_is_found():
    code = "def f():\n    from longctx_layers.lm.model import IGNORED_LABEL\nimport longctx_layers"
    assert foreign(code) == ["longctx_layers", "longctx_layers.lm.model"]


class Poems:
    """A source of somebody else's."""

    def check(self, config):
        if config != "short":
            raise ValueError(f"dataset_config: poems has short, got {config!r}")

    def open_source(self, request):
        return Source(from_generator(self.poems, count=20), None, f"poems {request.config}")

    def poems(self, count):
        for number in range(count):
            yield f"poem number {number} is short\n"


def test_registered_source(tmp_path, monkeypatch):
    monkeypatch.setattr("longctx_layers.data.sources.SOURCES", dict(SOURCES))
    register_source("poems", Poems())
    with pytest.raises(ValueError, match="poems has short, got 'long'"):
        LongContextData("poems", "long")
    with pytest.raises(ValueError, match="got 'poms'; did you mean poems"):
        LongContextData("poms")
    data = LongContextData("poems", "short", seq_len=32, cache_dir=str(tmp_path))
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    assert "is short" in data.tokenizer.decode(batch["ids"][0])
    with pytest.raises(ValueError, match="the name 'poems' is taken"):
        register_source("poems", Poems())


def test_synthetic_documents_are_those_that_checkpoints_name():
    """Their name is in checkpoints: another language needs another name."""
    content = hashlib.blake2b(digest_size=16)
    for document in synthetic.documents(50):
        content.update(document.encode())
    assert content.hexdigest() == "a8fef1c3d1d302f0652bd65e6122fcf9"
    assert hashlib.blake2b(synthetic.LANGUAGE.encode(), digest_size=4).hexdigest() == "0b0f81d3"
    assert open_source("synthetic", "30").fingerprint == content_key(
        "synthetic", "30", synthetic.LANGUAGE
    )


def test_bytes_of_the_standard_library_are_those_of_the_source(tmp_path, monkeypatch):
    for folder in (".", "package", "package/test", "site-packages/other"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for number in range(6):
            content = f"# {folder} {number}\n" + "x = 1\n" * (number + 20)
            (tmp_path / folder / f"module_{number}.py").write_text(content)
    (tmp_path / "not_source.txt").write_text("x" * 1000)
    monkeypatch.setattr(stdlib, "root", lambda: tmp_path)
    contents = byte_text.documents(None, 20)
    assert len(contents) == 12
    assert contents == [path.read_bytes() for path in stdlib.source_files()]
    documents = list(texts(open_source("stdlib", None).training))
    assert [document.encode() for document in documents] == contents
    with pytest.raises(ValueError, match="at least 10 documents of 999 bytes .* found 1;"):
        byte_text.documents(tmp_path, 999)
