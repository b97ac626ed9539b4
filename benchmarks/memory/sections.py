"""What docs/results.md says of each proof: a table, every seed, and whether a target is reached."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.memory import figures as figures
from benchmarks.memory.plan import FARTHEST, PAIRS, REACH, TRAINED
from benchmarks.memory.tables import Result, at, judged, of, seeds_of, shown, table, values

CHANGES = ("as_is", "first_early", "last_early", "preceded")  # of a value told at 0%


def at_training_length(found: dict[str, list[Result]]) -> str:
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
    return table(header, rows)


def lengths_of(found: dict[str, list[Result]]) -> list[int]:
    """All lengths that were asked at."""
    return sorted({row["length"] for s in found.values() for r in s for row in r["rows"]})


def at_lengths(found: dict[str, list[Result]], lengths: Sequence[int]) -> str:
    """The table of accuracy by length."""
    rows = [
        [figures.label(block), *(shown(values(seeds, n, "accuracy")) for n in lengths)]
        for block, seeds in found.items()
    ]
    return table(["block", *(f"{length:,}" for length in lengths)], rows)


def passkey(results: list[Result]) -> tuple[str, str, dict[str, bytes]]:
    """Passkey, at the training length and far beyond it."""
    found = of(results, "passkey")
    name = "Passkey, and how far it carries"
    if not found:
        return name, "", {}
    lengths = lengths_of(found)
    targets = [
        f"- {block} at {length:,} tokens, at least {target:.0%}: "
        f"{judged(found.get(block), length, target)}"
        for block in ("dpassm", "blade")
        for length, target in ((TRAINED, 0.99), (16 * TRAINED, 0.95))
    ]
    text = (
        "One value among noise of the same 32 symbols, told anywhere and asked for at the end; a "
        f"guess scores 0.031. At {TRAINED} tokens, the training length:\n\n"
        + at_training_length(found)
        + f"\nThe same models at up to {max(lengths):,} tokens:\n\n"
        + at_lengths(found, lengths)
        + "\nTargets:\n\n"
        + "\n".join(targets)
        + "\n"
    )
    text += _depths(of(results, "depths"))
    return name, text, {"passkey_by_length.png": figures.by_length(found, TRAINED, FARTHEST)}


def _depths(found: dict[str, list[Result]]) -> str:
    """Accuracy by where the value was told, in long sequences; nothing if none was measured."""
    if not found:
        return ""
    one = next(iter(found.values()))[0]
    rows = [
        [figures.label(block), str(r["seed"]), *(f"{row['accuracy']:.3f}" for row in r["rows"])]
        for block, seeds in found.items()
        for r in seeds
    ]
    header = ["block", "seed", *(f"told at {row['depth']:.0%}" for row in one["rows"])]
    return (
        f"\nThe same by where the value was told, in {one['length']:,} tokens ({one['n']} "
        "sequences each). Told late, it has more noise before it and a shorter way to its "
        "question.\n\n" + table(header, rows) + "\n" + _exchanges(found)
    )


def _exchanges(found: dict[str, list[Result]]) -> str:
    """What an early state of one layer changes."""
    one = next(iter(found.values()))[0]
    rows = [
        [figures.label(block), *(shown([r[what] for r in seeds]) for what in CHANGES)]
        for block, seeds in found.items()
    ]
    return (
        f"Told at 0%, with a layer's recurrent state exchanged, {TRAINED} tokens before the "
        f"question, for the one that it had after {one['early']:,} tokens. Where the first layer's "
        "brings the answer back, the value was never lost: that layer's state goes on taking in "
        "noise, and what it then adds keeps the last layer from reading. The last layer's early "
        "state has the value too: where it gains nothing, nothing was lost there. In the last "
        f"column {one['before']} tokens of noise stand before the value: a model that seldom met "
        "one as its very first tokens may not take it in.\n\n"
        + table(
            ["block", "as it is", "first layer's exchanged", "last layer's", "not quite first"],
            rows,
        )
    )


def copying(results: list[Result]) -> tuple[str, str, dict[str, bytes]]:
    """Copying four tokens."""
    found = of(results, "copy_recall")
    name = "Copy and recall"
    if not found:
        return name, "", {}
    targets = [
        f"- {block} at {TRAINED} tokens, at least 99 %: {judged(found.get(block), TRAINED, 0.99)}"
        for block in ("dpassm", "blade")
    ]
    text = (
        "Four tokens told at the beginning, asked for in order at the end, each with those before "
        "it given; a guess scores 0.031. The global keys of Longformer and BigBird see the first "
        f"one. At {TRAINED} tokens:\n\n"
        + at_training_length(found)
        + "\nBy length:\n\n"
        + at_lengths(found, lengths_of(found))
        + "\nTargets:\n\n"
        + "\n".join(targets)
        + "\n"
    )
    return name, text, {}


def associative(results: list[Result]) -> tuple[str, str, dict[str, bytes]]:
    """Multi-query associative recall, and what it costs in state."""
    found = of(results, "mqar")
    name = "Associative recall, by pairs and by bytes of state"
    if not found:
        return name, "", {}
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
    text = (
        f"Pairs of key and value at the beginning, every key asked for once, at least {REACH + 1} "
        f"tokens later, in {TRAINED} tokens. One model for all numbers of pairs; a guess among the "
        "told values scores one by their number. The state is what the model carries behind "
        f"{TRAINED} tokens; that of vanilla and BigBird grows with every further token.\n\n"
        + table(header, rows)
        + f"\nTarget: dpassm with 8 pairs, at least 95 %: "
        f"{judged(found.get('dpassm'), TRAINED, 0.95, pairs=8)}\n\n"
        f"{_per_byte(found)}\n"
    )
    return name, text, {"mqar_by_state.png": figures.by_state(found, TRAINED, PAIRS)}


def _per_byte(found: dict[str, list[Result]]) -> str:
    """Who remembers most, and who most for its state."""
    most = max(PAIRS)
    known, per_kib = {}, {}
    for block, seeds in found.items():
        row = at(seeds[0], TRAINED)
        assert row is not None
        accuracy = statistics.median(values(seeds, TRAINED, "accuracy", pairs=most))
        known[figures.label(block)] = accuracy
        per_kib[figures.label(block)] = most * accuracy / (row["state_bytes"] / 1024)

    def ranked(numbers: dict[str, float], digits: int) -> str:
        order = sorted(numbers.items(), key=lambda item: -item[1])
        return ", ".join(f"{label} {number:.{digits}f}" for label, number in order)

    return (
        f"With {most} pairs, from the best down: {ranked(known, 3)}. Of them answered for each KiB "
        f"of state: {ranked(per_kib, 2)}."
    )


def drifting(results: list[Result]) -> tuple[str, str, dict[str, bytes]]:
    """Loss over a stream of real text."""
    found, anew = (
        of([r for r in results if r.get("anew", False) == one], "drift") for one in (False, True)
    )
    name = "Streaming perplexity: does the loss drift?"
    if not found:
        return name, "", {}
    rows, verdicts = [], []
    for group, addition in ((found, ""), (anew, ", begun anew at each file")):
        for block, seeds in group.items():
            label = figures.label(block) + addition
            rows += [_drift_row(label, r) for r in seeds]
            up = sum(r["slope"]["low"] > 0 for r in seeds)
            verdicts.append(f"- {label}: {up} of {len(seeds)} seeds drift upwards")
    one = next(iter(found.values()))[0]
    header = [
        "block", "seed", "parameters", f"loss up to {one['training_length']}", "loss after it",
        f"state zeroed every {one['zeroed_every']}", "slope (nats per 1000 bytes, 95 % interval)",
        "state (bytes)", "bytes/s",
    ]  # fmt: skip
    text = (
        f"Byte models of a million parameters, trained by examples/train.py for {one['steps']} "
        f"steps on the standard library's source files in rows of {one['training_length']} bytes, "
        "the state carried from row to row and from file to file, then read "
        f"{one['stream_length']:,} bytes of held-out files as one stream. The same text is read "
        f"from {one['rotations']} beginnings, so that each part stands at as many positions, and "
        "the slope is that of the loss over the position with the text held fixed, from position "
        f"{one['training_length']} on; it drifts upwards if its whole interval is above 0. Begun "
        "anew at each file in training, the model never sees as old a state as the stream's. Loss "
        "in nats per byte.\n\n" + table(header, rows) + "\n" + "\n".join(verdicts) + "\n"
    )
    return name, text, {"drift.png": figures.by_position(found)}


def _drift_row(label: str, r: Result) -> list[str]:
    slope, zeroed = r["slope"], r["loss_state_zeroed"]
    return [
        label, str(r["seed"]), f"{r['parameters']:,}", f"{r['first']:.4f}", f"{r['loss']:.4f}",
        "-" if zeroed is None else f"{zeroed:.4f}",
        "{} ({} to {})".format(*(f"{slope[k]:z.6f}" for k in ("mean", "low", "high"))),
        f"{r['state_bytes_held']:,}", f"{r['tokens_per_second']:,.0f}",
    ]  # fmt: skip
