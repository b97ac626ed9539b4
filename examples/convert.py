"""Convert a pretrained Llama to DPASSM: what the window costs, and what training gives back.

    python examples/convert.py --help

A small Llama learns Python's standard library, byte by byte, with full attention. Its attention is
then converted: to DPASSM, and to the window alone as a control. Both are trained in the two steps
that a large model would take: each layer first learns its original's outputs (on the original's
own inputs, so that all layers learn at once), then the whole model the loss. Each is measured on
files that none of them saw, at four times the training length, by position. Writes a page.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from longctx_layers.command_line import Parser, add_output
from longctx_layers.convert import convert_attention
from longctx_layers.data.byte_text import documents, split, stretch, windows
from longctx_layers.evals import paired_interval, token_losses
from longctx_layers.files import write
from longctx_layers.info import machine
from longctx_layers.reports.markdown import table
from longctx_layers.training.loop import ProgressBar, fit

OPTIONS: dict[str, dict[str, Any]] = {"dpassm": {"ssm_state_dim": 16}, "window": {}}
KINDS = tuple(OPTIONS)
NEW_PARTS = ("state_space", "gate_proj", "norm_s")  # of a converted layer
STEPS = ("converted", "layers matched", "then trained")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of pretraining")
    parser.add_argument("--matching_steps", type=int, default=80, help="layer by layer")
    parser.add_argument("--tuning_steps", type=int, default=120, help="of the whole model")
    parser.add_argument("--window_size", type=int, default=16)
    parser.add_argument("--sequence_length", type=int, default=512, help="in training")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="of the model, a multiple of 16")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--validation_documents", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="a file or folder of text, instead of the stdlib")
    add_output(parser, "--output_dir", "convert")
    args = parser.parse_args(argv)
    if args.width % 16:
        parser.error(f"--width: expected a multiple of 16, got {args.width}")
    if not 0 < args.window_size < args.sequence_length:
        parser.error(
            f"--window_size: expected less than --sequence_length {args.sequence_length}, got "
            f"{args.window_size}"
        )
    return args


def small_llama(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=11 * args.width // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=args.sequence_length,
        tie_word_embeddings=True,
        initializer_range=args.width**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def groups(module: torch.nn.Module, rate: float) -> list[dict[str, Any]]:
    """Parameters for the optimizer: those of the state path start from zero and learn faster."""
    pretrained: list[torch.nn.Parameter] = []
    new: list[torch.nn.Parameter] = []
    scales: list[torch.nn.Parameter] = []
    for name, parameter in module.named_parameters():
        # With `layer.`, because a Llama's feed-forward layer has a gate_proj as well.
        is_new = any(f"layer.{part}" in name for part in NEW_PARTS)
        is_scale = parameter.dim() == 1 or "norm_s" in name
        (pretrained if not is_new else scales if is_scale else new).append(parameter)
    return [
        {"params": pretrained, "lr": rate},
        {"params": new, "lr": 5 * rate},
        {"params": scales, "lr": 5 * rate, "weight_decay": 0.0},
    ]


def optimize(
    what: str,
    parameters: list[dict[str, Any]],
    loss_of: Callable[[Tensor], Tensor],
    text: list[bytes],
    steps: int,
    args: argparse.Namespace,
) -> None:
    """Minimize `loss_of(ids)` over random windows `[B, T + 1]` of the text."""
    draw = random.Random(args.seed)
    warmup = max(1, steps // 10)

    def loss_of_step(step: int) -> Tensor:
        return loss_of(windows(text, args.batch_size, args.sequence_length, draw))

    def schedule(step: int) -> float:
        return min(1, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))

    bar = ProgressBar(what, steps, lines=5)
    fit(parameters, loss_of_step, steps, weight_decay=0.05, schedule=schedule, progress=bar)


def text_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def matching_loss(teacher: LlamaForCausalLM, student: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Squared error of each layer's output on the teacher's inputs, over the output's square."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((kwargs["hidden_states"], output[0]))

    hooks = [
        block.self_attn.register_forward_hook(record, with_kwargs=True)
        for block in teacher.model.layers
    ]
    with torch.no_grad():
        teacher(ids[:, :-1], use_cache=False)
    for hook in hooks:
        hook.remove()
    losses = []
    for block, (x, target) in zip(student.model.layers, calls, strict=True):
        y, _ = block.self_attn(x)
        losses.append((y - target).square().mean() / target.square().mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def cache_bytes(model: LlamaForCausalLM, length: int) -> int:
    """What the cache of one sequence of this length holds."""
    cache = model(torch.zeros(1, length, dtype=torch.int64), use_cache=True).past_key_values
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "state", None) or (layer.keys, layer.values))
    ]
    return sum(tensor.nbytes for tensor in tensors)


def run(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, int], dict[str, int]]:
    """Losses `[documents, T]`, parameters and bytes of the cache, each by row of the table."""
    length = 4 * args.sequence_length
    training, held_out = split(documents(args.text, length + 2), args.seed)
    draw = random.Random(args.seed + 1)
    checks = torch.stack([stretch(d, length, draw) for d in held_out[: args.validation_documents]])
    losses: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    caches: dict[str, int] = {}

    def measure(row: str, model: LlamaForCausalLM) -> None:
        model.eval()
        losses[row] = token_losses(lambda ids: model(ids, use_cache=False).logits, checks)
        caches[row] = cache_bytes(model, length)
        sizes[row] = sum(p.numel() for p in model.parameters())
        model.train()

    def tune(what: str, model: LlamaForCausalLM, rate: float, steps: int) -> None:
        optimize(
            what, groups(model, rate), lambda ids: text_loss(model, ids), training, steps, args
        )

    teacher = small_llama(args)
    tune("pretraining", teacher, 2e-3, args.steps)
    measure("original", teacher)
    for kind in KINDS:
        student = deepcopy(teacher)
        convert_attention(student, kind, window_size=args.window_size, **OPTIONS[kind])
        converted, matched, trained = (f"{kind}, {step}" for step in STEPS)
        measure(converted, student)
        layers = torch.nn.ModuleList(block.self_attn for block in student.model.layers)
        matching = partial(matching_loss, teacher, student)
        optimize(matched, groups(layers, 1e-3), matching, training, args.matching_steps, args)
        measure(matched, student)
        tune(trained, student, 1e-3, args.tuning_steps)
        measure(trained, student)
    # The original is trained further as well, so that more training alone is no advantage.
    tune("original, trained on", teacher, 1e-3, args.tuning_steps)
    measure("original, trained on", teacher)
    return losses, sizes, caches


def page(
    losses: dict[str, Tensor],
    sizes: dict[str, int],
    caches: dict[str, int],
    command: str,
    args: argparse.Namespace,
) -> str:
    window = args.window_size
    trained = args.sequence_length
    n_documents, last = next(iter(losses.values())).shape
    ranges = {
        f"1 to {window}": slice(0, window),
        f"{window + 1} to {trained}": slice(window, trained),
        f"{trained + 1} to {last}": slice(trained, last),
    }
    rows = [
        [
            row,
            f"{sizes[row]:,}",
            *(f"{values[:, part].mean().item():.3f}" for part in ranges.values()),
            f"{caches[row] / 1024:,.0f} KiB",
        ]
        for row, values in losses.items()
    ]
    beyond = slice(window, trained)
    dpassm, alone = (losses[f"{kind}, {STEPS[-1]}"][:, beyond].mean(1) for kind in KINDS)
    gain = paired_interval(alone, dpassm)
    parts = [
        "# A small Llama, converted",
        f"Loss in nats per byte on {n_documents} files that no model saw, by position. Trained on "
        f"{trained} bytes at a time; the window has {window}, in each of {args.layers} layers. "
        f"Cache: of one sequence of {last} bytes.",
        table(["model", "parameters", *ranges, "cache"], rows),
        f"What the state contributes, at the positions {window + 1} to {trained}: the window alone "
        f"is worse by {gain.mean:.3f} (95 % interval {gain.low:.3f} to {gain.high:.3f}, paired by "
        "file).",
        f"`{command}`, {machine()}.",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Tensor]:
    arguments = sys.argv[1:] if argv is None else argv
    args = parse(arguments)
    losses, sizes, caches = run(args)
    command = " ".join(["python examples/convert.py", *arguments])
    report = page(losses, sizes, caches, command, args)
    write(args.output_dir / "report.md", report)
    print(f"\n{report}\nWritten to {args.output_dir}/")
    return losses


if __name__ == "__main__":
    main()
