"""Train every block at the same size, on the same text and steps, and compare what they learnt.

    make compare        (or: python examples/compare.py --help)

Each block is trained by examples/train.py in a process of its own, then measured on files that it
never saw: the same tokens once in pieces of the training length, and once in sequences of 8 times
that length. An interrupted comparison goes on where it stopped: a block that is done is not trained
again, and one that is not goes on from its last checkpoint. Flags that are not this program's go to
examples/train.py: `--trainer.precision=bf16-mixed`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx_layers import LongContextLM
from longctx_layers.data.module import LongContextData
from longctx_layers.evals import buckets
from longctx_layers.files import write
from longctx_layers.reports.figures import (
    lengths_along,
    mark_place,
    new_figure,
    png,
    style_of,
    without_the_fall,
)
from longctx_layers.reports.files import add_output
from longctx_layers.reports.logs import scalars, versions
from longctx_layers.training.checkpoints import newest_checkpoint, read_checkpoint

LONGER = 8
HELD_OUT = 0.1  # of the documents


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--num-params", default="3m")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512, help="in training")
    parser.add_argument("--window-size", type=int, default=16, help="a chunk is twice as long")
    parser.add_argument("--state-dim", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--documents", type=int, default=32, help="to measure on")
    parser.add_argument("--dataset-name", default="stdlib")
    parser.add_argument("--dataset-config", help="for --dataset-name=local, a path")
    parser.add_argument("--logs", type=Path, default=Path("logs/compare"))
    add_output(parser, "--output-dir", "compare")
    args, further = parser.parse_known_args(argv)
    wrong = [flag for flag in further if not flag.startswith(("--model.", "--data.", "--trainer."))]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}; see --help")
    return args, further


def options(block: str, args: argparse.Namespace) -> dict[str, int]:
    """The block's own options: a query sees about as many near keys in a chunk as in a window."""
    if block == "vanilla":
        return {}
    if block == "blade":
        return {"chunk_size": 2 * args.window_size, "state_dim": args.state_dim}
    state = {"ssm_state_dim": args.state_dim} if block == "dpassm" else {}
    return {"window_size": args.window_size, **state}


def flags(block: str, args: argparse.Namespace, further: list[str]) -> list[str]:
    """Those of examples/train.py."""
    given = {
        "model.num_params": args.num_params,
        "model.block": block,
        **{f"model.{name}": value for name, value in options(block, args).items()},
        "model.learning_rate": args.learning_rate,
        "data.dataset_name": args.dataset_name,
        "data.dataset_config": args.dataset_config,
        "data.seq_len": args.seq_len,
        "data.batch_size": args.batch_size,
        "data.validation_fraction": HELD_OUT,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": args.steps,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": False,
    }
    return [f"--{name}={value}" for name, value in given.items() if value is not None] + further


def train(command: list[str], root: Path) -> Path:
    """Train a block, or go on with it; returns its last checkpoint."""
    program = [sys.executable, "-m", "longctx_layers.training.train", "fit", *command]
    program += [f"--trainer.default_root_dir={root}", "--checkpoint.every_n_steps=50"]
    subprocess.run([*program, "--checkpoint.keep=1", "--ckpt_path=last"], check=True)
    checkpoint = newest_checkpoint(root)
    assert checkpoint is not None
    return checkpoint


def stretches(args: argparse.Namespace, further: list[str]) -> Tensor:
    """`[n, 8 T + 1]` ids: the beginning of each held-out document that is long enough."""
    given = dict(f.removeprefix("--data.").split("=", 1) for f in further if "--data." in f)
    data = LongContextData(
        args.dataset_name,
        args.dataset_config,
        validation_fraction=HELD_OUT,
        tokenizer=given.get("tokenizer", "bytes"),
        cache_dir=given.get("cache_dir"),
    )
    data.setup("fit")
    length = LONGER * args.seq_len + 1
    documents = (data.store.document(number) for number in data.validation)
    found = [torch.from_numpy(d[:length].astype("int64")) for d in documents if len(d) >= length]
    if len(found) < 2:
        raise SystemExit(
            f"error: expected at least 2 held-out documents of {length} tokens, got {len(found)}; "
            "choose a smaller --seq-len or longer documents"
        )
    return torch.stack(found[: args.documents])


