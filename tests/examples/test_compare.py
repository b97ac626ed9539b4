"""The comparison trains what is missing, measures both lengths on the same tokens, and draws."""

import json
import runpy

import pytest
import torch
from support.program import ROOT

from longctx_layers.testing import small_model


@pytest.fixture
def compare():
    return runpy.run_path(str(ROOT / "examples/compare.py"))


def test_small_comparison_and_its_resumption(compare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(40):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / f"text/{number}.txt").write_text(f"document {number}: some words. " * 20)
    flags = (
        "--blocks dpassm window --num-params tiny --steps 2 --batch-size 2 --seq-len 16 "
        "--dataset_name local --dataset_config text --data.cache_dir=cache --output-dir out "
        "--trainer.log_every_n_steps=1"
    )
    command = flags.split()
    metrics = compare["main"](command)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"loss_curves.png", "loss_by_position.png", "lengths.png"}
    assert written == {"report.md", "metrics.json", *pictures}
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == json.loads(
        json.dumps(metrics)
    )
    sizes = [block["parameters"] for block in metrics["blocks"].values()]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]
    for block in metrics["blocks"].values():
        assert [step for step, _ in block["train_loss"]] == [1, 2]
        rows = [v["by_position"] for v in block["validation"].values()]
        assert [row[-1][:2] for row in rows] == [[1, 16], [65, 128]]
        for length, validation in block["validation"].items():
            total = sum(m * (last - first + 1) for first, last, m in validation["by_position"])
            assert total == pytest.approx(int(length) * validation["loss"], rel=1e-5)
            assert len(validation["by_document"]) == metrics["measured_on"]["documents"]
        assert block.pop("tokens_per_second") > 0
        assert block["peak_memory_gib"] > 0
    page = (tmp_path / "out/report.md").read_text()
    assert "| DPASSM |" in page
    assert "| window alone |" in page
    # Again: nothing is trained, and the same comes out.
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("trained again"))
    again = compare["main"](command)["blocks"]
    for block in again.values():
        del block["tokens_per_second"]  # is measured again
    assert again == json.loads(json.dumps(metrics["blocks"]))


def test_losses_of_both_lengths_are_of_the_same_tokens(compare):
    model = small_model("window")
    ids = torch.arange(33)[None] % 13
    short, long = (compare["token_losses"](model.eval(), ids, length=n) for n in (8, 32))
    assert short.shape == long.shape == (1, 32)
    torch.testing.assert_close(short[:, :8], long[:, :8])
    assert (short - long).abs().max() > 0.01
    mean = model.loss(ids[:, :-1], ids[:, 1:])
    assert long.mean().item() == pytest.approx(mean.item())


def test_unknown_flag(compare, capsys):
    with pytest.raises(SystemExit):
        compare["main"](["--stepz", "3"])
    assert "unrecognized arguments: --stepz" in capsys.readouterr().err
