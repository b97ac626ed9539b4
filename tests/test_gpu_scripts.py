"""gpu/: what is to run on a machine with a GPU runs here, in small; nothing there can be mended."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GPU = ROOT / "gpu"
# Each program's own command line; the kernels run in Triton's interpreter.
PROGRAMS = """
import check, check_models, environment, hot, rates, sweep, table, text, train

check.main("--name dry --device cpu --turns 1".split())
check_models.main("--device cpu --blocks window --checks streams --length 80".split())
environment.main(["--dry"])
rates.main(["--device", "cpu", "--out", f"{OUT}/rates.json"])
tiny = "--device cpu --batch 1 --length 20 --heads 1".split()
sweep.main([*tiny, "--window", "9", "--limit", "3", "--out", f"{OUT}/sweep.json"])
hot.main([*tiny, "--tiles", f"{OUT}/sweep.json"])
measured = "--size tiny --vocab 256 --tokens 64 --lengths 64 --seconds 0 --backends auto".split()
files = ["--rates", f"{OUT}/rates.json", "--out", f"{OUT}/train.json"]
train.main(["--device", "cpu", "--blocks", "window", *measured, *files])
trained = "--device cpu --size tiny --length 64 --batch 2 --seconds 0".split()
text.main([*trained, "--blocks", "window", "--text", OUT + "/text", "--out", f"{OUT}/text.json"])
measured = "--device cpu --groups ssd --rounds 1 --lengths 64 --tokens 64 --n-heads 2".split()
table.main([*measured, "--output", f"{OUT}/table"])
"""
# What is wrong is called so, and no wrong tiles win.
JUDGEMENTS = """
import itertools

import torch
from candidates import Candidate, own_tiles, use, winners
from check import Case, judge

count = itertools.count()
ones, twos = (lambda: [torch.ones(2, 3)]), (lambda: [torch.full((2, 3), 2.0)])
moving = lambda: [torch.ones(2, 3) + 1e-4 * next(count)]
not_a_number = lambda: [torch.full((2, 3), torch.nan)]
assert judge(Case("", ones, ones, lambda: [torch.ones(1, 3)], (0,)))[0] == ""
assert "far from float64" in judge(Case("", ones, twos))[0]
assert "far from float64" in judge(Case("", not_a_number, ones))[0]
assert "two equal calls differ" in judge(Case("", moving, ones))[0]
assert "a row alone differs" in judge(Case("", ones, ones, lambda: [torch.zeros(1, 3)], (0,)))[0]

def row(tiles, shape, ms, error=0.0):
    return dict(kind="ssd", size=64, tiles=tiles, shape=shape, ms=ms, error=error)

own, fast, wrong, half = (64, 8, 2048, 8, 4), (64, 8, 4096, 4, 4), (1, 1, 1, 1, 1), (2, 2, 2, 2, 2)
rows = [row(own, "forward", 3.0), row(own, "backward", 9.0), row(fast, "forward", 2.0)]
rows += [row(fast, "backward", 8.0), row(wrong, "forward", 1.0, 0.5), row(wrong, "backward", 1.0)]
rows += [row(half, "forward", 1.0), row(half, "backward", None)]
(winner,) = winners(rows)
assert winner == Candidate("ssd", 64, fast)
assert own_tiles("ssd", 64) != fast
use(winner)
assert own_tiles("ssd", 64) == fast
"""


def run(command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", sorted(path.name for path in GPU.glob("*.sh")))
def test_shell_scripts_parse(script):
    done = run(["bash", "-n", str(GPU / script)])
    assert done.returncode == 0, done.stderr


def test_every_program_runs_without_a_gpu(tmp_path):
    (tmp_path / "text").mkdir()
    for name in range(20):
        (tmp_path / "text" / f"{name}.txt").write_text(f"Chapter {name}. " * 1000)
    done = run(
        [sys.executable, "-c", f"OUT = {str(tmp_path)!r}\n{PROGRAMS}{JUDGEMENTS}"],
        PYTHONPATH=str(GPU),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ALL RIGHT") == 2, done.stdout
    assert "WRONG" not in done.stdout
    assert (
        '"reason"'
        not in (tmp_path / "sweep.json").read_text() + (tmp_path / "train.json").read_text()
    )
    assert '"utilisation"' in (tmp_path / "train.json").read_text()
    assert '"held_out_loss"' in (tmp_path / "text.json").read_text()
    assert "ours, torch" in (tmp_path / "table" / "table.md").read_text()


def test_without_a_gpu_it_stops_early_and_says_why(tmp_path):
    """It also finds the checkout as a package, which no pip has installed."""
    places = {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "w")}
    done = run(["bash", "gpu/run.sh"], **places)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "stopped: the Triton kernels do not run here" in done.stdout
    log = (tmp_path / "out" / "all.log").read_text()
    assert "the library refuses its Triton kernels here: needs a GPU" in log
    assert f"library: {tmp_path}/w/site/longctx_layers" in log
    wrong = run(["bash", "gpu/run.sh", "everything"], **places)
    assert wrong.returncode == 2
    assert "expected steps out of: check" in wrong.stderr


@pytest.mark.slow  # starts two dozen processes, and compiles for Hopper
def test_all_steps_run_dry(tmp_path):
    places = {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "w")}
    first = run(["bash", "gpu/run.sh", "--dry"], **places)
    named = run(["bash", "gpu/run.sh", "--dry", "text"], **places)
    assert first.returncode == named.returncode == 0, first.stderr + named.stderr
    log = (tmp_path / "out" / "all.log").read_text()
    assert log.count("exit status 0") == log.count("exit status"), log
    assert "WRONG" not in log
    assert {"sweep.json", "rates.json", "train.json", "text.json", "table"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


@pytest.mark.slow  # the compiler takes a while
def test_the_librarys_own_tiles_compile_for_hopper(tmp_path):
    cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    done = run([sys.executable, "gpu/sweep.py", "--dry"], **cache)
    assert "5 of 5 candidates compiled" in done.stdout, done.stdout + done.stderr


def test_what_is_brought_along_is_ignored():
    assert ".gpu/" in (ROOT / ".gitignore").read_text().splitlines()
