"""A report's parts: logs that belong to a checkpoint, text that stays text, files all or none."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from longctx_layers import create_model
from longctx_layers.data.tokenizers import ByteTokenizer, train_bpe
from longctx_layers.evals.statistics import Z
from longctx_layers.files import check_targets, write_all
from longctx_layers.reports import logs, markdown
from longctx_layers.reports.checkpoint import Checkpoint
from longctx_layers.reports.content import Sample, Section, Table, finite, visible
from longctx_layers.reports.html import render
from longctx_layers.reports.sections import evaluation_pictures, inside, position
from longctx_layers.reports.text import Text
from longctx_layers.reports.words import wrapped
from longctx_layers.testing import small_model


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_files_are_written_all_or_none(tmp_path, monkeypatch):
    write_all(tmp_path, {"a.txt": "old", "b/c.png": b"old"})
    write = Path.write_bytes

    def full(path, content):
        if "c.png" in path.name:
            raise OSError("no space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write_all(tmp_path, {"a.txt": "new", "b/c.png": b"new"})
    assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "b/c.png").read_bytes() == b"old"
    assert {path.name for path in tmp_path.rglob("*")} == {"a.txt", "b", "c.png"}
    with pytest.raises(IsADirectoryError, match="expected files or nothing at .*/b"):
        write_all(tmp_path, {"a.txt": "new", "b": "new"})
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("place", ["/proc/none", "a.txt", "a.txt/in"])
def test_places_that_take_no_file(tmp_path, place):
    (tmp_path / "a.txt").touch()
    with pytest.raises(OSError, match="expected a folder to write into"):
        check_targets(tmp_path / place, ["b.txt"])
    check_targets(tmp_path / "new/one", ["b.txt", "c/d.txt"])
    assert [path.name for path in tmp_path.rglob("*")] == ["a.txt"]


def test_json_has_neither_nan_nor_infinity():
    numbers = {"a": [1, float("nan"), (2.5, float("-inf"))], "b": "NaN", "c": None, "d": True}
    assert finite(numbers) == {"a": [1, None, [2.5, None]], "b": "NaN", "c": None, "d": True}


# ---- Pictures

LONG = "DPASSM, some/folders/of_rather_long_names/and_more/checkpoints/step=00000020.ckpt"


def boxes(figure):
    figure.draw_without_rendering()
    titles = [axes.title for axes in figure.axes if axes.get_title()]
    return [one.get_window_extent() for one in (*titles, figure._suptitle)]


def test_titles_with_a_path_stay_apart(monkeypatch):
    for module in (inside, evaluation_pictures):
        monkeypatch.setattr(module, "png", lambda figure, **_: figure)
    by_step = {name: {0: [(1, 0.5), (2, 0.6)]} for name in (inside.GATE, inside.SCALE)}
    row = {"depth": 0, "length": 64, "accuracy": 0.5, "chance": 0.1}
    one = Checkpoint(Path("a"), small_model("dpassm"), None, label=LONG)
    for figure in (
        inside.draw_courses(by_step, LONG),
        evaluation_pictures.draw_needle([(one, [row])] * 2),
        evaluation_pictures.draw_needle([(one, [row])]),
    ):
        found = boxes(figure)
        assert not any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])
        width = figure.get_figwidth() * figure.dpi
        assert all(box.x0 >= 0 and box.x1 <= width for box in found)


def test_wrapped_text_is_all_there():
    lines = wrapped(LONG, 20).split("\n")
    assert max(map(len, lines)) <= 20
    assert "".join(lines).replace(" ", "") == LONG.replace(" ", "")
    assert wrapped("DPASSM", 20) == "DPASSM"


# ---- Logs


def logged(root, version, options, losses, ckpt_path=None):
    folder = root / f"lightning_logs/version_{version}"
    writer = SummaryWriter(str(folder))
    for step, loss in losses.items():
        writer.add_scalar("train_loss", loss, step)
    writer.close()
    config = {"model": options, "data": {"dataset_name": "stdlib"}, "ckpt_path": ckpt_path}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_the_log_of_the_training_that_made_the_checkpoint(tmp_path):
    blade, ours = {"block": "blade"}, {"block": None, "length_curriculum": {0: 64}}
    one = logged(tmp_path, 0, ours, {10: 9.0, 20: 8.0})
    logged(tmp_path, 1, blade, {10: 5.0})
    two = logged(tmp_path, 2, ours, {10: 4.0, 20: 3.0})
    three = logged(tmp_path, 3, ours, {20: 2.5, 30: 2.0, 40: 1.0}, "checkpoints/step=20.ckpt")
    path = tmp_path / "checkpoints/step=30.ckpt"
    path.parent.mkdir()
    path.touch()
    options = {"block": None, "length_curriculum": {"0": 64}}  # as a checkpoint has them
    checkpoint = Checkpoint(path, small_model("window"), None, 30, options)
    log = logs.find(checkpoint)
    assert log.folders == [two, three]
    assert dict(log.curve("train_loss")) == {10: 4.0, 20: 2.5, 30: 2.0}
    assert log.data == {"dataset_name": "stdlib"}
    # Before the second training began, it was the first.
    for file in (*two.iterdir(), *three.iterdir()):
        file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.9")))
    assert logs.find(checkpoint).folders == [one]
    assert logs.find(checkpoint, one).folders == [one]
    with pytest.raises(FileNotFoundError, match="this model's options"):
        logs.find(Checkpoint(path, checkpoint.model, None, 30, {"block": "vanilla"}), tmp_path)
    with pytest.raises(ValueError, match="expected one training, got 3"):
        logs.find(Checkpoint(tmp_path, checkpoint.model, None), tmp_path)


# ---- Numbers and text


def test_means_over_positions_have_the_interval_of_the_documents():
    tokens = torch.arange(96.0, dtype=torch.float64).view(2, 48)
    first, second = position.by_bucket(tokens)[:2]
    assert first[:3] == (1, 16, pytest.approx((7.5 + 55.5) / 2))
    # Two documents 48 apart: standard deviation 48 / sqrt(2), over sqrt(2).
    assert first[3] == second[3] == pytest.approx(Z * 24)


def test_losses_are_the_models_own_and_bits_are_per_byte():
    torch.manual_seed(0)
    model = create_model(257, "tiny", "dpassm", {"window_size": 8}).eval()
    one = Checkpoint(Path("a"), model, ByteTokenizer())
    text = "a word, another word, and the third; " * 40
    (found,) = position.measure([one], Text([text, text[7:], text[9:]], ""), 256, 3)
    ids = torch.tensor(list(text.encode()))[None]
    with torch.no_grad():
        own = one.model.loss(ids[:, :256], ids[:, 1:257])
    assert found.tokens[0].mean().item() == pytest.approx(own.item(), rel=1e-5)
    bits = found.tokens.sum().item() / 0.6931471805599453 / found.tokens.numel()
    assert found.bits_per_byte == pytest.approx(bits)


def test_another_tokenizer_reads_the_same_text():
    text = "a word, another word, and the third; " * 40
    bpe = train_bpe([text], 270)
    first, other = (
        Checkpoint(Path("a"), create_model(t.vocab_size, "tiny").eval(), t, label="a")
        for t in (ByteTokenizer(), bpe)
    )
    found = position.measure([first, other], Text([text, text[7:], text[9:]], ""), 256, 3)
    assert [len(row) for row in found[0].rows] == [256] * 3
    assert all(len(row) < 256 for row in found[1].rows)
    # The first token of each document is given, and a token of the BPE is some bytes long.
    longest = max(len(bpe.decode([i])) for i in range(bpe.vocab_size))
    assert found[0].n_bytes - 3 * longest <= found[1].n_bytes <= found[0].n_bytes
    said = position.section(found, Text([], "documents")).parts
    assert any("only the bits per byte" in part for part in said if isinstance(part, str))


NASTY = (
    "</pre><script>alert(1)</script>", "```\n# not a title\n```", "a | b | c",
    "![x](http://e.org)", "<img src=x onerror=y>", "*a* _b_ `c` ~~d~~ &amp; \\", "1. one", "# one",
    "- one", "\x00\x1b[31m", "a\u202eb", "{{ 7 * 7 }}{% raw %}", "> quoted", "$x$",
)  # fmt: skip
HEAD = {"html", "head", "meta", "title", "style", "body", "nav"}


@pytest.mark.parametrize("text", NASTY)
def test_markdown_and_html_show_untrusted_text_as_it_is(text):
    sections = [Section(text, [text, Table(["a", text], [[text, "b"]]), Sample(text, text)])]
    page = Page(render(text, text, sections))
    shown = visible(text)
    assert page.text.count(shown) >= 8
    allowed = Page(render("", "", [])).tags
    allowed |= {"h2", "a", "div", "table", "thead", "tbody", "tr", "th", "td", "pre", "b", "p"}
    assert page.tags <= allowed

    library = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True})
    rendered = library.enable(["table", "strikethrough"]).render(
        markdown.render(text, text, sections)
    )
    page = Page(rendered)
    assert page.tags == allowed - {"a", "b", "div"} - HEAD | {"h1", "code"}
    assert page.text.count(" ".join(shown.split())) >= 5
    assert page.text.count(shown) >= 2  # in the blocks of code, line feeds and all
