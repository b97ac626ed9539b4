"""Streaming perplexity of a text model: the loss by position, far past its training length."""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx_layers import LongContextLM
from longctx_layers.evals import accuracy_interval, drift, has_memory, reach, rotations, stream
from longctx_layers.evals.program.models import Loaded, build, own
from longctx_layers.evals.program.plan import Plan, bar, row_of

PARTS = 100  # of the text, for the slope; each is read once in each rotation
SHORTEST_FORGETTING = 64


class Text(NamedTuple):
    """The text to read.

    Attributes:
        ids: `[T + 1]` tokens of documents that were held out, one behind the other.
        fingerprint: equal for equal ids.
        held_out: True where the model's training is known to have held it out; None where that is
            not known.
    """

    ids: Tensor
    fingerprint: str
    held_out: bool | None = None


def untrained(args: argparse.Namespace) -> Loaded:
    """A model of bytes with random weights."""
    from longctx_layers.data.tokenizers import ByteTokenizer

    tokenizer = ByteTokenizer()
    model = build(
        args.block, args.options, args.num_params, vocab_size=tokenizer.vocab_size, seed=args.seed
    )
    loaded = own(model)
    loaded.tokenizer, loaded.tokenizer_name = tokenizer, "bytes"
    return loaded


def prepare(args: argparse.Namespace, loaded: Loaded) -> Text:
    """The held-out documents of a dataset in the model's tokens, as long as the longest length.

    Raises:
        ValueError: if the model has no tokenizer, or the documents are too short together.
        ConnectionError: if the dataset is on the hub, and that out of reach.
    """
    if loaded.tokenizer is None:
        raise ValueError(
            "streaming_ppl: expected a model with a tokenizer, this one has none in its folder; "
            "write one with examples/export.py"
        )
    from longctx_layers.data.module import LongContextData

    split = {n: loaded.order[n] for n in ("seed", "validation_fraction") if n in loaded.order}
    data = LongContextData(
        args.dataset_name,
        args.dataset_config,
        tokenizer=loaded.tokenizer_name or "bytes",
        **split,
    )
    data.setup("fit")
    text = text_of(data, args.max_len, args.rotations, args.seed)
    # What a training that read a stream has held out is chosen otherwise.
    same = loaded.order.get("content") == data.content and not loaded.order["streaming"]
    return text._replace(held_out=True if same else None)


def text_of(data: Any, length: int, count: int, seed: int) -> Text:
    """`length` tokens of held-out documents, in an order drawn by the seed, cut to whole parts."""
    order = torch.randperm(
        len(data.validation), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    pieces, total = [], 0
    for place in order:
        pieces.append(torch.from_numpy(data.store.document(data.validation[place]).astype("int64")))
        total += len(pieces[-1])
        if total >= length:
            break
    if total < length:
        raise ValueError(
            f"--max_len: expected at most the {total:,} tokens of the {len(order)} held-out "
            f"documents of {data.dataset_name}, got {length:,}; take a larger dataset"
        )
    if length < 10 * count:
        raise ValueError(
            f"--max_len: expected at least {10 * count} tokens, ten for each of {count} "
            f"rotations, got {length}"
        )
    ids = torch.cat(pieces)[:length]
    return Text(ids, hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).hexdigest())


def part_of(length: int, count: int) -> int:
    """Tokens of a part: about a hundred parts, a multiple of the rotations."""
    return max(1, length // (count * math.ceil(PARTS / count)))


def measure(plan: Plan, model: LongContextLM) -> None:
    """Add the rows of all lengths; they come from one pass over the text."""
    args, text = plan.args, plan.text
    part = part_of(args.max_len, args.rotations)
    turned = rotations(text.ids, args.rotations, part)
    # The token after the last is the first again: every position has a next one.
    ids = torch.cat([turned, turned[:, :1]], dim=1)
    every = max(SHORTEST_FORGETTING, reach(model) or 0)
    begin = time.perf_counter()
    piece = max(1, args.tokens_at_once // len(ids))
    probe = not args.no_probe and has_memory(model)
    with bar(plan, (1 + probe) * turned.numel(), "") as shown:
        read = stream(model, ids, piece=piece, progress=shown.update)
        zeroed = None
        if probe:
            zeroed = stream(model, ids, piece=piece, forget_every=every, progress=shown.update)
    seconds = time.perf_counter() - begin
    common = Counter(text.ids.tolist()).most_common(1)[0][1] / len(text.ids)
    slope = [
        value if math.isfinite(value) else None
        for value in drift(read.loss, part, skip=args.seq_len)
    ]
    rows = []
    for length in args.lengths:
        upto = min(length, turned.shape[1])
        behind = slice(upto // 2, upto)
        right, loss = read.right[:, behind].double(), read.loss[:, behind].double()
        low, high = accuracy_interval(read.right, behind)
        score = {
            "accuracy": right.mean().item(), "n": right.numel(), "chance": common,
            "low": low, "high": high,
            "accuracy_state_zeroed": None if zeroed is None
            else zeroed.right[:, behind].double().mean().item(),
            "reach": reach(model), "loss": loss.mean().item(),
            "perplexity": math.exp(loss.mean().item()),
            "loss_state_zeroed": None if zeroed is None
            else zeroed.loss[:, behind].double().mean().item(),
            "zeroed_every": every, "slope_from": args.seq_len,
            **dict(zip(("slope", "slope_low", "slope_high"), slope, strict=True)),
            "held_out": text.held_out,
            "state_bytes_held": read.state_bytes,
        }  # fmt: skip
        rows.append(row_of(plan, length, score, seconds * upto / turned.shape[1]))
    name = {"task": args.task, "block": args.block, "length": args.max_len}
    plan.further.add(
        *(
            {**name, "place": i * part, "loss": losses.mean().item(), "n": losses.numel(),
             "key": plan.key}
            for i, losses in enumerate(read.loss.split(part, 1))
        )
    )  # fmt: skip
    plan.rows.add(*rows)
