"""The memory experiments: no run is repeated, and the page has what was measured and no more."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.memory import results as program
from benchmarks.memory.plan import BLOCKS, PAIRS, Depths, Drift, Run, plan
from benchmarks.memory.report import write_report
from benchmarks.memory.results import carry_out, main, result_path
from longctx_layers.evals.program.task_training import Recipe, for_training

TINY = Recipe(steps=2, length=256, tokens=256, longest=1)
EASIER = Recipe(steps=3, length=64, tokens=128, longest=1)


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few(monkeypatch):
    """Few sequences of a length."""
    monkeypatch.setattr(program, "MOST_SEQUENCES", 2)


def small_plan(seeds):
    return [
        Run("passkey", "dpassm", seeds[0], TINY, (256, 512)),
        Depths("dpassm", seeds[0], length=512, n=2, early=64),
        Run("copy_recall", "blade", seeds[0], TINY, (256,)),
        Run("mqar", "vanilla", seeds[0], TINY, (256,), state_dim=8, easier=EASIER),
    ]


def test_runs_are_kept_and_the_page_is_written(few, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "plan", small_plan)
    main(["--seeds", "0", "--publish"])
    files = {path.stem: path for path in (tmp_path / "reports/proofs/runs").iterdir()}
    assert set(files) == {
        "passkey-dpassm-0", "depths-dpassm-0", "copy_recall-blade-0", "mqar-vanilla-n8-0",
    }  # fmt: skip
    depths = json.loads(files["depths-dpassm-0"].read_text())["rows"]
    assert [row["depth"] for row in depths] == [0, 0.25, 0.5, 0.75, 1]
    result = json.loads(files["passkey-dpassm-0"].read_text())
    assert [row["length"] for row in result["rows"]] == [256, 512]
    assert result["rows"][0]["accuracy_state_zeroed"] is not None
    assert result["trained_tokens"] == 512
    assert abs(result["parameters"] - 128_000) < 1280
    staged = json.loads(files["mqar-vanilla-n8-0"].read_text())
    assert [row["pairs"] for row in staged["rows"]] == list(PAIRS)
    assert [step for step, _, _ in staged["training"]["curve"]] == [1, 2, 3, 4, 5]
    assert staged["trained_tokens"] == 3 * 128 + 2 * 256
    page = (tmp_path / "docs/results.md").read_text()
    assert "dpassm at 256 tokens, at least 99%: missed (" in page
    assert "blade at 4,096 tokens, at least 95%: not measured yet" in page
    assert "(../reports/proofs/passkey_by_length.png)" in page
    assert "| value at 0% | value at 25% |" in page
    assert "| first layer's exchanged |" in page
    for name in ("passkey_by_length.png", "mqar_by_state.png"):
        assert (tmp_path / "reports/proofs" / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(program, "carry_out", lambda *_: pytest.fail("done again"))
    main(["--seeds", "0", "--publish"])
    assert (tmp_path / "docs/results.md").read_text() == page


def test_committed_results_are_left_alone_by_default(few, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "plan", lambda seeds: small_plan(seeds)[:1])
    main(["--seeds", "0"])
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "logs"}
    page = (tmp_path / "runs/proofs/results.md").read_text()
    assert "results in\n`runs/proofs/runs`" in page
    assert "[evaluation.md](../../docs/evaluation.md)" in page
    assert "(./passkey_by_length.png)" in page
    assert (tmp_path / "runs/proofs/passkey_by_length.png").is_file()


def test_time_limit_stops_before_a_run(monkeypatch, capsys):
    monkeypatch.setattr(program, "plan", small_plan)
    monkeypatch.setattr(program, "carry_out", lambda *_: pytest.fail("begun"))
    main(["--seeds", "0", "--minutes", "0"])
    assert "the same command continues" in capsys.readouterr().out


def test_changed_runs_are_done_again(few, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "plan", lambda seeds: small_plan(seeds)[:1])
    main(["--seeds", "0"])
    path = tmp_path / "runs/proofs/runs/passkey-dpassm-0.json"
    first = json.loads(path.read_text())["key"]
    longer = Recipe(steps=3, length=256, tokens=256, longest=1)
    changed = Run("passkey", "dpassm", 0, longer, (256,))
    monkeypatch.setattr(program, "plan", lambda seeds: [changed])
    main(["--seeds", "0"])
    assert json.loads(path.read_text())["key"] == changed.key != first


def test_plan_shows_what_it_must():
    runs = plan()
    assert len({result_path(program.Path(), run) for run in runs}) == len(runs)
    assert len({run.key for run in runs}) == len(runs)
    for experiment in ("passkey", "copy_recall"):
        for name in ("dpassm", "blade"):
            found = [r for r in runs if (r.experiment, r.name) == (experiment, name)]
            assert [r.seed for r in found] == [0, 1, 2]
            assert max(max(r.lengths) for r in found) >= 16 * 256
    assert max(max(r.lengths) for r in runs if r.experiment == "passkey") == 128 * 256
    published = {"vanilla", "window", "dpassm", "blade", "baseline_longformer", "baseline_bigbird"}
    assert {r.block for r in runs if r.experiment == "passkey"} == published
    assert {r.block for r in runs if r.experiment == "mqar"} == published
    first = {(r.experiment, r.name): i for i, r in reversed(list(enumerate(runs))) if r.seed == 0}
    for i, run in enumerate(runs):
        assert i >= first[run.experiment, run.name], "a later seed comes before the first"


def test_full_attention_is_asked_as_it_is_measured_behind_easier_sequences():
    (passkey,) = (r for r in plan([0]) if (r.experiment, r.name) == ("passkey", "vanilla"))
    easier, measured = passkey.stages()
    assert easier["tasks"][0].distance < measured["tasks"][0].distance
    assert measured["extra_questions"] == 0
    task = for_training(measured["tasks"][0], 1, measured["extra_questions"])
    assert task == measured["tasks"][0]


def result(name, seed, *accuracies, experiment="passkey", **more):
    rows = [
        {"length": 256 * 4**i, "accuracy": accuracy, "low": 0, "high": 1, "state_bytes": 1000,
         "accuracy_state_zeroed": 0.03 if name in ("dpassm", "blade") else None, "pairs": 8}
        for i, accuracy in enumerate(accuracies)
    ]  # fmt: skip
    return {"experiment": experiment, "name": name, "seed": seed, "key": "", "machine": "a machine",
            "parameters": 128_000, "steps": 10, "rows": rows, **more}  # fmt: skip


def test_committed_results_are_still_those_of_the_plan():
    stored = {}
    for path in (Path(__file__).parents[2] / "reports/proofs/runs").glob("*.json"):
        stored[path.name] = json.loads(path.read_text())["key"]
    planned = {result_path(Path(), run).name: run.key for run in plan()}
    assert stored.items() <= planned.items()
    assert len(stored) > 80


def test_page_prints_every_seed_and_judges_the_median(tmp_path):
    results = [
        result("dpassm", 0, 1.0, 1.0, 1.0),
        result("dpassm", 1, 0.98, 0.9, 0.9),
        result("dpassm", 2, 1.0, 0.97, 0.96),
        result("blade", 0, 0.5, 0.2, 0.1),
        *(result(name, 0, 0.03) for name in BLOCKS if name not in ("dpassm", "blade")),
    ]
    (tmp_path / "out/runs").mkdir(parents=True)
    for i, one in enumerate(results):
        (tmp_path / f"out/runs/{i}.json").write_text(json.dumps(one))
    write_report(tmp_path / "out", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "**1.000** (1.000, 0.980, 1.000)" in page
    assert "dpassm at 256 tokens, at least 99%: reached (1.000, 3 seeds)" in page
    assert "dpassm at 4,096 tokens, at least 95%: reached (0.960, 3 seeds)" in page
    assert "blade at 256 tokens, at least 99%: missed (0.500, 1 seed)" in page
    assert "## Copy" not in page
    assert "## Streaming" not in page


@pytest.mark.slow
@pytest.mark.parametrize("block", ["dpassm", "blade"])
def test_passkey_is_remembered_by_the_state_and_by_nothing_else(block, tmp_path):
    def rows(name, lengths):
        (run,) = (r for r in plan([0]) if (r.experiment, r.name) == ("passkey", name))
        found = carry_out(replace(run, lengths=lengths), tmp_path / "logs")
        return {row["length"]: row for row in found["rows"]}

    found = rows(block, (256, 4096))
    assert found[256]["accuracy"] >= 0.99
    assert found[4096]["accuracy"] >= 0.95
    assert found[256]["accuracy_state_zeroed"] < 0.1
    off = rows(f"{block}, state path off", (256,))[256]
    assert off["low"] <= off["chance"] + 0.01


@pytest.mark.slow
def test_drift_of_a_model_of_real_text(tmp_path):
    found = carry_out(Drift("dpassm", 0, steps=2, length=64, stream=4000), tmp_path / "logs")
    assert found["stream_length"] == 4000
    assert len(found["by_position"]) == 100
    assert found["slope"]["low"] <= found["slope"]["mean"] <= found["slope"]["high"]
    assert found["loss_state_zeroed"] != found["loss"]
    assert found["state_bytes"] == found["state_bytes_held"]
    (tmp_path / "out/runs").mkdir(parents=True)
    (tmp_path / "out/runs/drift.json").write_text(json.dumps(found))
    write_report(tmp_path / "out", tmp_path / "page.md")
    assert "Streaming perplexity" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "out/drift.png").is_file()
