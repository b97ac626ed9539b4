"""From options to results: what is missing is measured, and every row is written at once."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longctx_layers import LongContextLM
from longctx_layers.evals import Passkey, Score, Task, evaluate, needle_grid, reach, wilson
from longctx_layers.evals.program import streaming
from longctx_layers.evals.program.models import Loaded, build, load, own
from longctx_layers.evals.program.options import Options, task_class
from longctx_layers.evals.program.plan import Measurement, Plan, bar, row_of
from longctx_layers.evals.program.rows import Row, detailed_rows, key_of, rows_by_length
from longctx_layers.evals.program.table import warn_untrained
from longctx_layers.evals.program.task_training import Recipe, train
from longctx_layers.evals.tasks.base import STREAMING
from longctx_layers.files import check_targets

MOST_PLACES = 64
DEFAULT_CHUNK = 128  # for models without chunks or windows


def settle(options: Options) -> Plan:
    """Load or build the model and check that everything fits, before any work.

    Raises:
        OSError, ValueError, TypeError: if it does not.
    """
    loaded = _model(options)
    measurement: Measurement
    if options.task == STREAMING:
        measurement = streaming.StreamMeasurement(streaming.prepare(options, loaded))
    else:
        task = make_task(options, loaded)
        measurement = TaskMeasurement(task)
        if options.task != task.name:
            assert isinstance(task, Passkey)
            measurement = NeedleMeasurement(task)
    folder = options.output_dir
    if folder is None:
        folder = Path("reports/evaluation")
        if options.checkpoint is not None:
            folder /= folder_name(options.checkpoint)
    check_targets(folder, [f"{options.task}.jsonl", f"models/{options.task}"])
    key = key_of(_settings(options, loaded, measurement))
    rows = rows_by_length(folder, options.task)
    details = detailed_rows(folder, options.task)
    if others := rows.others(loaded.block, key):
        if not options.overwrite:
            raise ValueError(
                f"{rows.path}: it has {len(others)} rows of {loaded.block} with other settings; "
                "choose another --output_dir, or replace them with --overwrite"
            )
        for file in (rows, details):
            file.drop(loaded.block)
    return Plan(options, loaded, measurement, key, rows, details)


def _model(options: Options) -> Loaded:
    if options.checkpoint is not None:
        loaded = load(options.checkpoint)
        if options.block not in (None, loaded.block):
            raise ValueError(
                f"--block: expected {loaded.block}, which the checkpoint has, got "
                f"{options.block}; omit it"
            )
        return loaded
    if options.task == STREAMING:
        return streaming.untrained(options)
    assert options.block is not None
    return own(build(options.block, options.block_options, options.num_params, seed=options.seed))


def make_task(options: Options, loaded: Loaded) -> Task:
    """The task as it suits the model.

    Unless it is given, `distance` is larger than what the stacked windows see, or as large as the
    shortest length permits.

    Raises:
        ValueError: for options that are impossible, or a shortest length that is too short.
    """
    kind = task_class(options.task)
    assert kind is not None
    task = kind.for_model(loaded.vocabulary, _chunk(loaded.model), **options.knobs)
    shortest = options.shortest
    if options.train_steps:
        shortest = min(shortest, options.train_len)
    if "distance" not in options.knobs:
        windows = reach(loaded.model)
        beyond = 0 if windows is None else windows + 1
        task = dataclasses.replace(task, distance=beyond)
        surplus = max(0, task.shortest - shortest)
        task = dataclasses.replace(task, distance=max(0, beyond - surplus))
    if task.shortest > shortest:
        raise ValueError(
            f"--seq_len: expected at least the {task.shortest} tokens that {task.name} needs "
            f"(distance {task.distance}), got {shortest}; make it larger, or --distance smaller"
        )
    return task


def _chunk(model: LongContextLM) -> int:
    """The size of the model's chunks or windows."""
    sizes = [mixer.reach for mixer in model.mixers()]
    return max((size for size in sizes if size is not None), default=DEFAULT_CHUNK)


def _settings(options: Options, loaded: Loaded, measurement: Measurement) -> dict[str, Any]:
    """All that a row depends on, apart from its length."""
    settings: dict[str, Any] = {
        "model": loaded.fingerprint,
        "task": options.task,
        "n": options.n,
        "seed": options.seed,
        "probe": options.probe,
        **measurement.settings(options),
    }
    if options.train_steps:
        settings["training"] = (options.train_steps, options.train_len, options.learning_rate)
    return settings


def measure(plan: Plan) -> list[Row]:
    """The rows by length: those that exist, and those that are measured now."""
    if not plan.missing():
        print(f"{plan.rows.path}: all {len(plan.options.lengths)} rows exist already")
        return plan.results()
    model = _trained(plan).to(plan.options.device)
    if not plan.options.is_trained:
        warn_untrained()
    plan.measurement.measure(plan, model)
    return plan.results()


