"""examples/evaluate.py: rows that go on where they stopped, models with what belongs to them."""

import json

import pytest
import torch
from support.program import SMALL, fit, merged

from longctx_layers import LAYERS, LongContextLM, create_model
from longctx_layers.evals.program import measuring
from longctx_layers.evals.program.models import build
from longctx_layers.evals.program.options import task_names
from longctx_layers.evals.program.rows import Rows
from longctx_layers.evals.scoring import doubling
from longctx_layers.evals.synthetic import main

FIELDS = [
    "task", "block", "length", "accuracy", "n", "chance", "low", "high", "accuracy_state_zeroed",
    "reach", "seconds",
]  # fmt: skip
WINDOW = {"blade": ("--chunk_size", "8"), "vanilla": ()}


@pytest.fixture(autouse=True)
def somewhere(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def run(*flags, block="dpassm", task="passkey", n=2):
    """A small evaluation of a model that is built."""
    given = () if block is None else ("--block", block, *WINDOW.get(block, ("--window_size", "8")))
    return main(["--task", task, "--n", str(n), "--seq_len", "64", *given, *flags])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("block", LAYERS)
def test_rows_of_an_untrained_model(block, tmp_path, capsys):
    rows = run("--max_len", "200", "--output_dir", "out", block=block)
    printed = capsys.readouterr().out
    assert printed.count("THIS MODEL WAS NOT TRAINED") == 2
    assert rows == lines(tmp_path / "out/passkey.jsonl")
    assert [row["length"] for row in rows] == [64, 128, 200]
    for row in rows:
        assert list(row)[: len(FIELDS)] == FIELDS
        assert row["block"] == block
        assert row["trained"] is False
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["chance"] == 1 / 32
        assert (row["accuracy_state_zeroed"] is None) == (block not in ("dpassm", "blade"))
        assert row["reach"] == (None if block == "vanilla" else 14)
        assert 126_720 <= row["parameters"] <= 129_280


@pytest.mark.parametrize("task", [name for name in task_names() if name != "streaming_ppl"])
def test_every_task_runs(task, tmp_path):
    (row,) = run(task=task)
    assert row["task"] == task
    assert row["n"] == (10 if task == "needle" else 2)
    folder = tmp_path / "reports/evaluation"
    (further,) = folder.glob("*.ndjson")
    places = lines(further)
    if task == "needle":
        assert [one["depth"] for one in places] == [0, 0.25, 0.5, 0.75, 1]
    else:
        mean = sum(one["accuracy"] for one in places) / len(places)
        assert task == "mqar" or mean == pytest.approx(row["accuracy"])
    assert {path.name for path in folder.iterdir()} == {f"{task}.jsonl", further.name}


def test_measured_rows_are_kept_and_missing_ones_added(tmp_path, monkeypatch):
    first = run("--max_len", "64")
    real, lengths = measuring.evaluate, []

    def watched(model, task, length, **options):
        lengths.append(length)
        return real(model, task, length, **options)

    monkeypatch.setattr(measuring, "evaluate", watched)
    rows = run("--max_len", "256")
    assert lengths == [128, 256]
    assert rows[0] == first[0]
    assert run("--max_len", "256") == rows == lines(tmp_path / "reports/evaluation/passkey.jsonl")
    assert lengths == [128, 256]


def test_killed_between_two_lengths_it_goes_on(tmp_path, monkeypatch):
    real = measuring.evaluate

    def killed(model, task, length, **options):
        if length > 64:
            raise KeyboardInterrupt
        return real(model, task, length, **options)

    monkeypatch.setattr(measuring, "evaluate", killed)
    with pytest.raises(SystemExit) as stop:
        run("--max_len", "128")
    assert stop.value.code == 130
    assert len(lines(tmp_path / "reports/evaluation/passkey.jsonl")) == 1
    monkeypatch.setattr(measuring, "evaluate", real)
    assert [row["length"] for row in run("--max_len", "128")] == [64, 128]


def test_rows_of_other_settings_are_not_mixed_in(tmp_path, capsys):
    first = run()
    run(block="window")  # beside it
    with pytest.raises(SystemExit):
        run("--seed", "1")
    assert "it has 1 rows of dpassm with other settings" in capsys.readouterr().err
    path = tmp_path / "reports/evaluation/passkey.jsonl"
    assert lines(path)[0] == first[0]
    (other,) = run("--seed", "1", "--overwrite")
    assert [row["key"] != first[0]["key"] for row in lines(path)] == [True, True]
    assert {row["block"]: row["seed"] for row in lines(path)} == {"dpassm": 1, "window": 0}
    assert other["seed"] == 1


def test_training_first_and_its_resumption(tmp_path, monkeypatch, capsys):
    flags = ("--pretrain_steps", "2", "--output_dir", "out", "--max_len", "128")
    rows = run(*flags)
    assert all(row["trained"] and row["train_steps"] == 2 for row in rows)
    printed = capsys.readouterr().out
    assert "NOT TRAINED" not in printed
    assert "At [64, 128] tokens it does no better than chance" in printed
    (folder,) = (tmp_path / "out/models").iterdir()
    model = LongContextLM.from_pretrained(folder)
    start = build("dpassm", {"window_size": 8})
    assert not torch.equal(model.embedding.weight, start.embedding.weight)
    (tmp_path / "out/passkey.jsonl").unlink()
    monkeypatch.setattr(measuring, "train", lambda *_, **__: pytest.fail("trained again"))
    again = run(*flags)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of examples/train.py with a tokenizer of its own."""
    fit(*merged(*SMALL, "--model.window_size=8", "--data.tokenizer=bpe:400"))
    return "logs/checkpoints/step=00000002.ckpt"


def test_checkpoint_comes_with_its_configuration_and_tokenizer(checkpoint, tmp_path, capsys):
    (row,) = run(f"--checkpoint_path={checkpoint}", block=None)
    assert row["trained"] is True
    assert row["block"] == "dpassm"
    assert row["reach"] == 4 * 7
    assert 0.99e6 < row["parameters"] < 1.01e6
    assert "NOT TRAINED" not in capsys.readouterr().out
    assert (tmp_path / "reports/evaluation/logs-step=00000002/passkey.jsonl").is_file()
    # The same model as a folder, under its other name.
    from longctx_layers.training.export import export

    export(tmp_path / checkpoint, tmp_path / "model")
    (same,) = run(
        "--pretrained_model", "model", "--output_dir", "out", "--block", "dpassm", block=None
    )
    assert {**same, "seconds": 0} == {**row, "seconds": 0}


def test_streaming_perplexity_of_a_checkpoint(checkpoint, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(60):
        (text / f"{number}.txt").write_text(f"the number {number} of this text. " * 100)
    flags = (
        f"--checkpoint_path {checkpoint} --dataset_name local --dataset_config text --max_len 500"
    )
    rows = run(*flags.split(), task="streaming_ppl", block=None)
    assert [row["length"] for row in rows] == [64, 128, 256, 500]
    (folder,) = (tmp_path / "reports/evaluation").iterdir()
    assert rows == lines(folder / "streaming_ppl.jsonl")
    for row in rows:
        assert list(row)[: len(FIELDS)] == FIELDS
        assert row["slope_low"] <= row["slope"] <= row["slope_high"]
        assert row["state_bytes"] == row["state_bytes_held"]
        assert row["accuracy_state_zeroed"] is not None
        assert 0 < row["chance"] < 1
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["held_out"] is None  # another dataset than the checkpoint's
    places = lines(folder / "streaming_ppl_places.ndjson")
    assert len(places) == 100
    assert [one["place"] for one in places] == list(range(0, 500, 5))
    last = [one["loss"] for one in places[50:]]
    assert sum(last) / len(last) == pytest.approx(rows[-1]["loss"], rel=1e-5)


def test_text_that_the_training_held_out_is_what_is_read(tmp_path, capsys):
    data = "--data.dataset_name=synthetic --data.dataset_config=60 --data.seed=7"
    fit(*SMALL, *data.split(), "--data.validation_fraction=0.3")
    path = next(tmp_path.rglob("*.ckpt"))
    flags = f"--checkpoint_path {path} --dataset_name synthetic --dataset_config 60 --max_len 64"
    (row,) = run(*flags.split(), task="streaming_ppl", block=None)
    assert row["held_out"] is True
    assert (row["slope"], row["slope_low"], row["slope_high"]) == (None, None, None)
    assert "after 64 tokens: not measured" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # the slope would be another one
        run(*flags.split(), "--seq_len", "32", task="streaming_ppl", block=None)
    assert "rows of dpassm with other settings" in capsys.readouterr().err


def test_rows_of_two_programs_in_one_file(tmp_path):
    first, second = (Rows(tmp_path / "rows.jsonl", ("task", "block")) for _ in range(2))
    first.add({"task": "passkey", "block": "dpassm", "accuracy": 1})
    second.add({"task": "passkey", "block": "blade", "accuracy": 1})
    first.drop("dpassm")
    first.add({"task": "mqar", "block": "window", "accuracy": 0})
    assert sorted(row["block"] for row in lines(tmp_path / "rows.jsonl")) == ["blade", "window"]


def test_model_without_tokenizer(tmp_path, capsys):
    build("window", {"window_size": 8}).save_pretrained("own")
    (row,) = run("--pretrained_model", "own", block=None)
    assert row["trained"]
    for size, task, message in (
        (100, "passkey", "got no tokenizer and 100 ids"),
        (300, "streaming_ppl", "there is none in its folder"),
    ):
        create_model(size, "tiny", "window").save_pretrained(f"other{size}")
        with pytest.raises(SystemExit):
            run("--pretrained_model", f"other{size}", task=task, block=None)
        assert message in capsys.readouterr().err


def test_long_input_is_read_in_pieces():
    (row,) = run("--seq_len", "131072", "--device", "cpu", block="window", n=1)
    assert row["length"] == 131_072


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task paskey", "invalid choice: 'paskey'"),
        ("--task passkey --block dpasm", "invalid choice: 'dpasm'"),
        ("--task passkey --seqlen 3", "unrecognized arguments: --seqlen"),
        ("--task passkey --window_size 0", "window_size: expected at least 1"),
        ("--task passkey --n_random_tokens 3", "n_random_tokens: no option of dpassm"),
        ("--task passkey --max_len 8", "--max_len: expected at least --seq_len = 256"),
        ("--task passkey --seq_len 0", "--seq_len: expected at least 1"),
        ("--task passkey --seq_len 2", "--seq_len: expected at least the 3 tokens"),
        ("--task passkey --distance 300", "--seq_len: expected at least the 303 tokens"),
        ("--task passkey --pairs 3", "--pairs: passkey has the options"),
        ("--task mqar --pairs 99", "pairs: expected at most n_symbols = 64"),
        ("--task passkey --device gpu", "--device: expected auto, cpu, cuda or cuda:N"),
        ("--task passkey --device cuda:7", "--device=cuda:7: torch"),
        ("--task passkey --train_steps -1", "--train_steps: expected at least 0"),
        ("--task passkey --learning_rate 3", "--learning_rate: expected a number between 0 and 1"),
        ("--task streaming_ppl --train_steps 9", "a model of text is trained by"),
        ("--task passkey --checkpoint_path no/such", "there is no no/such"),
        (
            "--task passkey --checkpoint_path . --pretrained_model ..",
            "two names of one option, got",
        ),
        ("--task passkey --checkpoint_path . --window_size 4", "has its own configuration"),
        ("--task passkey --checkpoint_path .", "from_pretrained: expected the file"),
        ("--task passkey --output_dir /dev/null/x", "--output_dir: expected a folder to write"),
        ("--task passkey --block_kwargs {ssm:null}", "expected a JSON object such as"),
        ("--task passkey --block_kwargs [1]", "expected a JSON object such as"),
        ("--task passkey --seed 9223372036854775808", "--seed: expected less than 2**63"),
    ],
)
def test_errors_come_before_any_work(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(flags.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_block_of_a_checkpoint_must_be_its_own(tmp_path, capsys):
    build("window", {"window_size": 8}).save_pretrained("own")
    with pytest.raises(SystemExit):
        run("--pretrained_model", "own", "--block", "dpassm", block=None)
    assert (
        "--block: expected window, which the checkpoint has, got dpassm" in capsys.readouterr().err
    )


def test_damaged_rows_are_an_error(tmp_path, capsys):
    path = tmp_path / "reports/evaluation/passkey.jsonl"
    path.parent.mkdir(parents=True)
    for content in (b'{"task": "passkey", "block"', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(SystemExit):
            run()
        assert f"{path.relative_to(tmp_path)}, line 1: expected a row" in capsys.readouterr().err
        assert path.read_bytes() == content


def test_damaged_model_of_an_earlier_training(tmp_path, capsys):
    flags = ("--train_steps", "2", "--output_dir", "out")
    run(*flags)
    (weights,) = tmp_path.rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit) as error:
        run(*flags, "--max_len", "128")
    assert error.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_doubling():
    assert doubling(256, 256) == [256]
    assert doubling(256, 1024) == [256, 512, 1024]
    assert doubling(256, 1000) == [256, 512, 1000]
