"""The sections of docs/results.md: tables of all seeds, and whether targets are reached."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.memory import figures
from benchmarks.memory.plan import FARTHEST, PAIRS, REACH, TRAINED
from benchmarks.memory.tables import Result, at, judged, of, seeds_of, shown, values
from longctx_layers.reports.markdown import table

ByBlock = dict[str, list[Result]]  # one result for each seed
Section = tuple[str, str, dict[str, bytes]]  # title, text and pictures; no text without results

EXCHANGES = {
    "as_is": "as it is",
    "first_early": "first layer's exchanged",
    "last_early": "last layer's",
    "preceded": "not quite first",
}


def at_training_length(found: ByBlock) -> str:
    """The table of a recall task at the training length."""
    rows = []
    for name, seeds in found.items():
        interval = "-"
        if len(seeds) == 1 and (row := at(seeds[0], TRAINED)):
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
        rows.append(
            [
                figures.label(name),
                f"{seeds[0]['parameters']:,}",
                f"{seeds[0]['steps']:,}",
                seeds_of(seeds),
                shown(values(seeds, TRAINED, "accuracy")),
                interval,
                shown(values(seeds, TRAINED, "accuracy_state_zeroed")),
            ]
        )
    header = ["block", "parameters", "steps", "seeds", "accuracy", "95 % interval", "state zeroed"]
    return table(header, rows, words=True)


def lengths_of(found: ByBlock) -> list[int]:
    """All lengths that were measured."""
    return sorted({row["length"] for s in found.values() for r in s for row in r["rows"]})


def at_lengths(found: ByBlock, lengths: Sequence[int]) -> str:
    """The table of accuracy by length."""
    rows = [
        [figures.label(block), *(shown(values(seeds, n, "accuracy")) for n in lengths)]
        for block, seeds in found.items()
    ]
    return table(["block", *(f"{length:,}" for length in lengths)], rows, words=True)


def passkey(results: list[Result]) -> Section:
    """Passkey, at the training length and far beyond it."""
    found = of(results, "passkey")
    title = "Passkey: up to which length?"
    if not found:
        return title, "", {}
    lengths = lengths_of(found)
    targets = [
        f"- {block} at {length:,} tokens, at least {target:.0%}: "
        f"{judged(found.get(block), length, target)}"
        for block in ("dpassm", "blade")
        for length, target in ((TRAINED, 0.99), (16 * TRAINED, 0.95))
    ]
    parts = [
        "One value among noise of the same 32 symbols, at a random position, with the question at "
        f"the end; a guess scores 0.031. At {TRAINED} tokens, the training length:",
        at_training_length(found),
        f"The same models at up to {max(lengths):,} tokens:",
        at_lengths(found, lengths),
        "Targets:",
        "\n".join(targets),
        *_depths(of(results, "depths")),
    ]
    picture = figures.by_length(found, TRAINED, FARTHEST)
    return title, _text(parts), {"passkey_by_length.png": picture}


def _text(parts: Sequence[str]) -> str:
    return "\n\n".join(parts) + "\n"


def _depths(found: ByBlock) -> list[str]:
    """Accuracy by the position of the value in long sequences; nothing if it was not measured."""
    if not found:
        return []
    first = next(iter(found.values()))[0]
    rows = [
        [figures.label(block), str(r["seed"]), *(f"{row['accuracy']:.3f}" for row in r["rows"])]
        for block, seeds in found.items()
        for r in seeds
    ]
    header = ["block", "seed", *(f"value at {row['depth']:.0%}" for row in first["rows"])]
    exchanges = [
        [figures.label(block), *(shown([r[name] for r in seeds]) for name in EXCHANGES)]
        for block, seeds in found.items()
    ]
    return [
        f"The same by the position of the value, in {first['length']:,} tokens ({first['n']} "
        "sequences each). A late value has more noise before it, and fewer tokens between it and "
        "its question.",
        table(header, rows, words=True),
        f"With the value at 0%, and a layer's recurrent state exchanged, {TRAINED} tokens before "
        f"the question, for the one that it had after {first['early']:,} tokens. Where the early "
        "state of the first layer brings the answer back, the value was never lost: the state of "
        "that layer keeps taking in noise, and its contribution then prevents the last layer from "
        "reading the value. The early state of the last layer holds the value too: where it does "
        f"not help, nothing was lost there. In the last column there are {first['before']} tokens "
        "of noise before the value: a model that has rarely met a value as its very first tokens "
        "may not store it.",
        table(["block", *EXCHANGES.values()], exchanges, words=True),
    ]


def copying(results: list[Result]) -> Section:
    """Copying four tokens."""
    found = of(results, "copy_recall")
    title = "Copy and recall"
    if not found:
        return title, "", {}
    targets = [
        f"- {block} at {TRAINED} tokens, at least 99 %: {judged(found.get(block), TRAINED, 0.99)}"
        for block in ("dpassm", "blade")
    ]
    parts = [
        "Four tokens at the beginning that are to be repeated in order at the end, each with the "
        "correct ones before it; a guess scores 0.031. The global keys of Longformer and BigBird "
        f"see the first token. At {TRAINED} tokens:",
        at_training_length(found),
        "By length:",
        at_lengths(found, lengths_of(found)),
        "Targets:",
        "\n".join(targets),
    ]
    return title, _text(parts), {}


def associative(results: list[Result]) -> Section:
    """Multi-query associative recall, and its cost in state."""
    found = of(results, "mqar")
    title = "Associative recall, by pairs and by bytes of state"
    if not found:
        return title, "", {}
    rows = []
    for block, seeds in found.items():
        row = at(seeds[0], TRAINED)
        assert row is not None
        rows.append(
            [
                figures.label(block),
                seeds_of(seeds),
                f"{row['state_bytes']:,}",
                *(shown(values(seeds, TRAINED, "accuracy", pairs=pairs)) for pairs in PAIRS),
                shown(values(seeds, TRAINED, "accuracy_state_zeroed", pairs=8)),
            ]
        )
    header = ["block", "seeds", "state (bytes)", *(f"{n} pairs" for n in PAIRS), "8, state zeroed"]
    verdict = judged(found.get("dpassm"), TRAINED, 0.95, pairs=8)
    parts = [
        "Pairs of key and value at the beginning, and a question for every key at least "
        f"{REACH + 1} tokens later, in {TRAINED} tokens. One model for all numbers of pairs; a "
        "guess among the values in the sequence scores one divided by their number. The state is "
        f"what the model carries along after {TRAINED} tokens; that of vanilla and BigBird grows "
        "with every further token.",
        table(header, rows, words=True),
        f"Target: dpassm with 8 pairs, at least 95 %: {verdict}",
        _per_byte(found),
    ]
    return title, _text(parts), {"mqar_by_state.png": figures.by_state(found, TRAINED, PAIRS)}


def _per_byte(found: ByBlock) -> str:
    """Which block remembers most, and which most for the size of its state."""
    most = max(PAIRS)
    accuracies: dict[str, float] = {}
    per_kib: dict[str, float] = {}
    for block, seeds in found.items():
        row = at(seeds[0], TRAINED)
        assert row is not None
        accuracy = statistics.median(values(seeds, TRAINED, "accuracy", pairs=most))
        accuracies[figures.label(block)] = accuracy
        per_kib[figures.label(block)] = most * accuracy / (row["state_bytes"] / 1024)

    def ranked(numbers: dict[str, float], digits: int) -> str:
        order = sorted(numbers.items(), key=lambda item: -item[1])
        return ", ".join(f"{label} {number:.{digits}f}" for label, number in order)

    return (
        f"Accuracy with {most} pairs, the best first: {ranked(accuracies, 3)}. Pairs that are "
        f"answered correctly for each KiB of state: {ranked(per_kib, 2)}."
    )


def drifting(results: list[Result]) -> Section:
    """Loss in a stream of real text."""
    carried, reset = (
        of([r for r in results if r.get("anew", False) == anew], "drift") for anew in (False, True)
    )
    title = "Streaming perplexity: does the loss drift?"
    if not carried:
        return title, "", {}
    rows: list[list[str]] = []
    verdicts: list[str] = []
    for group, addition in ((carried, ""), (reset, ", reset at each file")):
        for block, seeds in group.items():
            label = figures.label(block) + addition
            rows += [_drift_row(label, r) for r in seeds]
            up = sum(r["slope"]["low"] > 0 for r in seeds)
            verdicts.append(f"- {label}: {up} of {len(seeds)} seeds drift upwards")
    first = next(iter(carried.values()))[0]
    trained = first["training_length"]
    header = [
        "block",
        "seed",
        "parameters",
        f"loss up to {trained}",
        "loss after it",
        f"state zeroed every {first['zeroed_every']}",
        "slope (nats per 1000 bytes, 95 % interval)",
        "state (bytes)",
        "bytes/s",
    ]
    parts = [
        "Byte models of a million parameters, trained by longctx_layers.training.train for "
        f"{first['steps']} steps on the standard library's source files in rows of {trained} "
        "bytes, with the state carried from row to row and from file to file. They then read "
        f"{first['stream_length']:,} bytes of held-out files as one stream. The same text is read "
        f"from {first['rotations']} starting points, so that each part is read at as many "
        "positions, and the slope is that of the loss over the position with the text held fixed, "
        f"from position {trained} on; it drifts upwards if its whole interval is above 0. Models "
        "whose state is reset at each file in training never see states as old as the stream's. "
        "Loss in nats per byte.",
        table(header, rows, words=True),
        "\n".join(verdicts),
    ]
    return title, _text(parts), {"drift.png": figures.by_position(carried)}


def _drift_row(label: str, r: Result) -> list[str]:
    # Rounded, and with 0.0 added, which makes 0.0 of -0.0.
    slope, low, high = (round(r["slope"][name], 6) + 0.0 for name in ("mean", "low", "high"))
    zeroed = r["loss_state_zeroed"]
    return [
        label,
        str(r["seed"]),
        f"{r['parameters']:,}",
        f"{r['first']:.4f}",
        f"{r['loss']:.4f}",
        "-" if zeroed is None else f"{zeroed:.4f}",
        f"{slope:.6f} ({low:.6f} to {high:.6f})",
        f"{r['state_bytes_held']:,}",
        f"{r['tokens_per_second']:,.0f}",
    ]
