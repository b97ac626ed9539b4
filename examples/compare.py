"""Train every block at the same size, on the same text and steps, and compare what they learnt.

    make compare        (or: python examples/compare.py --help)

Each block is trained by longctx_layers.training.train in a process of its own, then measured on
files that it never saw: the same tokens once in sequences of the training length, and once in
sequences of 8 times that length. The same command continues an interrupted comparison: blocks that
are done are not trained again, the others continue from their last checkpoint. Flags that begin
with --model., --data. or --trainer. go to the training program: `--trainer.precision=bf16-mixed`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx_layers.command_line import Parser, add_output
from longctx_layers.data.module import LongContextData
from longctx_layers.evals import buckets, paired_interval, token_losses
from longctx_layers.files import write, write_all
from longctx_layers.info import machine
from longctx_layers.reports import figures
from longctx_layers.reports.logs import scalars, versions
from longctx_layers.reports.markdown import table
from longctx_layers.training.checkpoint_files import newest_checkpoint
from longctx_layers.training.checkpoints import load_trained

BLOCKS = (
    "vanilla",
    "dpassm",
    "blade",
    "baseline_longformer",
    "baseline_bigbird",
    "window",
)
LONGER = 8
HELD_OUT = 0.1  # of the documents
PASSED_ON = ("--model.", "--data.", "--trainer.")


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--num_params", default="3m")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=512, help="in training")
    parser.add_argument("--window_size", type=int, default=16, help="a chunk is twice as long")
    parser.add_argument("--state_dim", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--documents", type=int, default=32, help="to measure on")
    parser.add_argument("--dataset_name", default="stdlib")
    parser.add_argument("--dataset_config", help="for --dataset_name=local, a path")
    parser.add_argument("--logs", type=Path, default=Path("logs/compare"))
    add_output(parser, "--output_dir", "compare")
    args, further = parser.parse_known_args(argv)
    unknown = [flag for flag in further if not flag.startswith(PASSED_ON)]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args, further


def options(block: str, args: argparse.Namespace) -> dict[str, int]:
    """The block's own options: a query sees about as many near keys in a chunk as in a window."""
    if block == "vanilla":
        return {}
    if block == "blade":
        return {"chunk_size": 2 * args.window_size, "state_dim": args.state_dim}
    state = {"ssm_state_dim": args.state_dim} if block == "dpassm" else {}
    return {"window_size": args.window_size, **state}


