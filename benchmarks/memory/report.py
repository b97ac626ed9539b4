"""The page of the results and its pictures, from the results that exist."""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.memory.plan import DISTANCE, REACH, TRAINED, WINDOW
from benchmarks.memory.sections import associative, copying, drifting, passkey
from benchmarks.memory.tables import Result
from longctx_layers.files import write

HEAD = f"""\
# What the layers remember

Written by `make results` (`python -m benchmarks.memory.results`) from the results in
`{{results}}`; no number is written by hand. Small models, trained and measured on a CPU: two layers
of width 64, windows and chunks of {WINDOW} tokens, 128,000 parameters within 1 % whatever the block
(the feed-forward width compensates for differences between blocks). Two stacked windows see {REACH}
tokens back. Between a value and the question about it there are at least {DISTANCE} tokens
({DISTANCE // WINDOW} windows), in mqar {REACH + 1}.

Training: sequences grow from {TRAINED // 4} to {TRAINED} tokens; then their lengths are drawn
between half of that and a multiple (128 in passkey with dpassm and blade, 8 or less elsewhere).
They are read in pieces of {TRAINED} tokens with the state carried along and no gradient across
pieces; at most eight pieces of a sequence (and the last) are trained on, the others are only read.
Passkey has eight questions per piece in training and one in the measurement. Full attention learns
nothing that way in the time available: it is trained on easier sequences first (64 tokens with few
symbols and pairs, or with the value close to its questions), and then with one question as in the
measurement, since the first of several questions, close to the value, would serve as a copy of it
for the others. All seeds are shown; the median is compared with the target. **State zeroed**: the
recurrent state is cleared at the question, and once more {REACH} tokens before it, so that the keys
and values in the windows come from a model without a memory as well.
[evaluation.md]({{evaluation}}) describes the tasks.
"""


def load(folder: Path) -> list[Result]:
    """The results, in the order of their file names."""
    results: list[Result] = []
    for path in sorted((folder / "runs").glob("*.json")):
        result = json.loads(path.read_text())
        if "proof" in result:  # the earlier name of the field
            result["experiment"] = result.pop("proof")
        results.append(result)
    return results


def write_report(folder: Path, page: Path) -> None:
    """Write the page and its pictures from the results that exist."""
    results = load(folder)
    if not results:
        return
    pictures_folder = os.path.relpath(folder, page.parent)
    evaluation = os.path.relpath("docs/evaluation.md", page.parent)
    parts = [HEAD.format(results=(folder / "runs").as_posix(), evaluation=evaluation)]
    for section in (passkey, copying, associative, drifting):
        name, text, pictures = section(results)
        if not text:
            continue
        for file, content in pictures.items():
            write(folder / file, content)
            text += f"\n![{file.partition('.')[0].replace('_', ' ')}]({pictures_folder}/{file})\n"
        parts.append(f"## {name}\n\n{text}")
    machines = sorted(
        {result["machine"].replace(" 1 threads,", " 1 thread,") for result in results}
    )
    hours = sum(result.get("training", {}).get("seconds", 0) for result in results) / 3600
    parts.append(
        f"## Where this was measured\n\n{'; '.join(machines)}. {len(results)} runs, "
        f"{hours:.1f} hours of training on one core that also did other work.\n"
    )
    write(page, "\n".join(parts))
