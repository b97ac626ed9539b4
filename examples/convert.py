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
import platform
import random
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from longctx_layers.command_line import add_output
from longctx_layers.convert import convert_attention
from longctx_layers.data.byte_text import documents, split, stretch, windows
from longctx_layers.files import write

OPTIONS: dict[str, dict[str, Any]] = {"dpassm": {"ssm_state_dim": 16}, "window": {}}
KINDS = tuple(OPTIONS)
FRESH = ("state_space", "gate_proj", "norm_s")  # in a converted layer
STEPS = ("converted", "layers matched", "then trained")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of pretraining")
    parser.add_argument("--matching-steps", type=int, default=80, help="layer by layer")
    parser.add_argument("--tuning-steps", type=int, default=120, help="of the whole model")
    parser.add_argument("--window-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512, help="in training")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="of the model, a multiple of 16")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--validation-documents", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="a file or folder of text, instead of the stdlib")
    add_output(parser, "--output-dir", "convert")
    args = parser.parse_args(argv)
    if args.width % 16:
        parser.error(f"--width: expected a multiple of 16, got {args.width}")
    if not 0 < args.window_size < args.sequence_length:
        parser.error(
            f"--window-size: expected less than --sequence-length {args.sequence_length}, got "
            f"{args.window_size}"
        )
    return args


def paired(first: Tensor, second: Tensor) -> dict[str, float]:
    """Mean difference of two rows of losses `[n]`, with its 95 % interval (normal, paired)."""
    difference = (first - second).double()
    half = 1.96 * difference.std().item() / math.sqrt(len(difference))
    mean = difference.mean().item()
    return {"mean": mean, "low": mean - half, "high": mean + half}


def small_llama(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256, hidden_size=args.width, intermediate_size=11 * args.width // 4,
        num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=args.sequence_length, tie_word_embeddings=True,
        initializer_range=args.width**-0.5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def groups(module: torch.nn.Module, rate: float) -> list[dict[str, Any]]:
    """Parameters for the optimizer: those of the state, which begin at nothing, learn faster."""
    kept, fresh, scales = [], [], []
    for name, parameter in module.named_parameters():
        # Their full names: a Llama's feed-forward layer has a gate_proj, too.
        state = any(f"layer.{part}" in name for part in FRESH)
        scale = parameter.dim() == 1 or "norm_s" in name
        (kept if not state else scales if scale else fresh).append(parameter)
    return [
        {"params": kept, "lr": rate},
        {"params": fresh, "lr": 5 * rate},
        {"params": scales, "lr": 5 * rate, "weight_decay": 0.0},
    ]


def optimize(
    what: str,
    parameters: list[dict[str, Any]],
    loss_of: Callable[[Tensor], Tensor],
    found: list[bytes],
    steps: int,
    args: argparse.Namespace,
) -> None:
    """AdamW with warm-up, a cosine and clipping on `loss_of(ids)`, ids `[B, T + 1]`."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)
    clipped = [p for group in parameters for p in group["params"]]
    warm_up = max(1, steps // 10)

    def share(step: int) -> float:
        return min(1, (step + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    draw = random.Random(args.seed)
    bar = tqdm(range(steps), desc=what, unit="step", disable=None)
    for step in bar:
        loss = loss_of(windows(found, args.batch_size, args.sequence_length, draw))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
        if bar.disable and (step + 1) % max(1, steps // 5) == 0:
            print(f"{what}, step {step + 1}: loss {loss.item():.3f}", flush=True)


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
def token_losses(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """`[n, T]`, in nats."""
    model.eval()
    rows = []
    for row in ids:
        logits = model(row[None, :-1], use_cache=False).logits
        rows.append(F.cross_entropy(logits[0], row[1:], reduction="none"))
    model.train()
    return torch.stack(rows)


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
    losses, sizes, caches = {}, {}, {}

    def measure(row: str, model: LlamaForCausalLM) -> None:
        losses[row], caches[row] = token_losses(model, checks), cache_bytes(model, length)
        sizes[row] = sum(p.numel() for p in model.parameters())

    teacher = small_llama(args)
    optimize(
        "pretraining", groups(teacher, 2e-3), lambda ids: text_loss(teacher, ids),
        training, args.steps, args,
    )  # fmt: skip
    measure("original", teacher)
    for kind in KINDS:
        student = deepcopy(teacher)
        convert_attention(student, kind, window_size=args.window_size, **OPTIONS[kind])
        converted, match, tune = (f"{kind}, {step}" for step in STEPS)
        measure(converted, student)
        own = torch.nn.ModuleList(block.self_attn for block in student.model.layers)
        optimize(
            match, groups(own, 1e-3),
            lambda ids, student=student: matching_loss(teacher, student, ids),
            training, args.matching_steps, args,
        )  # fmt: skip
        measure(match, student)
        optimize(
            tune, groups(student, 1e-3), lambda ids, student=student: text_loss(student, ids),
            training, args.tuning_steps, args,
        )  # fmt: skip
        measure(tune, student)
    # As long again as the conversions were trained, so that time alone is no advantage.
    optimize(
        "original, trained on", groups(teacher, 1e-3), lambda ids: text_loss(teacher, ids),
        training, args.tuning_steps, args,
    )  # fmt: skip
    measure("original, trained on", teacher)
    return losses, sizes, caches


def page(
    losses: dict[str, Tensor],
    sizes: dict[str, int],
    caches: dict[str, int],
    command: str,
    args: argparse.Namespace,
) -> str:
    window, trained = args.window_size, args.sequence_length
    last = next(iter(losses.values())).shape[1]
    parts = {
        f"1 to {window}": slice(0, window),
        f"{window + 1} to {trained}": slice(window, trained),
        f"{trained + 1} to {last}": slice(trained, last),
    }
    lines = [
        "# A small Llama, converted",
        "",
        f"Loss in nats per byte on {len(next(iter(losses.values())))} files that no model saw, by "
        f"position. Trained on {trained} bytes at a time; the window has {window}, in each of "
        f"{args.layers} layers. Cache: of one sequence of {last} bytes.",
        "",
        f"| model | parameters | {' | '.join(parts)} | cache |",
        "|---|---|" + "---|" * (len(parts) + 1),
    ]
    for row, values in losses.items():
        means = " | ".join(f"{values[:, part].mean().item():.3f}" for part in parts.values())
        lines.append(f"| {row} | {sizes[row]:,} | {means} | {caches[row] / 1024:,.0f} KiB |")
    beyond = slice(window, trained)
    first, second = (losses[f"{kind}, then trained"][:, beyond].mean(1) for kind in KINDS[::-1])
    gain = paired(first, second)
    lines += [
        "",
        f"The state's part, {window + 1} to {trained}: the window alone is worse by "
        f"{gain['mean']:.3f} (95 % interval {gain['low']:.3f} to {gain['high']:.3f}, paired by "
        "file).",
        "",
        f"`{command}`, {platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}.",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Tensor]:
    args = parse(argv)
    losses, sizes, caches = run(args)
    command = " ".join(["python examples/convert.py", *(sys.argv[1:] if argv is None else argv)])
    report = page(losses, sizes, caches, command, args)
    write(args.output_dir / "report.md", report)
    print("\n" + report + f"\nWritten to {args.output_dir}/")
    return losses


if __name__ == "__main__":
    main()
