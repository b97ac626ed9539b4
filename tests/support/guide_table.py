"""Run the guide's commands, made smaller, and write the outcomes into reports/training/guide.md.

cd tests; python -m support.guide_table             # all of them
cd tests; python -m support.guide_table --missing   # only those that the table lacks
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from support.guide_commands import EVALUATIONS, FITS, FLAGS, OTHERS, Evaluation

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "reports/training/guide.md"
HEADING = """# Every command of the training guide

The guide's `-m efficient_longctx.training.train` is `-m longctx_layers.training.train` here, and
`fit` in this table; `examples/train.py` does the same. This page is written by `cd tests; python -m
support.guide_table`, which runs each command with the tiny model, two steps, windows and states an
eighth and lengths 1/128 of what is written, on a CPU, with a local folder of text in place of
wikitext. As written, a command with `--trainer.accelerator=gpu` ends with an error that says so on
a machine without a GPU.

"""
# The factors by which windows and states, and sequences, are smaller.
NARROWER = 8
SHORTER = 128


def shrunk(flags: tuple[str, ...]) -> tuple[str, ...]:
    """The same command for a small model, two short steps, and a CPU."""
    smaller = []
    for flag in flags:
        name, _, value = flag.partition("=")
        if name == "--model.num_params":
            value = "tiny"
        elif name in ("--data.seq_len", "--data.max_seq_len"):
            name, value = "--data.seq_len", str(max(64, int(value) // SHORTER))
        elif name == "--trainer.max_steps":
            value = "2"
        elif name == "--trainer.accelerator":
            value = "cpu"
        elif name == "--trainer.default_root_dir":
            value = re.sub("^logs/[^-]*-(.*)-.*", r"logs/tiny-\1", value)
        elif re.search("window_size|chunk_size|state_dim", name):
            value = str(int(value) // NARROWER)
        smaller.append(f"{name}={value}")
    return tuple(smaller)


def shrunk_evaluation(flags: tuple[str, ...]) -> list[str]:
    """The same evaluation of short sequences, few of them, with narrow windows, on a CPU."""
    smaller = []
    further = ["--n", "2", "--output_dir", "out"]
    before = ""
    for flag in flags:
        if before in ("--seq_len", "--max_len"):
            flag = str(int(flag) // SHORTER)
        elif before == "--device":
            flag = "cpu"
        elif before == "--block" and "--pretrained_model" not in " ".join(flags):
            sizes = {"vanilla": [], "blade": ["--chunk_size", "8"]}
            further += sizes.get(flag, ["--window_size", "8"])
        smaller.append(flag)
        before = flag
    return smaller + further


def rows() -> list[tuple[Any, str]]:
    """Every command of the guide with its text in the table."""
    texts: list[tuple[Any, str]] = []
    for command in FITS:
        texts.append((command, f"`fit {' '.join(command.flags)}`"))
    for command in FLAGS:
        texts.append((command, f"`{' '.join(command.flags)}`"))
    for command in EVALUATIONS:
        texts.append((command, f"`-m longctx_layers.evals.synthetic {' '.join(command.flags)}`"))
    for command in OTHERS:
        text = "; ".join(command.command.strip().splitlines()).replace("|", "\\|")
        texts.append((command, f"`{text}`"))
    return texts


def table_rows(page: str) -> list[tuple[str, str]]:
    """The commands in a page, and their outcomes."""
    lines = [line for line in page.splitlines() if line.startswith("|")][2:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return [(command, outcome) for _, command, outcome in cells]


def outcome(flags: tuple[str, ...], folder: Path, done: dict[tuple[str, ...], str]) -> str:
    """Run a smaller command, and describe the outcome; equal runs are done once."""
    from support.program import SMALL, finish, fit, merged, scalars, start

    small = merged(*SMALL, *shrunk(flags), "--trainer.default_root_dir=logs")
    key = tuple(small)
    if key not in done:
        root = folder / "logs"
        if root.exists():
            root.rename(folder / f"logs-{len(done)}")
        output = io.StringIO()
        try:
            if "--trainer.devices=2" in flags:
                finish(start(*small, cwd=folder))
            else:
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                    fit(*small)
            losses = scalars(root)
            done[key] = (
                f"ran: loss {losses[1]:.3f}, {losses[2]:.3f}" if losses else "ran: one batch"
            )
        except SystemExit:
            done[key] = output.getvalue().strip().splitlines()[-1].partition("; ")[0]
    return done[key]


def evaluated(flags: tuple[str, ...], folder: Path) -> str:
    """Run a smaller evaluation, and describe the outcome."""
    import shutil

    from longctx_layers import create_model
    from longctx_layers.data.tokenizers import ByteTokenizer
    from longctx_layers.evals.synthetic import main as evaluate

    shutil.rmtree(folder / "out", ignore_errors=True)
    if "path/to/checkpoint" in " ".join(flags) and not Path("path/to/checkpoint").exists():
        create_model(257, "tiny", "dpassm").save_pretrained("path/to/checkpoint")
        ByteTokenizer().save("path/to/checkpoint")
    with contextlib.redirect_stdout(io.StringIO()):
        measured = evaluate(shrunk_evaluation(flags))
    values = ", ".join(f"{row['accuracy']:.3f}" for row in measured)
    note = ", and said loudly that nothing was trained"
    if measured[0]["trained"]:
        note = " for a checkpoint of random weights"
    return f"ran: accuracy {values}{note}"


def run(command: Any, folder: Path, done: dict[tuple[str, ...], str]) -> str:
    """Run one of the guide's commands, and describe the outcome."""
    if isinstance(command, Evaluation):
        return evaluated(command.flags, folder)
    return outcome(command.flags, folder, done)


def table(folder: Path, old: dict[str, str]) -> list[str]:
    """The table's lines; commands whose outcome is in `old` are not run again."""
    lines = ["| section | command | what happened |", "|---|---|---|"]
    done: dict[tuple[str, ...], str] = {}
    for command, text in rows():
        text_outcome = getattr(command, "outcome", None) or old.get(text)
        text_outcome = text_outcome or run(command, folder, done)
        print(text[:100], text_outcome, flush=True)
        lines.append(f"| {command.section} | {text} | {text_outcome} |")
    return lines


def main() -> None:
    from support.program import local_text, local_wikitext

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--missing", action="store_true", help="run what the table lacks")
    old: dict[str, str] = {}
    if parser.parse_args().missing:
        outcomes = table_rows(PAGE.read_text(encoding="utf-8"))
        old = {command: text for command, text in outcomes if text.startswith(("ran", "error"))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local_wikitext(folder)
        local_text(folder / "path/to/data")
        os.chdir(folder)
        lines = table(folder, old)
    PAGE.write_text("\n".join([HEADING + lines[0], *lines[1:], ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
