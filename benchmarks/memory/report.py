"""The page of examples/proofs.py and its pictures, from the results that exist."""

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

Written by `make proofs` (examples/proofs.py) from the results in `{{results}}`; no number
is written by hand. Small models, trained and measured on a CPU: two layers of width 64, windows and
chunks of {WINDOW} tokens, 128,000 parameters within 1 % whatever the block (the feed-forward width
makes up for what a block has less). Two stacked windows reach {REACH} tokens back. What is asked
for was told at least {DISTANCE} tokens before ({DISTANCE // WINDOW} windows), in mqar {REACH + 1}.

The recipe: sequences that grow from {TRAINED // 4} to {TRAINED} tokens, then lengths drawn between
half of that and a multiple (128 in passkey with dpassm and blade, 8 or less elsewhere), read in
pieces of {TRAINED} with the state passed on and no gradient across pieces; of one sequence at most
eight pieces are trained on (and the last), the others only read. Passkey has eight questions a
piece in training and one when it is measured. Full attention learns nothing in time that way: it
has easier sequences first (64 tokens with few symbols and pairs, or with the value close to its
questions), and then one question as it is measured, since the first of several, close to the value,
becomes a relay for the others. Every seed that ran is printed; the median is what is judged.
**State zeroed**: the recurrent state is emptied at the question, and once {REACH} tokens
before it, so that the keys and values in sight come from a model that had nothing to remember.
[evaluation.md]({{evaluation}}) says what the tasks are.
"""


def load(folder: Path) -> list[Result]:
    """The results, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]


def write_report(folder: Path, page: Path) -> None:
    """Write the page and its pictures, from what there is."""
    results = load(folder)
    if not results:
        return
    there = os.path.relpath(folder, page.parent)
    evaluation = os.path.relpath("docs/evaluation.md", page.parent)
    parts = [HEAD.format(results=(folder / "runs").as_posix(), evaluation=evaluation)]
    for section in (passkey, copying, associative, drifting):
        name, text, pictures = section(results)
        if not text:
            continue
        for file, content in pictures.items():
            write(folder / file, content)
            text += f"\n![{file.partition('.')[0].replace('_', ' ')}]({there}/{file})\n"
        parts.append(f"## {name}\n\n{text}")
    machines = sorted({result["machine"] for result in results})
    hours = sum(result.get("training", {}).get("seconds", 0) for result in results) / 3600
    parts.append(
        f"## Where this was measured\n\n{'; '.join(machines)}. {len(results)} runs, "
        f"{hours:.1f} hours of training on one core that had other work beside it.\n"
    )
    write(page, "\n".join(parts))
