"""Train small models on memory tasks, ask them far beyond that, and write down what came out.

    make proofs        (or: python -m benchmarks.memory.results --help)

Every run is one model from one seed. Its result is kept in OUTPUT_DIR/runs as soon as it is
there, and the same command again does what is missing: an interruption costs one run. After each
run the page is rewritten from the results that exist. That is runs/proofs/results.md; `--publish`
continues the committed results in reports/proofs and rewrites docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.memory.depth import depth_rows
from benchmarks.memory.drift import drift_rows
from benchmarks.memory.plan import BLOCKS, SEEDS, Depths, Drift, Run, plan
from benchmarks.memory.report import write_report
from longctx_layers import LongContextLM
from longctx_layers.command_line import add_output
from longctx_layers.evals import Mqar, evaluate
from longctx_layers.evals.program.models import build
from longctx_layers.evals.program.task_training import train
from longctx_layers.files import write

TOKENS, MOST, FEWEST = 262_144, 256, 32
PAGE = Path("docs/results.md")  # the committed one


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    proofs = ("passkey", "depths", "copy_recall", "mqar", "drift")
    parser.add_argument("--only", nargs="+", choices=proofs, default=proofs)
    parser.add_argument("--names", nargs="+", choices=BLOCKS, default=tuple(BLOCKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--minutes", type=float, help="begin no run after that many minutes")
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
        if run.proof not in args.only or run.name not in args.names:
            continue
        path = result_path(args.output_dir, run)
        if path.is_file() and json.loads(path.read_text())["key"] == run.key:
            continue
        if args.minutes is not None and time.monotonic() - begin > 60 * args.minutes:
            print("The time is up; the same command goes on with what is missing.")
            break
        result = carry_out(run, args.logs)
        write(path, json.dumps(result, indent=1) + "\n")
        write_report(args.output_dir, args.page)
    write_report(args.output_dir, args.page)
    print(f"Written to {args.output_dir}/ and {args.page}")


def result_path(folder: Path, run: Run | Drift | Depths) -> Path:
    """Where the result of a run is kept."""
    name = run.name.replace(", ", "-").replace(" ", "-")
    if isinstance(run, Run) and run.state_dim:
        name += f"-n{run.state_dim}"
    if isinstance(run, Drift) and run.anew:
        name += "-anew"
    return folder / "runs" / f"{run.proof}-{name}-{run.seed}.json"


def carry_out(run: Run | Drift | Depths, logs: Path) -> dict[str, Any]:
    """Train and measure; what comes back is all that the page needs."""
    result: dict[str, Any] = {
        "proof": run.proof,
        "name": run.name,
        "seed": run.seed,
        "key": run.key,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    if isinstance(run, Drift):
        return {**result, **drift_rows(run, logs)}
    if isinstance(run, Depths):
        name = result_path(Path(), run).stem.replace("depths", "passkey", 1)
        return {**result, **depth_rows(run, LongContextLM.from_pretrained(logs / name))}
    model = build(run.block, run.options, seed=run.seed)
    trained = _train(run, model)
    model.save_pretrained(logs / result_path(Path(), run).stem)
    rows = [row for task in run.tasks() for row in _ask(run, task, model)]
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
    """How many are asked at a length: as many as `TOKENS` make, within bounds."""
    return min(MOST, max(FEWEST, TOKENS // length))


def _train(run: Run, model: LongContextLM) -> dict[str, Any]:
    label = f"{run.proof} {run.name}, seed {run.seed}"
    curve, seconds = [], 0.0
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


def _ask(run: Run, task: Any, model: LongContextLM) -> list[dict[str, Any]]:
    rows = []
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
                **({"pairs": task.pairs} if isinstance(task, Mqar) else {}),
            }
        )
        zeroed = score.accuracy_state_zeroed
        print(
            f"  {task.name} {run.name} seed {run.seed} at {length}: {score.accuracy:.3f}"
            + ("" if zeroed is None else f", state zeroed {zeroed:.3f}")
            + (f", {task.pairs} pairs" if isinstance(task, Mqar) else ""),
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
