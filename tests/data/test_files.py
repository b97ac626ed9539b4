"""Files as people have them: read whatever wrote them, or refused by their names."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import sys
import tarfile
import zipfile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longctx_layers.data.errors import DataError
from longctx_layers.data.files import JSON_HEAD
from longctx_layers.data.module import LongContextData
from longctx_layers.data.sources import from_generator, open_source, texts
from longctx_layers.data.sources.records import LOOKED_AT
from longctx_layers.data.split import is_held_out

NUL = "\0" if sys.version_info >= (3, 11) else ""  # which Python's csv refused before
TEXTS = ['first\nwith, "lines"', None, "", "third \N{EURO SIGN} \U0001f600", f"x;y\tz\r\nw{NUL}"]
EXPECTED = [text for text in TEXTS if text]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
TABLE = pd.DataFrame({"id": range(len(TEXTS)), "text": TEXTS})


def read(path, column=None):
    return list(texts(open_source("local", str(path), column).training))


def arrow(path, column, stream=False):
    table = pa.table({"text": column})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as file:
        file.write_table(table)


STRINGS = pa.array(TEXTS, pa.string())
READ = {
    "a.jsonl": lambda p: p.write_bytes(LINES),
    "a.NDJSON": lambda p: p.write_bytes(LINES.replace(b"\n", b"\r\n\r\n")),
    "bom.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + LINES),
    "utf16.jsonl": lambda p: p.write_bytes(LINES.decode().encode("utf-16")),
    "a.JSONL.gz": lambda p: p.write_bytes(gzip.compress(LINES)),
    "a.jsonl.bz2": lambda p: p.write_bytes(bz2.compress(LINES)),
    "a.jsonl.xz": lambda p: p.write_bytes(lzma.compress(LINES)),
    "a.json.zst": lambda p: pa.output_stream(p, compression="zstd").write(LINES),
    "gzip_without_suffix.jsonl": lambda p: p.write_bytes(gzip.compress(LINES)),
    "pandas.json": lambda p: TABLE.to_json(p),
    "records.json": lambda p: TABLE.to_json(p, orient="records"),
    "indented.json": lambda p: TABLE.to_json(p, orient="records", indent=1),
    "columns.json": lambda p: p.write_text(json.dumps({"text": TEXTS})),
    "pandas.csv": lambda p: TABLE.to_csv(p),
    "utf16.csv": lambda p: TABLE.to_csv(p, encoding="utf-16"),
    "semicolons.CSV.gz": lambda p: TABLE.to_csv(p, sep=";", encoding="utf-8-sig"),
    "pandas.tsv": lambda p: TABLE.to_csv(p, sep="\t"),
    "pandas.parquet": lambda p: TABLE.to_parquet(p),
    "categories.PQ": lambda p: TABLE.astype({"text": "category"}).to_parquet(p),
    "parquet_without_suffix": lambda p: TABLE.to_parquet(p),
    "pandas.feather": lambda p: TABLE.to_feather(p),
    **{
        f"{name}.arrow": lambda p, kind=kind: arrow(p, STRINGS.cast(kind))
        for name, kind in {
            "string": pa.string(),
            "large_string": pa.large_string(),
            "string_view": pa.string_view(),
            "binary": pa.binary(),
            "dictionary": pa.dictionary(pa.int32(), pa.large_string()),
        }.items()
    },
    "runs.arrow": lambda p: arrow(p, pa.compute.run_end_encode(STRINGS)),
    "stream.arrow": lambda p: arrow(p, STRINGS, stream=True),
}


@pytest.mark.parametrize("name", READ)
def test_read(name, tmp_path):
    READ[name](tmp_path / name)
    assert read(tmp_path / name) == EXPECTED


def test_a_saved_dataset_of_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    given = Dataset.from_dict({"text": TEXTS})
    given.save_to_disk(tmp_path / "one", num_shards=2)
    arrow(tmp_path / "one/cache-1.arrow", STRINGS)  # as `map` leaves it behind
    assert read(tmp_path / "one") == EXPECTED
    parts = {"train": given, "test": given, "validation": given.select([0])}
    DatasetDict(parts).save_to_disk(tmp_path / "parts")
    with pytest.warns(UserWarning, match="not read is test"):
        source = open_source("local", str(tmp_path / "parts"))
    assert list(texts(source.training)) == EXPECTED
    assert list(texts(source.validation)) == EXPECTED[:1]


REFUSED = {
    "a.avro": (b"Obj\x01", "got Avro; unpack or convert it"),
    "a.pkl": (b"\x80\x04\x95", "got a pickle"),
    "a.orc": (b"ORC", "got ORC"),
    "a.db": (b"SQLite format 3\0", "got a SQLite database"),
    "a.parquet": (b"text", "expected parquet by its name, got something else"),
    "cut.parquet": (b"PAR1\x15\x04", "expected a parquet file, got one that cannot be read"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-9], "expected a whole file"),
    "json.txt": (LINES, "expected text, got JSON under the suffix .txt"),
    "json": (b'[\n {"text": "a"}]', "got JSON under the suffix .none."),
    "a.txt": (b"one\ntwo \xff\n", r"a.txt:2: expected text in UTF-8"),
    "a.jsonl": (b'{"text": "a"}\n{"text": "\xff"}', r"a.jsonl:2: expected text in UTF-8"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "cut.jsonl:2: expected a JSON object"),
    "first.jsonl": (b'{"text": "a\n{"text": "b"}', "first.jsonl:1: expected a JSON object"),
    "cut.json": (b'[{"text": "a"},\n{"text": "b"', "cut.json:2: expected JSON"),
    "lines.jsonl": (b'{"text": "a"}\n"b"', "lines.jsonl:2: .* got string"),
    "split.json": (TABLE.to_json(orient="split").encode(), "data is a list"),
    "values.json": (TABLE.to_json(orient="values").encode(), "record 1: .* got a list"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 5}', "number.jsonl:2: .* got the int 5"),
    "chat.jsonl": (b'{"text": [{"role": "user"}], "id": "x"}', "got 'text' in .* is a list"),
    "messages.jsonl": (b'{"messages": [], "id": "x"}', "got None in .* messages is a list"),
    "two.jsonl": (b'{"a": "x", "b": "y"}', r"\(a, b\), got None"),
    "fields.csv": (b"text,a\nx,1\ny\n", "fields.csv:3: expected 2 fields"),
    "quotes.csv": (b'text,a\n"x,1\n', "quotes.csv:2: expected CSV"),
    "late.jsonl": (
        b'{"title": "a"}\n' * LOOKED_AT + b'{"title": "a", "text": "b"}',
        rf"late.jsonl:{LOOKED_AT + 1}: .* got string under 'text'; name the column to read",
    ),
    "late_list.jsonl": (
        b'{"body": "a"}\n' * LOOKED_AT + b'{"messages": []}',
        rf"late_list.jsonl:{LOOKED_AT + 1}: .* got a list under 'messages'",
    ),
    "message.json": (b'{"text": {"role": "user", "content": "hi"}}', "text is an object"),
    "index.json": (TABLE[:1].to_json(orient="index").encode(), "0 is an object"),
    "digits.jsonl": (
        b'{"text": "a"}\n{"id": ' + b"9" * 5000 + b"}",
        "digits.jsonl:2: expected a J",
    ),
    "digits.json": (b'{"id": ' + b"9" * 5000 + b"}", r"digits.json:1: expected JSON \(Exceeds"),
    "utf16.txt": ("No mark.\nEnd".encode("utf-16-le"), "UTF-16 or UTF-32 with a byte-order mark"),
    "utf32.csv": ("text\nNo mark\n".encode("utf-32-be"), "UTF-16 or UTF-32 with a byte-order mark"),
    "one_line.csv": (b"A sentence of words.\n", "file without a header"),
    "headless.csv": (b"A sentence of words.\nAnother\n", "file without a header"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, tmp_path):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert name in str(error.value)


JSON_AS_TEXT = {
    "arrays in an array": '[[0, "a"],\n [1, "b"]]',
    "strings in an array": '["a", "b"]',
    "strings in lines": '"a"\n\n"b"\n',
    "an empty record": '{}\n{"text": "a"}\n',
    "a null before records": 'null\n{"text": "a"}\n{"te',
    "blank lines": "\r\n" * JSON_HEAD + '{"text": "a"}',
    "two byte-order marks": '\ufeff\ufeff{"text": "a"}',
    "a long array": json.dumps(["word " * 100] * 200, indent=1),
    "one long string": json.dumps(["word " * JSON_HEAD]),
    "long lines of strings": f'"{"word " * 100}"\n' * 200,
    "many digits": f"[{'9' * 5000}]",
    "deep": "[" * JSON_HEAD,
}
TEXT = {
    "numbers": "1\n2\n",
    "digits": "3" * 5000,
    "a quoted sentence": '"Hello."\n',
    "dialogue": '"Hello."\n"Yes?"\nHe nodded.\n',
    "Markdown": "[1]\n[2]: a note\n\n[a link](b)\n",
    "a book": "[Illustration]\n\n" + "A sentence.\n" * 9000,
    "a docstring": '"""A module."""',
    "a list literal": "[1,\n 2]\nprint(1)\n",
    "a template": "{{ name }}\n{% if x %}",
    "blank": " \n",
}


@pytest.mark.parametrize("name", JSON_AS_TEXT)
def test_json_under_another_suffix_is_refused(name, tmp_path):
    for suffix in ("txt", "log", "txt.gz"):
        content = JSON_AS_TEXT[name].encode()
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(gzip.compress(content) if suffix == "txt.gz" else content)
        with pytest.raises(DataError, match=f"a.{suffix}: expected text, got JSON"):
            read(path)


@pytest.mark.parametrize("name", TEXT)
def test_text_that_begins_like_json_is_read(name, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT[name])
    assert "".join(read(tmp_path / "a.txt")) == TEXT[name]


def test_archives_and_columns_of_no_text_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.jsonl")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.jsonl")
    for name, message in (("a.zip", "got a zip archive"), ("a.tar.gz", "got a tar archive")):
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)
    rows = {"list": [["a"]], "struct": [{"a": "b"}], "int64": [1], "JSON": ["{}"]}
    for name, values in rows.items():
        column = pa.array(values)
        if name == "JSON":
            column = pa.ExtensionArray.from_storage(pa.json_(), column)
        pq.write_table(pa.table({"text": column}), tmp_path / "t.parquet", store_schema=True)
        with pytest.raises(DataError, match=r"t.parquet, where text is "):
            read(tmp_path / "t.parquet")


def test_a_lone_surrogate_and_nan(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud800 b"}\n{"text": "\\ud83d\\ude00"}\n{"text": NaN}\n')
    with pytest.warns(UserWarning, match=r"a.jsonl:1: U\+FFFD is read in place of a lone"):
        assert read(path) == ["a \ufffd b", "\U0001f600"]


def test_text_with_a_byte_order_mark(tmp_path):
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.txt").write_text("grüß\r\n", encoding=encoding, newline="")
        assert read(tmp_path / "a.txt") == ["grüß\r\n"]


# ---- Folders


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_columns_that_differ_and_files_without_rows(suffix, tmp_path):
    one, more = pd.DataFrame({"text": ["a"]}), pd.DataFrame({"meta": ["m"], "text": ["b"]})
    write = {
        "jsonl": lambda t, p: t.to_json(p, orient="records", lines=True),
        "csv": lambda t, p: t.to_csv(p, index=False),
        "parquet": lambda t, p: t.to_parquet(p),
    }[suffix]
    other = one[:0].rename(columns={"text": "body"})
    for name, table in (("0", one[:0]), ("1", one), ("2", more), ("3", one[:0]), ("5", other)):
        write(table, tmp_path / f"{name}.{suffix}")
    assert read(tmp_path) == ["a", "b"]
    write(more.drop(columns="text"), tmp_path / f"4.{suffix}")
    with pytest.raises(DataError, match=f"4.{suffix}: expected a column 'text'.* got meta; rename"):
        read(tmp_path)


def test_a_column_that_is_not_named_is_chosen_by_all_files(tmp_path):
    def folder(name, *tables):
        (tmp_path / name).mkdir()
        for number, table in enumerate(tables):
            path = tmp_path / name / str(number)
            if isinstance(table, str):
                path.with_suffix(".jsonl").write_text(table)
            else:
                pq.write_table(pa.table(table), path.with_suffix(".parquet"))
        return tmp_path / name

    both = '{"title": "b", "text": "c"}'
    with pytest.raises(DataError, match="0.jsonl: expected a column 'text'"):
        read(folder("text later", '{"title": "a"}', both))
    with pytest.raises(DataError, match=r"\(title, body\), got None in .*0.jsonl and 1 more files"):
        read(folder("another later", '{"title": "a"}', both.replace("text", "body")))
    assert read(tmp_path / "another later", "title") == ["a", "b"]
    with pytest.raises(DataError, match=r"\(content, url\), got None .*where content is bytes"):
        read(folder("bytes", {"content": [b"a"], "url": ["b"]}))
    assert read(folder("bytes alone", {"content": [b"a"], "id": [1]})) == ["a"]
    null = pa.nulls(1)
    assert read(folder("null", {"body": null, "id": [1]}, {"body": ["a"], "id": [2]})) == ["a"]
    assert read(folder("null JSON", '{"body": null}', '{"body": "a"}')) == ["a"]
    assert read(folder("no rows", {"title": pa.array([], pa.string())}, {"text": ["a"]})) == ["a"]


def test_names_of_files_that_are_not_in_utf8(tmp_path):
    for name in (b"gr\xfc\xdf.jsonl", b"gr\xfc.jsonl"):
        (tmp_path / os.fsdecode(name)).write_text('{"text": "a"}')
    assert read(tmp_path) == ["a", "a"]


def test_links_and_side_files(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.jsonl").write_text('{"text": "a"}')
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    (folder / "linked").symlink_to(tmp_path / "real")
    (folder / "back").symlink_to(folder)
    assert read(folder) == ["a"]
    (folder / "b.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match="b.jsonl: expected a file, got a link to nothing"):
        read(folder)
    (folder / "_delta_log").mkdir()
    with pytest.raises(DataError, match="got a Delta table"):
        read(folder)


def test_a_folder_with_one_text_file_is_that_file(tmp_path):
    content = "".join(f"line {number} of a long text\n" for number in range(3000))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/book.txt").write_text(content)
    shutil.copy(tmp_path / "folder/book.txt", tmp_path)
    assert read(tmp_path / "folder") == read(tmp_path / "book.txt")
    data = LongContextData("local", str(tmp_path / "folder"), seq_len=64, cache_dir=str(tmp_path))
    data.setup("fit")
    assert len(data.training)
    assert len(data.validation)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:260"])
def test_null_texts_are_no_documents(tokenizer, streaming, tmp_path):
    rows = [f"document {number}" for number in range(20)]
    lines = [json.dumps({"text": text}) for text in (None, *rows, "", None)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"other": 1}']))
    data = LongContextData(
        "local", str(tmp_path / "a.jsonl"), seq_len=1024, batch_size=1, tokenizer=tokenizer,
        streaming=streaming, validation_fraction=0.5, cache_dir=str(tmp_path),
    )  # fmt: skip
    data.setup("fit")
    loaders = (data.train_dataloader(), data.val_dataloader())
    ids = [i for loader in loaders for batch in loader for i in batch["ids"].flatten().tolist()]
    assert ids.count(data.tokenizer.end_of_text) >= len(rows)
    assert sum(len(one["segment_ids"].unique()) - 1 for one in loaders[0]) + len(
        data.validation
    ) == len(rows)


def _numbered(path, count):
    for number in range(count):
        yield f"{path}{number}"


def test_a_resumption_skips_whole_files():
    opened = []

    def documents(path):
        opened.append(path)
        yield from _numbered(path, 3)

    dataset = from_generator(documents, ["a", "b", "c"])
    examples = iter(dataset)
    found = [next(examples)["text"] for _ in range(4)]
    state = dataset.state_dict()
    opened.clear()
    dataset.load_state_dict(state)
    found += [example["text"] for example in dataset]
    assert found == [f"{path}{number}" for path in "abc" for number in range(3)]
    assert opened == ["b", "c"]


# ---- Nothing to train on


def local(tmp_path, rows, **options):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    data = LongContextData(
        "local", str(tmp_path / "a.jsonl"), seq_len=8, cache_dir=str(tmp_path / "cache"), **options
    )
    data.setup("fit")
    return data


def no_tokens(tmp_path):
    """A tokenizer that gives tokens for the word `one` alone."""
    fast = Tokenizer(models.WordLevel({"one": 0, "</s>": 1}))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>").save_pretrained(tmp_path / "t")
    return str(tmp_path / "t")


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_to_train_on(streaming, tmp_path):
    equal = {"streaming": streaming, "validation_fraction": 0.999}
    with pytest.raises(DataError, match="left to train on; pass more than one document"):
        local(tmp_path, ["one", "one"], **equal)
    for rows in ([], [None, ""]):
        with pytest.raises(DataError, match=r"found none|is left to train on|no document of the"):
            local(tmp_path, rows, streaming=streaming)
    blank = {"streaming": streaming, "tokenizer": no_tokens(tmp_path)}
    with pytest.raises(DataError, match="it gives no tokens for any of the training documents"):
        local(tmp_path, [" ", "\n"], validation_fraction=0.0, **blank)
    assert local(tmp_path, [" ", "one"], validation_fraction=0.0, **blank).describe()


def test_nothing_to_validate_on(tmp_path):
    held_out = next(t for t in (" " * n for n in range(1, 99)) if is_held_out(t, 0, 0.1))
    rows = [t for t in ("one " * n for n in range(1, 50)) if not is_held_out(t, 0, 0.1)]
    for streaming in (False, True):
        with pytest.raises(DataError, match="no tokens for any of the validation documents"):
            local(
                tmp_path, [held_out, *rows], validation_fraction=0.1, streaming=streaming,
                tokenizer=no_tokens(tmp_path),
            )  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_a_validation_split_without_text_is_none(streaming, tmp_path):
    from datasets import Dataset, DatasetDict

    rows = {"text": [f"document {number}" for number in range(30)]}
    parts = {
        "train": Dataset.from_dict(rows),
        "validation": Dataset.from_dict({"text": ["", None]}),
    }
    DatasetDict(parts).save_to_disk(tmp_path / "parts")
    data = LongContextData(
        "local", str(tmp_path / "parts"), seq_len=8, streaming=streaming, cache_dir=str(tmp_path),
        validation_fraction=0.3,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="the dataset's validation split has no text"):
        data.setup("fit")
    assert len(data.validation)
