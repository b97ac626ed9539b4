"""The commands of the Makefile: they need no setup, notice half of one, and keep git's files."""

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from longctx_layers.command_line import add_output

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "demo": "examples/demo.py",
    "compare": "examples/compare.py",
    "results": "-m benchmarks.memory.results",
    "proofs": "-m benchmarks.memory.results",
    "bench-peers": "-m benchmarks.speed.peers_table",
    "targets": "-m benchmarks.speed.targets",
    "kernels": "-m benchmarks.kernels.table",
    "gpu-check": "-m benchmarks.speed.gpu_table",
}
# Stands in for an interpreter: `-m venv` makes a folder with itself as its python, `-m pip install`
# puts the tools there, and files in the checkout break either on the way.
INTERPRETER = """#!/bin/bash
echo "$*" >> calls
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; [ ! -e break-venv ];;
    "-m pip install "*)
        [ ! -e break-pip ] || exit 1
        for tool in pytest ruff mypy; do ln -sf /bin/true "$(dirname "$0")/$tool"; done;;
    *get_path*) echo .;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile, and a stand-in for Python."""
    (tmp_path / ".ci").mkdir()
    for name in ("Makefile", ".ci/environment", "constraints.txt", "constraints-oldest.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("python", "other"):
        (tmp_path / name).write_text(INTERPRETER)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(folder, *arguments):
    """Run make; the test's own make and its variables stay out of it."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTHON"))}
    environ["PATH"] = f"{folder}:{environ['PATH']}"
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environ, capture_output=True, text=True
    )


def installs(folder):
    calls = (folder / "calls").read_text().splitlines()
    return [call for call in calls if call.startswith("-m pip install")]


@pytest.mark.parametrize("target", ["test", "lint", *PROGRAMS])
def test_a_command_makes_the_environment_that_it_needs(checkout, target):
    done = make(checkout, target, "PYTHON=./python")
    assert done.returncode == 0, done.stderr
    assert "Making .venv from ./python" in done.stdout
    assert "Installing" in done.stdout
    before = installs(checkout)
    assert "-c .venv/constraints.txt -e .[dev]" in before[0]
    again = make(checkout, target)
    assert again.returncode == 0, again.stderr
    assert "Making" not in again.stdout
    assert [one for one in installs(checkout)[len(before) :] if ".[dev]" in one] == []


@pytest.mark.parametrize("broken", ["break-venv", "break-pip"])
def test_half_an_environment_is_completed(checkout, broken):
    (checkout / broken).touch()
    assert make(checkout, "test", "PYTHON=./python").returncode != 0
    assert (checkout / ".venv/bin/python").is_file()
    (checkout / broken).unlink()
    done = make(checkout, "test", "PYTHON=./python")
    assert done.returncode == 0, done.stderr
    assert ("Making" in done.stdout) == (broken == "break-venv")
    assert (checkout / ".venv/ready").is_file()


def test_an_interrupted_update_is_completed(checkout):
    assert make(checkout, "setup", "PYTHON=./python").returncode == 0
    (checkout / "break-pip").touch()
    assert make(checkout, "setup").returncode != 0
    assert make(checkout, "test").returncode != 0
    (checkout / "break-pip").unlink()
    before = len(installs(checkout))
    assert make(checkout, "test").returncode == 0
    assert len(installs(checkout)) == before + 1


def test_another_interpreter_needs_a_clean_checkout(checkout):
    assert make(checkout, "setup", "PYTHON=./python").returncode == 0
    for target in ("setup", "test"):
        done = make(checkout, target, "PYTHON=./other")
        assert done.returncode != 0
        assert "run 'make clean' first" in done.stderr
    assert make(checkout, "setup", "PYTHON=./python").returncode == 0


def test_newest_and_oldest_have_environments_of_their_own(checkout):
    assert make(checkout, "test-newest", "PYTHON=./python").returncode == 0
    (newest,) = installs(checkout)
    assert "--upgrade --upgrade-strategy eager -e .[dev]" in newest
    assert " -c " not in newest
    assert make(checkout, "test-oldest", "OLDEST_PYTHON=./python").returncode == 0
    assert "-c .venv-oldest/constraints.txt" in installs(checkout)[-1]
    pins = (checkout / ".venv-oldest/constraints.txt").read_text()
    assert pins == (ROOT / "constraints-oldest.txt").read_text()
    assert not (checkout / ".venv").exists()


def test_the_oldest_versions_are_the_lower_bounds():
    project = (ROOT / "pyproject.toml").read_text()
    bounds = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"', project))
    pins = dict(
        re.findall(r"(?m)^([\w-]+)==([\d.]+)", (ROOT / "constraints-oldest.txt").read_text())
    )
    assert {"torch", "transformers", "lightning"} <= pins.keys() & bounds.keys()
    for name in pins.keys() & bounds.keys():
        assert pins[name].startswith(bounds[name]), name
        assert not set(pins[name].removeprefix(bounds[name])) - set(".0"), name


@pytest.mark.parametrize("target", PROGRAMS)
def test_committed_pages_are_written_only_when_asked_for(checkout, target):
    command = f".venv/bin/python {PROGRAMS[target]}"
    assert command in make(checkout, "-n", target).stdout.splitlines()[-1].split(" --publish")[0]
    assert "--publish" not in make(checkout, "-n", target).stdout
    assert f"{command} --publish" in make(checkout, "-n", target, "PUBLISH=1").stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], "runs/demo"), (["--publish"], "reports/demo"), (["--output-dir", "mine"], "mine")],
)
def test_where_programs_write(arguments, expected):
    parser = argparse.ArgumentParser()
    add_output(parser, "--output-dir", "demo")
    assert parser.parse_args(arguments).output_dir == Path(expected)
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"runs/", "logs/", ".venv/", ".venv-newest/", ".venv-oldest/"} <= set(ignored)


def test_no_program_writes_to_a_committed_folder_by_default():
    for folder in ("examples", "benchmarks", "tests/kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r'default=Path\("(reports|docs)', path.read_text()), path


def test_the_workflows_run_what_the_makefile_has():
    yaml = pytest.importorskip("yaml", reason="reads the workflows")
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    workflows = {
        p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / ".github/workflows").iterdir()
    }
    for workflow in workflows.values():
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] == 95
            commands = [step["run"].split() for step in job["steps"] if "run" in step]
            assert all(c[0] == "make" and c[1] in targets for c in commands)
    jobs = workflows["versions"]["jobs"]
    assert {"newest", "oldest"} == jobs.keys()
    assert {"schedule", "workflow_dispatch"} <= workflows["versions"][True].keys()  # YAML's "on"
