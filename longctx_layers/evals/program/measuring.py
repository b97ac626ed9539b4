"""From settled flags to rows: what is missing is measured, and each row is kept at once."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longctx_layers import LongContextLM
from longctx_layers.evals import Score, Task, evaluate, needle_grid, reach, wilson
from longctx_layers.evals.program import streaming
from longctx_layers.evals.program.models import Loaded, build, load, own
from longctx_layers.evals.program.options import NEEDLE, STREAMING, make_task
from longctx_layers.evals.program.plan import Plan, bar, is_trained, row_of
from longctx_layers.evals.program.rows import Rows, key_of
from longctx_layers.evals.program.table import warn_untrained
from longctx_layers.evals.program.task_training import Recipe, train
from longctx_layers.files import check_targets

FURTHER = ".ndjson"  # of rows that are no rows of length
MOST_PLACES = 64


def settle(args: argparse.Namespace) -> Plan:
    """Load or build the model and check that all fits, before any work.

    Raises:
        OSError, ValueError, TypeError: for what does not.
    """
    if args.checkpoint is not None:
        loaded = load(args.checkpoint)
        if args.block not in (None, loaded.block):
            raise ValueError(
                f"--block: the checkpoint's is {loaded.block}, got {args.block}; leave it out"
            )
        args.block = loaded.block
    elif args.task == STREAMING:
        loaded = streaming.untrained(args)
    else:
        loaded = own(build(args.block, args.options, args.num_params, seed=args.seed))
    args.chunk_of_model = _chunk(loaded.model)
    task = text = None
    if args.task == STREAMING:
        text = streaming.prepare(args, loaded)
    else:
        task = make_task(args, loaded.vocabulary, reach(loaded.model))
    if args.output_dir is None:
        args.output_dir = Path("reports/evaluation")
        if args.checkpoint is not None:
            args.output_dir /= folder_name(args.checkpoint)
    check_targets(args.output_dir, [f"{args.task}.jsonl", f"models/{args.task}"])
    key = key_of(_settings(args, loaded, task, text))
    folder, names = args.output_dir, ("task", "block", "length")
    rows = Rows(folder / f"{args.task}.jsonl", names)
    ending, place = ("depths", "depth") if args.task == NEEDLE else ("places", "place")
    further = Rows(folder / f"{args.task}_{ending}{FURTHER}", (*names, place))
    if others := rows.others(args.block, key):
        if not args.overwrite:
            raise ValueError(
                f"{rows.path}: it has {len(others)} rows of {args.block} with other settings; "
                "choose another --output_dir, or replace them with --overwrite"
            )
        for file in (rows, further):
            file.drop(args.block)
    return Plan(args, loaded, task, key, rows, further, text)


def measure(plan: Plan) -> list[dict[str, Any]]:
    """The rows by length: those that are there, and those that are measured now."""
    args = plan.args
    done = [plan.rows.get(args.task, args.block, length) for length in args.lengths]
    if all(done):
        print(f"{plan.rows.path}: all {len(done)} rows are there already")
        return [row for row in done if row]
    model = _trained(plan).to(args.device)
    if not is_trained(args):
        warn_untrained()
    if plan.task is None:
        streaming.measure(plan, model)
    else:
        for length, row in zip(args.lengths, done, strict=True):
            if row is None:
                _measure_length(plan, model, length)
    found = [plan.rows.get(args.task, args.block, length) for length in args.lengths]
    return [row for row in found if row is not None]


def _measure_length(plan: Plan, model: LongContextLM, length: int) -> None:
    args, task = plan.args, plan.task
    assert task is not None
    grid: dict[float | None, Any] = {None: task}
    if args.task == NEEDLE:
        grid = dict(needle_grid(args.depths, task))
    begin = time.perf_counter()
    scores: dict[float | None, Score] = {}
    with bar(plan, len(grid) * args.n * length, f"{length:,}") as shown:
        for depth, one in grid.items():
            scores[depth] = evaluate(
                model,
                one,
                length,
                n=args.n,
                batch_size=args.batch_size,
                seed=args.seed,
                probe=not args.no_probe,
                tokens_at_once=args.tokens_at_once,
                progress=shown.update,
            )
    seconds = time.perf_counter() - begin
    whole = _together(list(scores.values()))
    row = row_of(plan, length, whole, seconds)
    name = {"task": args.task, "block": args.block, "length": length}
    if args.task == NEEDLE:
        further = [
            {**name, "depth": depth, **_fields(score), "key": plan.key}
            for depth, score in scores.items()
        ]
    else:
        further = [
            {**name, "place": place, "accuracy": accuracy, "loss": loss, "n": n, "key": plan.key}
            for place, (accuracy, loss, n) in _some(scores[None].by_place)
        ]
    plan.further.add(*further)
    plan.rows.add(row)  # last: with it, the length is done


def _some(by_place: dict[int, Any]) -> list[tuple[int, Any]]:
    """At most `MOST_PLACES` of the places, evenly."""
    return list(by_place.items())[:: math.ceil(len(by_place) / MOST_PLACES)]


def _together(scores: list[Score]) -> dict[str, Any]:
    """One score of several that were measured on as many sequences each."""
    mean = {
        name: sum(getattr(s, name) for s in scores) / len(scores) for name in ("accuracy", "loss")
    }
    zeroed = [s.accuracy_state_zeroed for s in scores]
    n = sum(s.n for s in scores)
    low, high = wilson(mean["accuracy"] * n, n)
    return {
        **_fields(scores[0]),
        **mean,
        "n": n,
        "low": low,
        "high": high,
        "accuracy_state_zeroed": None if None in zeroed else sum(zeroed) / len(zeroed),
    }


def _fields(score: Score) -> dict[str, Any]:
    values = dataclasses.asdict(score)
    values.pop("by_place")
    return values


def _trained(plan: Plan) -> LongContextLM:
    """The model, trained on the task first if that was asked for; kept for the next time."""
    args, model = plan.args, plan.loaded.model
    if not args.train_steps:
        return model
    folder = args.output_dir / "models" / f"{args.task}-{args.block}-{plan.key}"
    if (folder / "config.json").is_file():
        print(f"trained already: {folder}")
        return LongContextLM.from_pretrained(folder)
    recipe = Recipe(args.train_steps, args.train_len, learning_rate=args.learning_rate)
    label = f"training {args.task} {args.block}"
    model.to(args.device)
    with tqdm(total=recipe.steps, desc=label, unit="step", disable=None) as shown:

        def progress(step: int, loss: float, accuracy: float) -> None:
            shown.update()
            shown.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}")
            if shown.disable and step % max(1, recipe.steps // 10) == 0:
                print(f"{label}: step {step}, loss {loss:.3f}, accuracy {accuracy:.3f}", flush=True)

        assert plan.task is not None
        train(model, plan.task, recipe, seed=args.seed, progress=progress)
    if plan.loaded.tokenizer is not None:
        plan.loaded.tokenizer.save(folder)
    model.save_pretrained(folder)  # last: with it, the training is done
    return model


def _settings(args: argparse.Namespace, loaded: Loaded, task: Task | None, text: Any) -> Any:
    """All that a row depends on but for its length."""
    settings: dict[str, Any] = {
        "model": loaded.fingerprint,
        "task": args.task,
        "n": args.n,
        "seed": args.seed,
        "probe": not args.no_probe,
    }
    if task is not None:
        settings["knobs"] = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
        settings["knobs"]["vocabulary"] = dataclasses.asdict(task.vocabulary)
    if args.task == NEEDLE:
        settings["depths"] = args.depths
    if args.train_steps:
        settings["training"] = (args.train_steps, args.train_len, args.learning_rate)
    if text is not None:
        settings["text"] = (args.rotations, args.seq_len, args.max_len, text.fingerprint)
    return settings


def _chunk(model: LongContextLM) -> int:
    """The model's chunk, or window; 128 for one that has neither."""
    sizes = [block.mixer.reach for block in model.blocks]
    return max((size for size in sizes if size is not None), default=128)


def folder_name(path: Path) -> str:
    """A folder's name for a checkpoint: its own, with that of its run."""
    path = path.resolve()
    if path.parent.name == "checkpoints":
        return f"{path.parents[1].name}-{path.stem}"
    return path.stem if path.is_file() else path.name
