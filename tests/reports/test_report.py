"""Reports say what is so, let nothing untrusted in, and are there whole or not at all."""

import base64
import json
import os
import re
import runpy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support.program import ROOT, SMALL, fit, merged, scalars

from longctx_layers import create_model
from longctx_layers.data.tokenizers import ByteTokenizer, train_bpe
from longctx_layers.evals.program.models import fingerprint
from longctx_layers.evals.synthetic import main as evaluate
from longctx_layers.reports.checkpoint import load
from longctx_layers.reports.inputs import find_text
from longctx_layers.reports.logs import Log
from longctx_layers.testing import small_model
from longctx_layers.training.checkpoints import read_checkpoint

pytestmark = pytest.mark.xdist_group("report")

RUN = "logs<i>&|$^\u202e"  # a folder's name that must not be taken for markup
CHECKPOINT = Path(RUN, "checkpoints/step=00000004.ckpt")
QUICK = ["--seq_len=64", "--max_len=128", "--documents=3", "--samples=1", "--new_tokens=8"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def main():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longctx_layers.reports.sections.speed.ROUNDS", 1)
        patch.setattr("sys.argv", ["examples/report.py"])
        yield runpy.run_path(str(ROOT / "examples/report.py"))["main"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a training of four steps, and its model in a folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("report")
    before = Path.cwd()
    os.chdir(folder)
    try:
        flags = ("--model.window_size=8", "--model.ssm_state_dim=8", "--trainer.max_steps=4")
        data = ("--data.dataset_config=60", "--data.validation_fraction=0.2")
        fit(*merged(*SMALL, *flags, *data, f"--trainer.default_root_dir={RUN}"))
    finally:
        os.chdir(before)
    model, _ = read_checkpoint(folder / RUN / "checkpoints/step=00000004.ckpt")
    model.save_pretrained(folder / "bare")
    return folder


@pytest.fixture(scope="module")
def reported(main, trained, tmp_path_factory):
    """The folder of a report on the training's checkpoint."""
    out, before = tmp_path_factory.mktemp("reported"), Path.cwd()
    os.chdir(trained)
    try:
        main(["--checkpoint_path", str(CHECKPOINT), "--output_dir", str(out), *QUICK])
    finally:
        os.chdir(before)
    return out


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return CHECKPOINT


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def pictures(page):
    found = [a["src"] for tag, a in page.tags if tag == "img"]
    assert all(source.startswith("data:image/png;base64,") for source in found)
    return [base64.b64decode(source.partition(",")[2], validate=True) for source in found]


# ---- The whole


def test_report_of_a_checkpoint(here, reported):
    page = Page((reported / "report.html").read_text())
    found = json.loads((reported / "report.json").read_text())
    text = (reported / "report.md").read_text()

    drawn = pictures(page)
    files = [reported / name for name in re.findall(r"\]\((pictures/\w+\.png)\)", text)]
    assert [file.read_bytes() for file in files] == drawn
    assert all(png.startswith(PNG) for png in drawn)
    assert [file.stem for file in files] == [
        "training_loss", "loss_by_position", "gates_and_time_scales", "gates_by_step_1",
        "speed_and_memory",
    ]  # fmt: skip
    assert {path.name for path in reported.iterdir()} == {
        "report.html", "report.md", "report.json", "pictures",
    }  # fmt: skip

    # What it says is what the library says.
    model, _ = read_checkpoint(here)
    total = sum(p.numel() for p in model.parameters())
    curve = found["Training curve"]["DPASSM"]
    assert dict(map(tuple, curve["train_loss"])) == scalars(Path(RUN))
    assert len(curve["val_loss"]) == 1
    for said in (f"{total:,}", "window_size 8", "synthetic 60", "28 tokens"):
        assert said in page.text
    assert f"{total:,}" in text
    losses = found["Loss by position"]["DPASSM"]
    assert losses["tokens_of_each"] == 128
    assert 2 <= losses["documents"] <= 3
    speeds = found["Speed and memory"]["DPASSM"]
    assert [s["length"] for s in speeds] == [64, 128]
    for speed in speeds:
        assert min(speed["reading"] + speed["training"] + speed["writing"]) > 0
        assert speed["state_bytes"] == model.state_size(speed["length"])
    gradients = 4 * total
    assert gradients < speeds[0]["training_bytes"] < speeds[1]["training_bytes"]
    gates = found["Gates and time scales"]["DPASSM"]["gate/layer_"]
    assert len(gates) == len(model.blocks)
    assert all(0.4 < gate < 0.6 for gate in gates.values())


def test_nothing_in_the_page_is_fetched_runs_or_comes_from_a_name(reported):
    html = (reported / "report.html").read_text()
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "i"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:").startswith("data:")
    assert "default-src 'none'" in html
    assert "url(" not in html
    assert "@import" not in html
    assert "logs<i>&|$^\\u202e" in page.text  # the name itself, as text
    assert "\u202e" not in html + (reported / "report.md").read_text()


def test_comparison(main, here, tmp_path):
    torch.manual_seed(0)
    other = create_model(257, "tiny", "window", {"window_size": 8})
    other.save_pretrained(tmp_path / "other")
    ByteTokenizer().save(tmp_path / "other")
    out = tmp_path / "out"
    flags = ["--checkpoint_path", str(here), "--compare", str(tmp_path / "other"), "bare"]
    main([*flags, "--output_dir", str(out), *QUICK])
    found = json.loads((out / "report.json").read_text())
    names = {name.split("/")[-1] for name in found["Model card"]}
    assert names == {"step=00000004.ckpt", "window alone", "bare"}
    assert len(found["Loss by position"]) == 2  # bare has no tokenizer
    gates = {name.split("/")[-1] for name in found["Gates and time scales"]}
    assert gates == {"step=00000004.ckpt", "bare"}
    assert len(found["Speed and memory"]) == 3
    text = (out / "report.md").read_text()
    assert "Loss minus that of DPASSM" in text
    assert "these documents may have been among them" in text


def test_model_without_tokenizer_and_logs(main, here, tmp_path, capsys):
    main(["--checkpoint_path", "bare", "--output_dir", str(tmp_path), *QUICK])
    assert "warning: No checkpoint has a tokenizer" in capsys.readouterr().err
    page = Page((tmp_path / "report.html").read_text())
    assert "No checkpoint has a tokenizer" in page.text
    assert "Measured on sequences of the task passkey" in page.text
    assert len(pictures(page)) == 2  # gates and speed
    assert "none found" in page.text


# ---- Evaluations


def test_evaluation_rows_of_this_checkpoint_only(main, here, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = {}
    for task in ("passkey", "needle", "drift_curve", "streaming_ppl"):
        flags = f"--task {task} --seq_len 128 --max_len 256 --n 2 --device cpu".split()
        if task == "streaming_ppl":
            flags += ["--dataset_name", "synthetic", "--dataset_config", "60"]
        flags += ["--output_dir", str(tmp_path / "rows")]
        rows[task] = evaluate([*flags, "--checkpoint_path", str(here)])
        if task == "passkey":  # another model's rows in the same file
            evaluate([*flags, "--block", "vanilla"])
    capsys.readouterr()
    results = ["--results", str(tmp_path / "rows")]
    main(["--checkpoint_path", str(here), "--output_dir", str(tmp_path), *results, *QUICK])
    found = json.loads((tmp_path / "report.json").read_text())["Evaluation"]["DPASSM"]
    depths = found.pop("depths")
    assert found == {task: json.loads(json.dumps(own)) for task, own in rows.items()}
    assert sorted({row["depth"] for row in depths}) == [0, 0.25, 0.5, 0.75, 1]
    assert {row["length"] for row in depths} == {128, 256}
    drawn = {path.stem for path in (tmp_path / "pictures").iterdir()}
    expected = {"passkey", "needle", "needle_depths", "drift_curve", "drift_curve_places"}
    assert {*expected, "streaming_ppl"} <= drawn
    text = (tmp_path / "report.md").read_text()
    assert "nats per 1,000 tokens" in text
    for row in rows["passkey"]:
        cells = [f"{row['length']:,}", "DPASSM", f"{row['accuracy']:.3f}"]
        assert " | ".join(cells) in text


def test_scores_at_chance_are_said_to_be(here):
    from longctx_layers.reports.results import Results
    from longctx_layers.reports.sections.evaluation import section

    (one,) = load([here])
    common = {"chance": 0.03, "n": 9, "reach": 28, "accuracy_state_zeroed": 0.0, "loss": 1.0}
    good = {"length": 64, "accuracy": 1.0, "low": 0.9, "high": 1.0, **common}
    bad = {"length": 64, "accuracy": 0.05, "low": 0.01, "high": 0.2, **common}

    def said(*rows):
        parts = section([one], [Results(Path("out"), {"passkey": list(rows)})]).parts
        return " ".join(part for part in parts if isinstance(part, str))

    assert "at chance" in said(bad)
    assert "was not trained" in said({**bad, "trained": False})
    assert "at chance" not in said(good)
    assert "effective length in passkey (accuracy at least 0.9): 64 tokens" in said(good)


@pytest.mark.parametrize("slope", [None, float("nan")])
def test_streaming_that_is_no_result_is_said_to_be(here, slope):
    from longctx_layers.reports.results import Results
    from longctx_layers.reports.sections.evaluation import section

    one, other = load([here]) * 2
    other = replace(other, label="other", tokenizer=train_bpe(["some text " * 9], 260))
    row = {
        "length": 64, "accuracy": 0.1, "low": 0.05, "high": 0.2, "chance": 0.1, "n": 9, "reach": 28,
        "accuracy_state_zeroed": 0.0, "loss": 1.0, "perplexity": 2.7, "slope_from": 60,
        "slope": slope, "slope_low": slope, "slope_high": slope,
    }  # fmt: skip
    place = {"length": 64, "place": 0, "loss": 1.0}
    found = Results(Path("out"), {"streaming_ppl": [row]}, {"streaming_ppl": [place]})

    def said(*checkpoints):
        parts = section(checkpoints, [found] * len(checkpoints)).parts
        assert "95 % interval over parts of the text" in parts[1].header
        return " ".join(part for part in parts if isinstance(part, str))

    alone = said(one)
    assert "after 60 tokens, the text is too short for a slope of the loss; perplexity" in alone
    assert "is at chance in streaming_ppl" in alone
    assert "tokenizers" not in alone
    assert "Wilson" not in alone
    assert "effective length" not in alone
    assert "losses per token, perplexities and accuracies" in said(one, other)
    row |= {"slope": 0.5, "slope_low": 0.1, "slope_high": 0.9, "trained": False}
    assert "the loss rises with the position: +0.5" in said(one)
    assert "was not trained" in said(one)


@pytest.mark.parametrize("name", ["model", "key", "low", "length"])
def test_rows_of_an_older_version(main, here, tmp_path, capsys, name):
    row = {"task": "passkey", "block": "dpassm", "length": 64, "accuracy": 1.0, "n": 9}
    row |= {
        "chance": 0.1,
        "low": 0.9,
        "high": 1.0,
        "key": "k",
        "model": fingerprint(load([here])[0].model),
    }
    row[name] = None
    (tmp_path / "passkey.jsonl").write_text(json.dumps(row))
    flags = ["--output_dir", str(tmp_path / "out"), "--results", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["--checkpoint_path", str(here), *flags, *QUICK])
    said = capsys.readouterr().err
    assert "passkey.jsonl: expected rows with" in said
    assert f"got none for {name} in the row of dpassm at length" in said
    assert "and evaluate again" in said


def test_data_of_the_training_that_are_gone(here):
    data = {"dataset_name": "local", "dataset_config": "gone"}
    text, (said,) = find_text(load([here]), Log([], {"data": data}), None, None)
    assert text is None
    assert "as in --dataset_config=path/to/data" in said


# ---- Errors


def truncated(here, folder):
    path = folder / "cut.ckpt"
    path.write_bytes(here.read_bytes()[:20_000])
    return path


def other_weights(here, folder):
    content = torch.load(here, weights_only=True)
    content["state_dict"].popitem()
    return saved(content, folder)


def not_finite(here, folder):
    content = torch.load(here, weights_only=True)
    content["state_dict"]["model.norm.weight"][0] = float("nan")
    return saved(content, folder)


def climbing(here, folder):
    content = torch.load(here, weights_only=True)
    content["longctx"]["tokenizer"]["../escaped.json"] = torch.zeros(1, dtype=torch.uint8)
    return saved(content, folder)


def saved(content, folder):
    torch.save(content, folder / "other.ckpt")
    return folder / "other.ckpt"


def foreign(here, folder):
    return saved({"state_dict": {}}, folder)


def text_file(here, folder):
    (folder / "a.ckpt").write_text("not a checkpoint")
    return folder / "a.ckpt"


def missing(here, folder):
    return folder / "none.ckpt"


def run_folder(here, folder):
    return here.parents[1]


def cut_folder(here, folder):
    small_model("dpassm").save_pretrained(folder / "cut")
    weights = folder / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    return folder / "cut"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing, "expected a file"),
        (truncated, "longctx train"),
        (foreign, "longctx train"),
        (text_file, "longctx train"),
        (other_weights, "damaged or another program's"),
        (not_finite, "expected finite weights"),
        (climbing, "paths inside their folder"),
        (run_folder, "did you mean"),
        (cut_folder, "damaged or cut short"),
    ],
)
def test_bad_checkpoint(main, here, tmp_path, capsys, spoil, message):
    path = spoil(here, tmp_path)
    with pytest.raises(SystemExit):
        main(["--checkpoint_path", str(path), "--output_dir", str(tmp_path / "out"), *QUICK])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path.parent / "escaped.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--compare bare bare", "expected each checkpoint once"),
        ("--results .", "expected TASK.jsonl with rows of these checkpoints"),
        ("--results . . .", "one for each of 1"),
        ("--logs .", "expected training runs with this model's options"),
        ("--seq_len 256 --max_len 128", "expected at most --max_len"),
        ("--documents 1", "expected at least 2"),
        ("--device tpu", "expected auto, cpu, cuda"),
        ("--dataset_name stdlibb", "got stdlibb: dataset_name: expected"),
        ("--dataset_config few", "got few: dataset_config: for synthetic"),
    ],
)
def test_bad_options(main, here, tmp_path, capsys, flags, message):
    out = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["--checkpoint_path", str(here), *out, *QUICK, *flags.split()])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("taken", ["report.html", "pictures/training_loss.png", "pictures"])
def test_place_that_is_taken(main, here, tmp_path, capsys, taken):
    if taken == "pictures":
        (tmp_path / taken).write_text("a file")
    else:
        (tmp_path / taken).mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        main(["--checkpoint_path", str(here), "--output_dir", str(tmp_path), *QUICK])
    assert "examples/report.py: error: --output_dir: expected" in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == before