@torch.no_grad()
def token_losses(model: LongContextLM, ids: Tensor, length: int) -> Tensor:
    """Loss of each token `[n, 8 T]` in nats, read in sequences of `length` that begin anew."""
    x, y = (z.reshape(-1, length) for z in (ids[:, :-1], ids[:, 1:]))
    at_once = max(1, 8192 // length)
    pairs = zip(x.split(at_once), y.split(at_once), strict=True)
    losses = [model.loss(a, b, reduction="none") for a, b in pairs]
    return torch.cat(losses).view(len(ids), -1)


def measure(checkpoint: Path, ids: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """What a trained block knows, and what its training cost."""
    model, _ = read_checkpoint(checkpoint)
    root = checkpoint.parents[1]
    losses = {n: token_losses(model, ids, n) for n in (args.seq_len, LONGER * args.seq_len)}
    counts = model.parameter_counts()
    logged = scalars(versions(root))
    return {
        "parameters": sum(counts.values()),
        "mixer_parameters": counts["mixers"],
        "ffn_dim": model.config.ffn_dim,
        "train_loss": sorted(logged["train_loss"].items()),
        "peak_memory_gib": max(logged["peak_memory_gib"].values()),
        "validation": {
            str(n): {
                "loss": x.mean().item(),
                "perplexity": math.exp(x.mean().item()),
                "by_document": x.mean(1).tolist(),
                "by_position": x.view(-1, n).mean(0).tolist(),
            }
            for n, x in losses.items()
        },
    }


def speeds(checkpoints: dict[str, Path], ids: Tensor, rounds: int = 7) -> dict[str, float]:
    """Tokens per second of a loss with its gradients; the blocks take turns, medians of rounds."""
    models = {block: read_checkpoint(path)[0].train() for block, path in checkpoints.items()}
    seconds: dict[str, list[float]] = {block: [] for block in models}
    for turn in range(rounds + 1):
        for block, model in models.items():
            begin = time.perf_counter()
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            if turn:  # the first is a warm-up
                seconds[block].append(time.perf_counter() - begin)
    return {b: ids[:, 1:].numel() / statistics.median(taken) for b, taken in seconds.items()}


# ---- The page

BLOCKS = (
    "vanilla",
    "dpassm",
    "blade",
    "baseline_longformer",
    "baseline_bigbird",
    "window",
)


def draw_losses(metrics: dict[str, Any]) -> bytes:
    """Training loss by step, the last tenth of the axis's range in view, as a PNG."""
    figure, axes = new_figure(
        "Training: same tokens, same number of parameters",
        "training step",
        "training loss (nats per token)",
    )
    for block, result in metrics["blocks"].items():
        colour, mark, label = style_of(block)
        steps, losses = zip(*result["train_loss"], strict=True)
        axes.plot(
            steps, losses, color=colour, marker=mark, markersize=4, label=label,
            markevery=max(1, len(steps) // 12),
        )  # fmt: skip
    lasts = [loss for r in metrics["blocks"].values() for _, loss in r["train_loss"][1:]]
    without_the_fall(axes, lasts)
    return png(figure, axes)


def draw_positions(metrics: dict[str, Any]) -> bytes:
    """Validation loss by position in the long sequences, as a PNG."""
    figure, axes = new_figure(
        "Loss by position, in files that no model saw",
        "position in the sequence (tokens)",
        "validation loss (nats per token)",
    )
    for block, result in metrics["blocks"].items():
        colour, mark, label = style_of(block)
        length = max(result["validation"], key=int)
        rows = buckets(result["validation"][length]["by_position"])
        places = [math.sqrt(first * last) for first, last, _ in rows]
        means = [mean for *_, mean in rows]
        axes.plot(places, means, color=colour, marker=mark, markersize=5, label=label)
    lengths_along(axes)
    mark_place(axes, metrics["settings"]["seq_len"], "training\nlength")
    return png(figure, axes)


def draw_lengths(metrics: dict[str, Any]) -> bytes:
    """Perplexity against training speed, at both lengths, as a PNG."""
    figure, axes = new_figure(
        "What a block learnt, and how fast it trains",
        "training speed (tokens per second)",
        "validation perplexity per token",
    )
    for block, result in metrics["blocks"].items():
        colour, mark, label = style_of(block)
        short, long = (v["perplexity"] for _, v in sorted(_by_length(result)))
        speed = result["tokens_per_second"]
        axes.plot([speed, speed], [short, long], color=colour, linewidth=1)
        axes.plot(speed, short, mark, color=colour, markersize=8, label=label)
        axes.plot(speed, long, mark, color=colour, markersize=8, markerfacecolor="white")
    axes.plot([], [], "o", color="#555555", label="filled: training length")
    axes.plot(
        [], [], "o", color="#555555", markerfacecolor="white", label="hollow: 8 x that length"
    )
    axes.set_xlim(left=0)
    return png(figure, axes)


def _by_length(result: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return [(int(n), v) for n, v in result["validation"].items()]


def paired(first: list[float], second: list[float]) -> tuple[float, float]:
    """Mean difference of two rows, and half of its 95 % interval (normal, paired)."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return mean, 1.96 * math.sqrt(variance / len(differences))


def page(metrics: dict[str, Any]) -> str:
    """The Markdown page."""
    settings, blocks = metrics["settings"], metrics["blocks"]
    trained = settings["seq_len"]
    long = max(int(n) for n in next(iter(blocks.values()))["validation"])
    seen = settings["steps"] * settings["batch_size"] * trained
    rows = []
    for block, r in blocks.items():
        gain = "-"
        if "window" in blocks and block != "window":
            mean, half = paired(
                *(b["validation"][str(long)]["by_document"] for b in (blocks["window"], r))
            )
            gain = f"{mean:.3f} ± {half:.3f}"
        rows.append(
            f"| {style_of(block)[2]} | {r['parameters']:,} | "
            f"{r['validation'][str(trained)]['perplexity']:.3f} | "
            f"{r['validation'][str(long)]['perplexity']:.3f} | {gain} | "
            f"{r['tokens_per_second']:,.0f} | {r['peak_memory_gib']:.2f} |"
        )
    measured = metrics["measured_on"]
    return "\n".join(
        [
            "# The blocks beside each other",
            "",
            f"`{metrics['command'].strip()}` on {metrics['machine']}. Every block saw the same "
            f"{seen:,} tokens of `{settings['dataset_name']}` in {settings['steps']} steps, in "
            f"sequences of {trained}; windows of {settings['window_size']}, BLADE's chunks of "
            f"{2 * settings['window_size']} (a query sees as many keys on average). Perplexity is "
            f"per token of the same {measured['tokens']:,} tokens of {measured['documents']} "
            f"documents that no model saw, once in sequences of {trained} that begin anew and once "
            f"in sequences of {long:,}. The gain is that in loss over the window alone at "
            f"{long:,}, paired by document, with its 95 % interval. The speed is that of a loss "
            "with its gradients, in float32, all blocks in turns.",
            "",
            f"| block | parameters | perplexity at {trained} | perplexity at {long:,} | gain over "
            "the window (nats) | training tokens/s | peak memory (GiB, whole process) |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "![training loss](loss_curves.png)",
            "",
            "![loss by position](loss_by_position.png)",
            "",
            "![perplexity and speed](lengths.png)",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args, further = parse(argv)
    ids = stretches(args, further)
    results, checkpoints = {}, {}
    for block in args.blocks:
        command = flags(block, args, further)
        # Other settings are another training: nothing is gone on with by mistake.
        key = hashlib.blake2b(f"{command} {len(ids)}".encode(), digest_size=4).hexdigest()
        root = args.logs / f"{block}-{key}"
        done = root / "result.json"
        checkpoint = newest_checkpoint(root)
        if checkpoint is None or not done.is_file():
            checkpoint = train(command, root)
            write(done, json.dumps(measure(checkpoint, ids, args)))
        results[block], checkpoints[block] = json.loads(done.read_text()), checkpoint
        found = {n: round(v["perplexity"], 3) for n, v in results[block]["validation"].items()}
        print(f"{block}: perplexity by length {found}", flush=True)
    batch = ids[: args.batch_size, : args.seq_len + 1]
    for block, speed in speeds(checkpoints, batch).items():
        results[block]["tokens_per_second"] = speed
    given = sys.argv[1:] if argv is None else argv
    metrics = {
        "command": " ".join(["python examples/compare.py", *given]),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "measured_on": {"documents": ids.shape[0], "tokens": ids[:, 1:].numel()},
        "blocks": results,
    }
    write(args.output_dir / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    for name, draw in (
        ("loss_curves", draw_losses),
        ("loss_by_position", draw_positions),
        ("lengths", draw_lengths),
    ):
        write(args.output_dir / f"{name}.png", draw(metrics))
    report = page(metrics)
    write(args.output_dir / "report.md", report)
    print("\n" + report + f"\nWritten to {args.output_dir}/")
    return metrics


if __name__ == "__main__":
    main()
