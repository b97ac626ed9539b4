"""Run the guide's commands, each only smaller, and write what happened into docs/training.md.

cd tests; python -m support.guide_table             # all of them
cd tests; python -m support.guide_table --missing   # those that the table lacks
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.guide_commands import EVALUATIONS, FITS, FLAGS, OTHERS, Evaluation

ROOT = Path(__file__).parents[2]

BEGIN, END = "<!-- guide table -->", "<!-- end of guide table -->"
# By how much a test's run is smaller: windows and states, and the sequence.
NARROWER, SHORTER = 8, 128


def shrunk(flags: tuple[str, ...]) -> tuple[str, ...]:
    """The same command for a small model, two short steps, and a CPU."""
    found = []
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
        found.append(f"{name}={value}")
    return tuple(found)


def shrunk_evaluation(flags: tuple[str, ...]) -> list[str]:
    """The same evaluation of short sequences, few of them, with narrow windows, on a CPU."""
    found, small = [], ["--n", "2", "--output_dir", "out"]
    before = ""
    for flag in flags:
        if before in ("--seq_len", "--max_len"):
            flag = str(int(flag) // SHORTER)
        elif before == "--device":
            flag = "cpu"
        elif before == "--block" and "--pretrained_model" not in " ".join(flags):
            small += {"vanilla": [], "blade": ["--chunk_size", "8"]}.get(
                flag, ["--window_size", "8"]
            )
        found.append(flag)
        before = flag
    return found + small


def rows() -> list[tuple[object, str]]:
    """Every command of the guide with its text in the table."""
    found: list[tuple[object, str]] = []
    for one in FITS:
        found.append((one, f"`fit {' '.join(one.flags)}`"))
    for one in FLAGS:
        found.append((one, f"`{' '.join(one.flags)}`"))
    for one in EVALUATIONS:
        found.append((one, f"`examples/evaluate.py {' '.join(one.flags)}`"))
    for one in OTHERS:
        text = "; ".join(one.command.strip().splitlines()).replace("|", "\\|")
        found.append((one, f"`{text}`"))
    return found


def outcome(flags: tuple[str, ...], folder: Path, done: dict[tuple[str, ...], str]) -> str:
    """Run a command, smaller, and say what happened; the same run is not done twice."""
    from support.program import SMALL, finish, fit, merged, scalars, start

    small = merged(*SMALL, *shrunk(flags), "--trainer.default_root_dir=logs")
    key = tuple(small)
    if key not in done:
        root = folder / "logs"
        if root.exists():
            root.rename(folder / f"logs-{len(done)}")
        said = io.StringIO()
        try:
            if "--trainer.devices=2" in flags:
                finish(start(*small, cwd=folder))
            else:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    fit(*small)
            losses = scalars(root)
            done[key] = (
                f"ran: loss {losses[1]:.3f}, {losses[2]:.3f}" if losses else "ran: one batch"
            )
        except SystemExit:
            done[key] = said.getvalue().strip().splitlines()[-1].partition("; ")[0]
    return done[key]


def evaluated(flags: tuple[str, ...], folder: Path) -> str:
    """Run an evaluation, smaller, and say what came out."""
    import shutil

    from longctx_layers import create_model
    from longctx_layers.data.tokenizers import ByteTokenizer
    from longctx_layers.evals.synthetic import main as evaluate

    shutil.rmtree(folder / "out", ignore_errors=True)
    if "path/to/checkpoint" in " ".join(flags) and not Path("path/to/checkpoint").exists():
        create_model(257, "tiny", "dpassm").save_pretrained("path/to/checkpoint")
        ByteTokenizer().save("path/to/checkpoint")
    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluate(shrunk_evaluation(flags))
    values = ", ".join(f"{row['accuracy']:.3f}" for row in found)
    note = ", and said loudly that nothing was trained"
    if found[0]["trained"]:
        note = " for a checkpoint of random weights"
    return f"ran: accuracy {values}{note}"


def happened(one: Any, folder: Path, done: dict[tuple[str, ...], str]) -> str:
    """What happens with one of the guide's commands."""
    if isinstance(one, Evaluation):
        return evaluated(one.flags, folder)
    return outcome(one.flags, folder, done)


def table(folder: Path, old: dict[str, str]) -> list[str]:
    """The table's lines; commands whose outcome is in `old` are not run again."""
    lines, done = ["| section | command | what happened |", "|---|---|---|"], {}
    for one, text in rows():
        said = getattr(one, "outcome", None) or old.get(text) or happened(one, folder, done)
        print(text[:100], said, flush=True)
        lines.append(f"| {one.section} | {text} | {said} |")
    return lines


def main() -> None:
    from support.program import local_text, local_wikitext

    page = ROOT / "docs/training.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    inside, _, after = rest.partition(END)
    old: dict[str, str] = {}
    if "--missing" in sys.argv:
        kept = [line.strip("| ").split(" | ") for line in inside.strip().splitlines()[2:]]
        old = {row[1]: row[2] for row in kept if row[2].startswith(("ran", "error"))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local_wikitext(folder)
        local_text(folder / "path/to/data")
        os.chdir(folder)
        lines = table(folder, old)
    page.write_text("\n".join([before + BEGIN, *lines, END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
