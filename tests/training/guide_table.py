"""Run the guide's commands, each only smaller, and write what happened into docs/training.md.

python tests/training/guide_table.py
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(Path(__file__).parent)]

from guide_commands import FITS, FLAGS, OTHERS, Fit, Flags  # noqa: E402

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


def rows() -> list[tuple[Fit | Flags | object, str]]:
    """Every command of the guide with its text in the table."""
    found: list[tuple[object, str]] = []
    for one in FITS:
        found.append((one, f"`fit {' '.join(one.flags)}`"))
    for one in FLAGS:
        found.append((one, f"`{' '.join(one.flags)}`"))
    for one in OTHERS:
        text = "; ".join(one.command.strip().splitlines()).replace("|", "\\|")
        found.append((one, f"`{text}`"))
    return found


def outcome(flags: tuple[str, ...], folder: Path, done: dict[tuple[str, ...], str]) -> str:
    """Run a command, smaller, and say what happened; the same run is not done twice."""
    from program import SMALL, finish, fit, merged, scalars, start

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


def main() -> None:
    from program import local_text, local_wikitext

    lines, done = ["| section | command | what happened |", "|---|---|---|"], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local_wikitext(folder)
        local_text(folder / "path/to/data")
        os.chdir(folder)
        for one, text in rows():
            happened = getattr(one, "outcome", None) or outcome(one.flags, folder, done)
            print(text[:100], happened, flush=True)
            lines.append(f"| {one.section} | {text} | {happened} |")
    page = ROOT / "docs/training.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text("\n".join([before + BEGIN, *lines, END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
