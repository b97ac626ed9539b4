"""The demo runs on any text, writes all of its files, and holds documents out."""

import json
import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo():
    return runpy.run_path(str(FOLDER / "demo.py"))


@pytest.fixture
def text(tmp_path):
    for n in range(24):
        (tmp_path / f"{n}.txt").write_text(f"document {n}: " + "some words to learn. " * 40)
    return tmp_path


def test_small_run(demo, text, tmp_path):
    out = tmp_path / "out"
    command = f"--text {text} --output_dir {out} --steps 2 --sequence_length 32 --batch-size 2"
    metrics = demo["main"]([*command.split(), "--validation-documents", "3"])
    written = {path.name for path in out.iterdir()}
    assert written == {"report.md", "metrics.json", "loss_curves.png", "loss_by_position.png"}
    assert json.loads((out / "metrics.json").read_text())["models"].keys() == {"dpassm", "window"}
    sizes = [model["parameters"] for model in metrics["models"].values()]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]
    assert all(m["by_position"][-1][:2] == (65, 128) for m in metrics["models"].values())
    for model in metrics["models"].values():
        assert sum(mean * (last - first + 1) for first, last, mean in model["by_position"]) == (
            pytest.approx(128 * model["loss"], rel=1e-5)
        )
    assert max(path.stat().st_size for path in out.glob("*.json")) < 10_000
    assert metrics["largest_difference_in_pieces"] < 1e-4
    difference = metrics["models"]["window"]["loss"] - metrics["models"]["dpassm"]["loss"]
    assert metrics["window_minus_dpassm"]["mean"] == pytest.approx(difference, abs=1e-5)
    assert metrics["zeroed"]["minus_dpassm"]["mean"] != 0


def test_no_document_is_in_both_parts(demo, text):
    found = demo["documents"](text, 100)
    training, validation = demo["split"](found, 0)
    assert len(training) + len(validation) == len(found) == 24
    assert not set(training) & set(validation)
    assert demo["split"](found, 0) == (training, validation)


def test_paired_interval(demo):
    result = demo["paired_interval"](torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert result.mean == 2
    assert result.high - 2 == pytest.approx(1.96 / 3**0.5, rel=1e-4)
    assert 2 - result.low == pytest.approx(1.96 / 3**0.5, rel=1e-4)
    assert result.half == pytest.approx(1.96 / 3**0.5, rel=1e-4)


def test_errors(demo, tmp_path, capsys):
    with pytest.raises(ValueError, match="expected at least 10 documents"):
        demo["main"](["--text", str(tmp_path), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        demo["main"](["--window-size", "0"])
    assert "--window_size: expected at least 1, got 0" in capsys.readouterr().err