def training_flags(block: str, args: argparse.Namespace, further: list[str]) -> list[str]:
    """The flags of the training program."""
    values = {
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
    return [f"--{name}={value}" for name, value in values.items() if value is not None] + further


def train(flags: list[str], root: Path) -> Path:
    """Train a block, or continue; returns its last checkpoint."""
    command = [sys.executable, "-m", "longctx_layers.training.train", "fit", *flags]
    command += [f"--trainer.default_root_dir={root}", "--checkpoint.every_n_steps=50"]
    subprocess.run([*command, "--checkpoint.keep=1", "--ckpt_path=last"], check=True)
    checkpoint = newest_checkpoint(root)
    assert checkpoint is not None
    return checkpoint


def held_out_text(args: argparse.Namespace, further: list[str]) -> Tensor:
    """`[n, 8 T + 1]` ids: the beginning of each held-out document that is long enough."""
    data_flags = [f.removeprefix("--data.") for f in further if f.startswith("--data.")]
    values = dict(flag.split("=", 1) for flag in data_flags)
    data = LongContextData(
        args.dataset_name,
        args.dataset_config,
        validation_fraction=HELD_OUT,
        tokenizer=values.get("tokenizer", "bytes"),
        cache_dir=values.get("cache_dir"),
    )
    data.setup("fit")
    length = LONGER * args.seq_len + 1
    documents = (data.store.document(int(number)) for number in data.validation)
    rows = [torch.from_numpy(d[:length].astype("int64")) for d in documents if len(d) >= length]
    if len(rows) < 2:
        raise SystemExit(
            f"error: expected at least 2 held-out documents of {length} tokens, got {len(rows)}; "
            "use a smaller --seq_len or longer documents"
        )
    return torch.stack(rows[: args.documents])


def measure(checkpoint: Path, ids: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """What a trained block knows, and what its training cost."""
    model = load_trained(checkpoint).model
    counts = model.parameter_counts()
    logged = scalars(versions(checkpoint.parents[1]))
    validation = {}
    for length in (args.seq_len, LONGER * args.seq_len):
        losses = token_losses(model, ids, length=length)
        validation[str(length)] = {
            "loss": losses.mean().item(),
            "perplexity": math.exp(losses.mean().item()),
            "by_document": losses.mean(1).tolist(),
            "by_position": buckets(losses.view(-1, length).mean(0).tolist()),
        }
    return {
        "parameters": sum(counts.values()),
        "mixer_parameters": counts["mixers"],
        "ffn_dim": model.config.ffn_dim,
        "train_loss": sorted(logged["train_loss"].items()),
        "peak_memory_gib": max(logged["peak_memory_gib"].values()),
        "validation": validation,
    }


def speeds(checkpoints: dict[str, Path], ids: Tensor, rounds: int = 7) -> dict[str, float]:
    """Tokens per second of a loss with its gradients; the blocks take turns, medians of rounds."""
    models = {block: load_trained(path).model.train() for block, path in checkpoints.items()}
    seconds: dict[str, list[float]] = {block: [] for block in models}
    for turn in range(rounds + 1):
        for block, model in models.items():
            begin = time.perf_counter()
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            if turn:  # the first is a warm-up
                seconds[block].append(time.perf_counter() - begin)
    return {b: ids[:, 1:].numel() / statistics.median(taken) for b, taken in seconds.items()}


def draw_losses(blocks: dict[str, Any]) -> bytes:
    """Training loss by step, without the steep beginning, as a PNG."""
    title = "Training: same tokens, same number of parameters"
    figure, axes = figures.new_figure(title, "training step", "training loss (nats per token)")
    for block, result in blocks.items():
        colour, mark, label = figures.style_of(block)
        steps, losses = zip(*result["train_loss"], strict=True)
        figures.draw_lines(axes, [figures.Line(steps, losses, label, colour, mark)])
    figures.without_the_fall(
        axes, [loss for r in blocks.values() for _, loss in r["train_loss"][1:]]
    )
    return figures.png(figure, axes)


def draw_by_position(blocks: dict[str, Any], trained: int) -> bytes:
    """Validation loss by position in the long sequences, as a PNG."""
    lines = []
    for block, result in blocks.items():
        colour, mark, label = figures.style_of(block)
        rows = result["validation"][str(LONGER * trained)]["by_position"]
        lines.append(figures.position_line(rows, label, colour, mark))
    title = "Loss by position, in files that no model saw"
    return figures.draw_positions(title, "token", lines, {"training\nlength": trained})


def draw_lengths(blocks: dict[str, Any]) -> bytes:
    """Perplexity against training speed, at both lengths, as a PNG."""
    figure, axes = figures.new_figure(
        "What a block learnt, and how fast it trains",
        "training speed (tokens per second)",
        "validation perplexity per token",
    )
    for block, result in blocks.items():
        colour, mark, label = figures.style_of(block)
        short, long = (v["perplexity"] for v in result["validation"].values())
        speed = result["tokens_per_second"]
        axes.plot([speed, speed], [short, long], color=colour, linewidth=1)
        axes.plot(speed, short, mark, color=colour, markersize=8, label=label)
        axes.plot(speed, long, mark, color=colour, markersize=8, markerfacecolor="white")
    hollow = f"hollow: {LONGER} x that length"
    axes.plot([], [], "o", color=figures.GREY, label="filled: training length")
    axes.plot([], [], "o", color=figures.GREY, markerfacecolor="white", label=hollow)
    axes.set_xlim(left=0)
    return figures.png(figure, axes)


def gain_over_window(block: str, blocks: dict[str, Any], length: int) -> str:
    """By how much the loss is below that of the window alone, paired by document."""
    if block == "window" or "window" not in blocks:
        return "-"
    window, own = (
        torch.tensor(blocks[name]["validation"][str(length)]["by_document"])
        for name in ("window", block)
    )
    interval = paired_interval(window, own)
    return f"{interval.mean:.3f} ± {interval.half:.3f}"


def page(metrics: dict[str, Any]) -> str:
    """The Markdown page."""
    settings, blocks, measured = metrics["settings"], metrics["blocks"], metrics["measured_on"]
    trained = settings["seq_len"]
    long = LONGER * trained
    n_tokens = settings["steps"] * settings["batch_size"] * trained
    rows = [
        [
            figures.style_of(block)[2],
            f"{r['parameters']:,}",
            *(f"{v['perplexity']:.3f}" for v in r["validation"].values()),
            gain_over_window(block, blocks, long),
            f"{r['tokens_per_second']:,.0f}",
            f"{r['peak_memory_gib']:.2f}",
        ]
        for block, r in blocks.items()
    ]
    header = [
        "block",
        "parameters",
        f"perplexity at {trained}",
        f"perplexity at {long:,}",
        "gain over the window (nats)",
        "training tokens/s",
        "peak memory (GiB, whole process)",
    ]
    parts = [
        "# The blocks compared",
        f"`{metrics['command']}` on {metrics['machine']}. Every block saw the same {n_tokens:,} "
        f"tokens of `{settings['dataset_name']}` in {settings['steps']} steps, in sequences of "
        f"{trained}; windows of {settings['window_size']}, BLADE's chunks of "
        f"{2 * settings['window_size']} (a query sees as many keys on average). Perplexity is per "
        f"token of the same {measured['tokens']:,} tokens of {measured['documents']} documents "
        f"that no model saw, once in separate sequences of {trained} and once in sequences of "
        f"{long:,}. The gain is the difference in loss to the window alone at {long:,}, paired by "
        "document, with its 95 % interval. The speed is that of a loss with its gradients, in "
        "float32; the blocks take turns.",
        table(header, rows),
        "![training loss](loss_curves.png)",
        "![loss by position](loss_by_position.png)",
        "![perplexity and speed](lengths.png)",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if argv is None else argv
    args, further = parse(arguments)
    ids = held_out_text(args, further)
    results: dict[str, Any] = {}
    checkpoints: dict[str, Path] = {}
    for block in args.blocks:
        flags = training_flags(block, args, further)
        # Other settings are another training, in another folder.
        key = hashlib.blake2b(f"{flags} {len(ids)}".encode(), digest_size=4).hexdigest()
        root = args.logs / f"{block}-{key}"
        measured = root / "measured.json"
        checkpoint = newest_checkpoint(root)
        if checkpoint is None or not measured.is_file():
            checkpoint = train(flags, root)
            write(measured, json.dumps(measure(checkpoint, ids, args)))
        results[block] = json.loads(measured.read_text())
        checkpoints[block] = checkpoint
        perplexity = {n: round(v["perplexity"], 3) for n, v in results[block]["validation"].items()}
        print(f"{block}: perplexity by length {perplexity}", flush=True)
    batch = ids[: args.batch_size, : args.seq_len + 1]
    for block, speed in speeds(checkpoints, batch).items():
        results[block]["tokens_per_second"] = speed
    metrics = {
        "command": " ".join(["python examples/compare.py", *arguments]),
        "machine": machine(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "measured_on": {"documents": ids.shape[0], "tokens": ids[:, 1:].numel()},
        "blocks": results,
    }
    files: dict[str, str | bytes] = {
        "report.md": page(metrics),
        "metrics.json": json.dumps(metrics, indent=1) + "\n",
        "loss_curves.png": draw_losses(results),
        "loss_by_position.png": draw_by_position(results, args.seq_len),
        "lengths.png": draw_lengths(results),
    }
    write_all(args.output_dir, files)
    print(f"\n{files['report.md']!s}\nWritten to {args.output_dir}/")
    return metrics


if __name__ == "__main__":
    main()
