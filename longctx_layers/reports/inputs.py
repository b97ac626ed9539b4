"""What a report is made from: checkpoints, logs, evaluation results and held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx_layers.files import check_targets
from longctx_layers.reports import logs, markdown, results
from longctx_layers.reports.checkpoint import Checkpoint, load
from longctx_layers.reports.flags import Flags
from longctx_layers.reports.sections import speed
from longctx_layers.reports.text import Text, held_out


@dataclass(frozen=True)
class Inputs:
    """What a report is made from.

    Attributes:
        checkpoints: the first one and those it is compared with.
        logs, results: of each checkpoint, as far as they were found.
        text: to measure on; None if there is none.
        warnings: about the text.
    """

    checkpoints: Sequence[Checkpoint]
    logs: Sequence[logs.Log | None]
    results: Sequence[results.Results | None]
    text: Text | None
    warnings: Sequence[str]


def prepare(flags: Flags) -> Inputs:
    """Load everything that the report needs, and check that it can be written.

    Raises:
        OSError, ValueError, ImportError: if something is missing or damaged.
    """
    check_targets(flags.output_dir, targets(flags.output_dir))
    checkpoints = load(flags.paths, flags.device)
    first, *others = checkpoints
    found_logs = [logs.find(first, flags.logs), *(logs.find(other) for other in others)]
    found_results = find_results(checkpoints, flags.results)
    text, warnings = find_text(checkpoints, found_logs[0], flags.dataset_name, flags.dataset_config)
    return Inputs(checkpoints, found_logs, found_results, text, warnings)


def targets(folder: Path) -> list[str]:
    """The files of a report in a folder, as far as they are known before it is made."""
    pictures = {speed.PICTURE, *(path.stem for path in folder.glob(f"{markdown.PICTURES}/*.png"))}
    names = [f"{markdown.PICTURES}/{name}.png" for name in sorted(pictures)]
    return ["report.html", "report.md", "report.json", *names]


def find_results(
    checkpoints: Sequence[Checkpoint], folders: Sequence[Path]
) -> list[results.Results | None]:
    """The evaluation results of each checkpoint.

    Args:
        checkpoints: whose results are wanted.
        folders: none, for where each evaluation writes by default; one; or one for each.
    """
    places: list[Path | None] = list(folders) or [None]
    if len(places) == 1:
        places *= len(checkpoints)
    if len(places) != len(checkpoints):
        raise ValueError(
            f"--results: expected one folder, or one for each of {len(checkpoints)} checkpoints, "
            f"got {len(folders)}"
        )
    pairs = zip(checkpoints, places, strict=True)
    found = [results.find(checkpoint, place) for checkpoint, place in pairs]
    if folders and not any(found):
        raise FileNotFoundError(
            "--results: expected TASK.jsonl with rows of these checkpoints, got "
            f"{', '.join(map(str, folders))}; pass the --output_dir of an evaluation"
        )
    return found


def find_text(
    checkpoints: Sequence[Checkpoint],
    log: logs.Log | None,
    dataset_name: str | None,
    dataset_config: str | None,
) -> tuple[Text | None, list[str]]:
    """Held-out documents of the first checkpoint's data, and warnings about them.

    Raises:
        ValueError: if data that a flag names are not available. For the checkpoint's own data
            there is a warning instead.
    """
    first, *others = checkpoints
    if not any(checkpoint.tokenizer for checkpoint in checkpoints):
        return None, ["No checkpoint has a tokenizer: no loss of text, and no samples."]
    options = {} if log is None else log.data
    named = {"dataset_name": dataset_name, "dataset_config": dataset_config}
    if dataset_name:  # the training's other options do not apply to other data
        options = {n: options[n] for n in ("cache_dir", "seed") if n in options}
    try:
        text = held_out(options, **named)
    except (OSError, ValueError, ImportError) as error:
        # The data module names the flags of the training program.
        reason = str(error).replace("--data.dataset_", "--dataset_")
        if any(named.values()):
            raise ValueError(
                "--dataset_name: expected data with held-out documents, got "
                f"{' '.join(filter(None, named.values()))}: {reason}"
            ) from error
        return None, [f"Nothing was measured on text: {reason}"]
    warnings: list[str] = []
    if dataset_name and log is None:
        warnings.append(
            f"The training data of {first.label} are not known; these documents may have been "
            "among them."
        )
    elsewhere = [c.label for c in others if split_of(c) != split_of(first)]
    if elsewhere:
        warnings.append(
            f"{', '.join(elsewhere)}: trained on other data or with another split, as far as is "
            "known; these documents may have been among them."
        )
    return text, warnings


def split_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings that decide which documents its training held out."""
    return {n: checkpoint.order.get(n) for n in ("content", "validation_fraction", "seed")}
