"""Where documents come from: all of their text, their names' errors, and no network."""

import json
import socket
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longctx_layers.data import hub, sources
from longctx_layers.data.sources import local, open_source, synthetic, texts, wikitext

SPLITS = ("train", "validation", "test")
LINES = [
    *("", " = First title = \n", "", " Text of the first . \n", " = not a title = \n", " more \n"),
    *("", " = = A section = = \n", "", " with text \n", "", " = 1 + 1 = 2 = \n", "", " second \n"),
    *("", " = Last title = \n", ""),
]
ARTICLES = [
    " = First title = \n Text of the first . \n = not a title = \n more \n"
    " = = A section = = \n with text \n",
    " = 1 + 1 = 2 = \n second \n",
    " = Last title = \n",
]


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """A working directory and caches of the test's own, and no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(hub, "reachable", lambda: False)


def parquet(path: Path, documents: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: documents}), path)


def wikitext_folder(folder: Path) -> None:
    """As on the hub: parquet files, and a README that says which is what."""
    lines = ["---", "configs:"]
    for config in wikitext.CONFIGS:
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in SPLITS:
            name = f"{config}/{split}.parquet"
            lines += [f"  - split: {split}", f"    path: {name}"]
            own = [line.replace("First", f"{config} {split}") for line in LINES]
            parquet(folder / name, own if split == "train" else own[:4])
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.mark.parametrize("streaming", [False, True])
def test_wikitext_in_all_configurations(tmp_path, streaming):
    wikitext_folder(tmp_path / "wikitext")
    fingerprints = set()
    for config in wikitext.CONFIGS:
        source = open_source("wikitext", config, streaming=streaming)
        expected = [article.replace("First", f"{config} train") for article in ARTICLES]
        assert list(texts(source.training)) == expected
        assert list(texts(source.training)) == expected  # it can be read again
        (held_out,) = texts(source.validation)
        assert held_out == f" = {config} validation title = \n Text of the first . \n"
        fingerprints.add(source.fingerprint)
    assert len(fingerprints) == 4


def test_wikitext_has_a_default_and_the_hubs_name(tmp_path, monkeypatch):
    wikitext_folder(tmp_path / "wikitext")
    assert "wikitext-2-raw-v1" in next(texts(open_source("wikitext", None).training))
    asked = []
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(
        "datasets.load_dataset_builder", lambda *place: asked.append(place) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        open_source("wikitext", "wikitext-103-v1")
    assert asked == [("Salesforce/wikitext", "wikitext-103-v1")]


def test_articles_are_all_of_the_lines():
    assert list(wikitext.articles({"text": line} for line in LINES)) == ARTICLES
    for end in range(len(LINES) + 1):  # wherever they stop
        found = wikitext.articles({"text": line} for line in LINES[:end])
        assert "".join(found) == "".join(LINES[:end])


def test_any_dataset_by_name(tmp_path):
    parquet(tmp_path / "somebody/data/train.parquet", ["one", "two"], column="content")
    source = open_source("somebody/data", None)
    assert list(texts(source.training)) == ["one", "two"]
    assert source.validation is None
    with pytest.raises(ValueError, match=r"text_column: .*\(content\), got 'body'"):
        open_source("somebody/data", None, "body")


# ---- Local files


def local_texts(path: Path) -> list[str]:
    return list(texts(open_source("local", str(path)).training))


def test_text_files_whole(tmp_path):
    contents = {"a.txt": "one\r\ntwo\n\n", "b/c.md": "three", "b/.hidden": "no"}
    for name, content in contents.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
    assert local_texts(tmp_path / "data") == ["one\r\ntwo\n\n", "three"]


def test_a_lone_text_file_is_cut_at_ends_of_lines(tmp_path):
    content = "".join(f"line {number} of a long text, é\n" for number in range(3000))
    (tmp_path / "book.txt").write_text(content)
    documents = local_texts(tmp_path / "book.txt")
    assert "".join(documents) == content
    assert len(documents) > 10
    assert all(document.endswith("\n") for document in documents)


def test_json_lines_and_parquet(tmp_path):
    rows = ["first\nwith lines", "second", "third"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    parquet(tmp_path / "y.parquet", rows)
    assert local_texts(tmp_path / "x.jsonl") == rows
    assert local_texts(tmp_path / "y.parquet") == rows
    parquet(tmp_path / "folder/1.parquet", rows[:1])
    parquet(tmp_path / "folder/2.parquet", rows[1:])
    (tmp_path / "folder/README.md").write_text("about")
    with pytest.warns(UserWarning, match=r"text next to the data is not read \(README.md\)"):
        assert local_texts(tmp_path / "folder") == rows
    (tmp_path / "folder/3.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="found both json and parquet"):
        local_texts(tmp_path / "folder")


def test_local_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected text, JSON, CSV, .* found none"):
        local_texts(tmp_path / "empty")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"picture.png:1: expected text in UTF-8"):
        local_texts(tmp_path / "picture.png")


def test_fingerprint_is_of_the_content(tmp_path):
    path = tmp_path / "a.txt"
    prints = []
    for content in ("one", "two", "one"):
        path.write_text(content)
        prints.append(local.fingerprint([path], tmp_path))
    assert prints[0] == prints[2] != prints[1]


# ---- Those that every machine has


def test_stdlib_is_real_text():
    source = open_source("stdlib", None)
    documents = list(texts(source.training))
    assert len(documents) > 300
    assert Path(json.__file__).read_text() in documents


def test_synthetic_documents():
    first, again = list(synthetic.documents(6)), list(synthetic.documents(20))
    assert first == again[:6]
    assert first != list(synthetic.documents(6, seed=1))
    assert list(texts(open_source("synthetic", "6").training)) == first
    assert all(synthetic.SHORTEST <= len(d) < synthetic.LONGEST + 200 for d in again)
    asked = 0
    for document in again:
        facts = {}
        for line in document.splitlines():
            kind, *rest = line.split(" ")
            if kind == "key":
                facts[rest[0]] = rest[1]
            elif kind == "?":
                assert facts[rest[0]] == rest[1]  # the answer was stated
                asked += 1
    assert asked > 20


# ---- Names


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("wikitxt", None, "did you mean wikitext"),
        ("sythetic", None, "did you mean synthetic"),
        ("", None, "expected wikitext, synthetic, local, stdlib or the name"),
        ("wikitext", "wikitext-3", "wikitext-2-raw-v1, .*wikitext-103-v1, got 'wikitext-3'"),
        ("synthetic", "many", "expected a number of documents above 1"),
        ("stdlib", "x", "stdlib has none"),
        ("local", None, "path/to/data"),
        ("local", "nowhere", "got 'nowhere'"),
    ],
)
def test_impossible_names(name, config, message):
    with pytest.raises(ValueError, match=message):
        sources.check(name, config)


def test_possible_names(tmp_path):
    for name, config in [("wikitext", None), ("openai/gsm8k", "main"), ("local", str(tmp_path))]:
        sources.check(name, config)


# ---- Without the network


def test_offline_names_the_choices():
    with pytest.raises(ConnectionError, match=r"'Salesforce/wikitext'.*synthetic, stdlib, or loc"):
        open_source("wikitext", None)


def test_an_unanswering_hub_is_given_up_at_once(monkeypatch):
    monkeypatch.undo()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}"
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
        assert not hub.reachable()


def test_what_the_cache_holds_is_used_offline():
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    assert hub.from_hub(lambda: constants.is_offline_mode(), "x", "y") is True
    assert before == constants.HF_HUB_OFFLINE