@dataclasses.dataclass(frozen=True)
class TaskMeasurement(Measurement):
    """The accuracy of a memory task, length by length."""

    task: Task

    def settings(self, options: Options) -> dict[str, Any]:
        fields = dataclasses.fields(self.task)
        knobs = {field.name: getattr(self.task, field.name) for field in fields}
        knobs["vocabulary"] = dataclasses.asdict(self.task.vocabulary)
        return {"knobs": knobs}

    def measure(self, plan: Plan, model: LongContextLM) -> None:
        for length in plan.missing():
            begin = time.perf_counter()
            with bar(plan, self.sequences(plan.options) * length, f"{length:,}") as shown:
                score, details = self.score(plan, model, length, shown)
            row = row_of(plan, length, score, time.perf_counter() - begin)
            names = plan.names(length)
            plan.details.add(*({**names, **detail, "key": plan.key} for detail in details))
            plan.rows.add(row)  # last, because it marks the length as done

    def sequences(self, options: Options) -> int:
        """Number of sequences of a length."""
        return options.n

    def score(
        self, plan: Plan, model: LongContextLM, length: int, shown: tqdm[Any]
    ) -> tuple[dict[str, Any], list[Row]]:
        """The score at one length, and the same in detail."""
        score = _evaluate(plan, model, self.task, length, shown)
        step = math.ceil(len(score.by_place) / MOST_PLACES)
        places = list(score.by_place.items())[::step]
        return _fields(score), [
            {"place": place, "accuracy": accuracy, "loss": loss, "n": n}
            for place, (accuracy, loss, n) in places
        ]


@dataclasses.dataclass(frozen=True)
class NeedleMeasurement(TaskMeasurement):
    """The accuracy of passkey at a grid of depths, length by length."""

    task: Passkey

    def settings(self, options: Options) -> dict[str, Any]:
        return {**super().settings(options), "depths": options.depths}

    def sequences(self, options: Options) -> int:
        return options.depths * options.n

    def score(
        self, plan: Plan, model: LongContextLM, length: int, shown: tqdm[Any]
    ) -> tuple[dict[str, Any], list[Row]]:
        grid = needle_grid(plan.options.depths, self.task)
        scores = {
            depth: _evaluate(plan, model, task, length, shown) for depth, task in grid.items()
        }
        details = [{"depth": depth, **_fields(score)} for depth, score in scores.items()]
        return _together(list(scores.values())), details


def _evaluate(plan: Plan, model: LongContextLM, task: Task, length: int, shown: tqdm[Any]) -> Score:
    options = plan.options
    return evaluate(
        model,
        task,
        length,
        n=options.n,
        batch_size=options.batch_size,
        seed=options.seed,
        probe=options.probe,
        tokens_at_once=options.tokens_at_once,
        progress=shown.update,
    )


def _together(scores: Sequence[Score]) -> dict[str, Any]:
    """One score from several that were measured on equally many sequences."""
    accuracy = sum(score.accuracy for score in scores) / len(scores)
    zeroed = [s.accuracy_state_zeroed for s in scores if s.accuracy_state_zeroed is not None]
    n = sum(score.n for score in scores)
    low, high = wilson(accuracy * n, n)
    return {
        **_fields(scores[0]),
        "accuracy": accuracy,
        "loss": sum(score.loss for score in scores) / len(scores),
        "n": n,
        "low": low,
        "high": high,
        "accuracy_state_zeroed": sum(zeroed) / len(scores) if zeroed else None,
    }


def _fields(score: Score) -> dict[str, Any]:
    return {name: value for name, value in vars(score).items() if name != "by_place"}


def _trained(plan: Plan) -> LongContextLM:
    """The model, first trained on the task if the flags ask for it; training is done once."""
    options = plan.options
    model = plan.loaded.model
    if not options.train_steps:
        return model
    name = f"{options.task}-{plan.loaded.block}-{plan.key}"
    folder = plan.rows.path.parent / "models" / name
    if (folder / "config.json").is_file():
        print(f"trained already: {folder}")
        return LongContextLM.from_pretrained(folder)
    assert isinstance(plan.measurement, TaskMeasurement)
    recipe = Recipe(options.train_steps, options.train_len, learning_rate=options.learning_rate)
    label = f"training {options.task} {plan.loaded.block}"
    model.to(options.device)
    with tqdm(total=recipe.steps, desc=label, unit="step", disable=None) as shown:

        def progress(step: int, loss: float, accuracy: float) -> None:
            shown.update()
            shown.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}")
            if shown.disable and step % max(1, recipe.steps // 10) == 0:
                print(f"{label}: step {step}, loss {loss:.3f}, accuracy {accuracy:.3f}", flush=True)

        train(model, plan.measurement.task, recipe, seed=options.seed, progress=progress)
    if plan.loaded.tokenizer is not None:
        plan.loaded.tokenizer.save(folder)
    model.save_pretrained(folder)  # last, because it marks the training as done
    return model


def folder_name(path: Path) -> str:
    """A folder name for a checkpoint: its own, preceded by that of its run."""
    path = path.resolve()
    if path.parent.name == "checkpoints":
        return f"{path.parents[1].name}-{path.stem}"
    return path.stem if path.is_file() else path.name
