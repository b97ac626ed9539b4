"""Train small models on memory tasks, and measure them far beyond the training length.

    make results        (or: python -m benchmarks.memory.results --help)

Every run is one model from one seed. Its result is stored in OUTPUT_DIR/runs at once, and the same
command computes what is missing: an interruption costs one run. After each run the page is
rewritten from the results that exist. It is runs/proofs/results.md; `--publish` continues the
committed results in reports/proofs and rewrites docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.memory.depth import depth_rows
from benchmarks.memory.drift import drift_rows
from benchmarks.memory.plan import BLOCKS, SEEDS, Depths, Drift, Run, plan
from benchmarks.memory.report import write_report
from longctx_layers import LongContextLM
from longctx_layers.command_line import Parser, add_output
from longctx_layers.evals import Mqar, Task, evaluate
from longctx_layers.evals.program.models import build
from longctx_layers.evals.program.task_training import train
from longctx_layers.files import write
from longctx_layers.info import machine

TOKENS = 262_144  # of a measurement, within bounds on the number of sequences
MOST_SEQUENCES = 256
FEWEST_SEQUENCES = 32
EXPERIMENTS = ("passkey", "depths", "copy_recall", "mqar", "drift")
PAGE = Path("docs/results.md")  # the committed page


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    parser.add_argument("--names", nargs="+", choices=BLOCKS, default=tuple(BLOCKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--minutes", type=float, help="start no run after this many minutes")
    add_output(parser, "--output_dir", "proofs")
    parser.add_argument(
        "--page",
        type=Path,
        help=f"default: results.md in OUTPUT_DIR, and {PAGE} with --publish",
    )
    parser.add_argument("--logs", type=Path, default=Path("logs/proofs"), help="for the models")
    args = parser.parse_args(argv)
    if args.page is None:
        published = args.output_dir == Path("reports/proofs")
        args.page = PAGE if published else args.output_dir / "results.md"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    begin = time.monotonic()
    for run in plan(args.seeds):
        if run.experiment not in args.only or run.name not in args.names:
            continue
        path = result_path(args.output_dir, run)
        if path.is_file() and json.loads(path.read_text())["key"] == run.key:
            continue
        if args.minutes is not None and time.monotonic() - begin > 60 * args.minutes:
            print("The time is up; the same command continues with what is missing.")
            break
        result = carry_out(run, args.logs)
        write(path, json.dumps(result, indent=1) + "\n")
        write_report(args.output_dir, args.page)
    write_report(args.output_dir, args.page)
    print(f"Written to {args.output_dir}/ and {args.page}")


def result_path(folder: Path, run: Run | Drift | Depths) -> Path:
    """The file of a run's result."""
    name = run.name.replace(", ", "-").replace(" ", "-")
    if isinstance(run, Run) and run.state_dim:
        name += f"-n{run.state_dim}"
    if isinstance(run, Drift) and run.anew:
        name += "-anew"
    return folder / "runs" / f"{run.experiment}-{name}-{run.seed}.json"


def carry_out(run: Run | Drift | Depths, logs: Path) -> dict[str, Any]:
    """Train and measure; the result is all that the page needs."""
    result: dict[str, Any] = {
        "experiment": run.experiment,
        "name": run.name,
        "seed": run.seed,
        "key": run.key,
        "machine": machine(),
    }
    if isinstance(run, Drift):
        return {**result, **drift_rows(run, logs)}
    if isinstance(run, Depths):
        name = result_path(Path(), run).stem.replace("depths", "passkey", 1)
        return {**result, **depth_rows(run, LongContextLM.from_pretrained(logs / name))}
    model = build(run.block, run.options, seed=run.seed)
    trained = _train(run, model)
    model.save_pretrained(logs / result_path(Path(), run).stem)
    rows = [row for task in run.tasks() for row in _measure(run, task, model)]
    return {
        **result,
        "options": run.options,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": run.steps,
        "trained_tokens": sum(s["recipe"].steps * s["recipe"].tokens for s in run.stages()),
        "training": trained,
        "rows": rows,
    }


def sequences(length: int) -> int:
    """Number of sequences to measure at a length."""
    return min(MOST_SEQUENCES, max(FEWEST_SEQUENCES, TOKENS // length))


def _train(run: Run, model: LongContextLM) -> dict[str, Any]:
    label = f"{run.experiment} {run.name}, seed {run.seed}"
    curve: list[tuple[int, float, float]] = []
    seconds = 0.0
    with tqdm(total=run.steps, desc=label, unit="step", disable=None) as bar:

        def progress(_: int, loss: float, accuracy: float) -> None:
            bar.n += 1
            bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}")
            if bar.n % max(1, run.steps // 20) == 0:
                curve.append((bar.n, round(loss, 4), round(accuracy, 4)))
                if bar.disable:
                    print(f"{label}: step {bar.n}, loss {loss:.3f}, {accuracy:.3f}", flush=True)

        for stage in run.stages():
            trained = train(model, **stage, seed=run.seed, progress=progress)
            seconds += trained["seconds"]
    return {**trained, "seconds": seconds, "curve": curve}


def _measure(run: Run, task: Task, model: LongContextLM) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    pairs = task.pairs if isinstance(task, Mqar) else None
    for length in run.lengths:
        begin = time.perf_counter()
        score = evaluate(model, task, length, n=sequences(length), seed=1000 + run.seed)
        rows.append(
            {
                "task": task.name,
                "block": run.block,
                "length": length,
                **{k: v for k, v in vars(score).items() if k not in ("by_place", "loss")},
                "seconds": round(time.perf_counter() - begin, 3),
                "loss": score.loss,
                "distance": task.distance,
                "state_bytes": model.state_size(length),
                **({} if pairs is None else {"pairs": pairs}),
            }
        )
        zeroed = score.accuracy_state_zeroed
        print(
            f"  {task.name} {run.name} seed {run.seed} at {length}: {score.accuracy:.3f}"
            + ("" if zeroed is None else f", state zeroed {zeroed:.3f}")
            + ("" if pairs is None else f", {pairs} pairs"),
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
