"""Streaming perplexity: the loss of a text model by position, far past its training length."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from longctx_layers import LongContextLM
from longctx_layers.evals import (
    accuracy_interval,
    drift,
    has_memory,
    reach,
    rotations,
    stream,
)
from longctx_layers.evals.perplexity import Stream
from longctx_layers.evals.program.models import Loaded, build, own
from longctx_layers.evals.program.options import Options
from longctx_layers.evals.program.plan import Measurement, Plan, bar, row_of

if TYPE_CHECKING:
    from longctx_layers.data.module import LongContextData

PARTS = 100  # parts of the text, for the slope; each is read once in each rotation
SHORTEST_FORGETTING = 64


class Text(NamedTuple):
    """The text to read.

    Attributes:
        ids: `[T]` tokens of held-out documents, one after the other.
        fingerprint: equal for equal ids.
        held_out: True if the model's training is known to have held the text out; None if that is
            not known.
    """

    ids: Tensor
    fingerprint: str
    held_out: bool | None = None


def untrained(options: Options) -> Loaded:
    """A model of bytes with random weights."""
    from longctx_layers.data.tokenizers import ByteTokenizer

    assert options.block is not None
    tokenizer = ByteTokenizer()
    model = build(
        options.block,
        options.block_options,
        options.num_params,
        vocab_size=tokenizer.vocab_size,
        seed=options.seed,
    )
    return replace(own(model), tokenizer=tokenizer, tokenizer_name="bytes")


def prepare(options: Options, loaded: Loaded) -> Text:
    """Held-out documents of a dataset as the model's tokens, as many as the longest length needs.

    Raises:
        ValueError: if the model has no tokenizer, or the documents are too short in total.
        ConnectionError: if the dataset is on the hub and the hub cannot be reached.
    """
    if loaded.tokenizer is None:
        raise ValueError(
            "streaming_ppl: expected a model with a tokenizer, but there is none in its folder; "
            "write a folder with both with longctx_layers.training.export"
        )
    from longctx_layers.data.module import LongContextData

    split = {n: loaded.order[n] for n in ("seed", "validation_fraction") if n in loaded.order}
    data = LongContextData(
        options.dataset_name,
        options.dataset_config,
        tokenizer=loaded.tokenizer_name or "bytes",
        **split,
    )
    data.setup("fit")
    text = text_of(data, options.longest, options.rotations, options.seed)
    # A training that streamed its data has chosen the held-out documents differently.
    same = loaded.order.get("content") == data.content and not loaded.order["streaming"]
    return text._replace(held_out=True if same else None)


def text_of(data: LongContextData, length: int, count: int, seed: int) -> Text:
    """`length` tokens of held-out documents, in an order drawn from the seed.

    Args:
        data: set up for fitting.
        length: number of tokens.
        count: number of rotations that the text is to be read in.
        seed: of the order of the documents.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.validation), generator=generator).tolist()
    documents: list[Tensor] = []
    total = 0
    for index in order:
        document = data.store.document(data.validation[index])
        documents.append(torch.from_numpy(document.astype("int64")))
        total += len(document)
        if total >= length:
            break
    if total < length:
        raise ValueError(
            f"--max_len: expected at most the {total:,} tokens of the {len(order)} held-out "
            f"documents of {data.dataset_name}, got {length:,}; use a larger dataset"
        )
    if length < 10 * count:
        raise ValueError(
            f"--max_len: expected at least {10 * count} tokens, ten for each of {count} "
            f"rotations, got {length}"
        )
    ids = torch.cat(documents)[:length]
    return Text(ids, hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).hexdigest())


def part_of(length: int, count: int) -> int:
    """Number of tokens of a part, so that there are about `PARTS`, a multiple of the rotations."""
    return max(1, length // (count * math.ceil(PARTS / count)))


@dataclass(frozen=True)
class StreamMeasurement(Measurement):
    """The loss by position, for all lengths from one pass over the text."""

    text: Text

    def settings(self, options: Options) -> dict[str, Any]:
        text = (options.rotations, options.shortest, options.longest, self.text.fingerprint)
        return {"text": text}

    def measure(self, plan: Plan, model: LongContextLM) -> None:
        options = plan.options
        part = part_of(options.longest, options.rotations)
        rotated = rotations(self.text.ids, options.rotations, part)
        # After the last token comes the first again, so that every position has a next token.
        ids = torch.cat([rotated, rotated[:, :1]], dim=1)
        every = max(SHORTEST_FORGETTING, reach(model) or 0)
        piece = max(1, options.tokens_at_once // len(ids))
        probe = options.probe and has_memory(model)
        begin = time.perf_counter()
        with bar(plan, (1 + probe) * rotated.numel(), "") as shown:
            read = stream(model, ids, piece=piece, progress=shown.update)
            zeroed = None
            if probe:
                zeroed = stream(model, ids, piece=piece, forget_every=every, progress=shown.update)
        seconds = time.perf_counter() - begin
        common = self._fields(options, model, read, part, every)
        rows = []
        for length in options.lengths:
            end = min(length, rotated.shape[1])
            score = {**common, **_half(read, zeroed, slice(end // 2, end))}
            rows.append(row_of(plan, length, score, seconds * end / rotated.shape[1]))
        names = plan.names(options.longest)
        details = [
            {
                **names,
                "place": i * part,
                "loss": losses.mean().item(),
                "n": losses.numel(),
                "key": plan.key,
            }
            for i, losses in enumerate(read.loss.split(part, 1))
        ]
        plan.details.add(*details)
        plan.rows.add(*rows)

    def _fields(
        self, options: Options, model: LongContextLM, read: Stream, part: int, every: int
    ) -> dict[str, Any]:
        """What all lengths have in common."""
        most_frequent = Counter(self.text.ids.tolist()).most_common(1)[0][1]
        slope = drift(read.loss, part, skip=options.shortest)
        mean, low, high = (value if math.isfinite(value) else None for value in slope)
        return {
            "chance": most_frequent / len(self.text.ids),
            "reach": reach(model),
            "zeroed_every": every,
            "slope_from": options.shortest,
            "slope": mean,
            "slope_low": low,
            "slope_high": high,
            "held_out": self.text.held_out,
            "state_bytes_held": read.state_bytes,
        }


def _half(read: Stream, zeroed: Stream | None, positions: slice) -> dict[str, Any]:
    """The scores at some positions: the second half of a length."""
    right = read.right[:, positions].double()
    loss = read.loss[:, positions].double().mean().item()
    low, high = accuracy_interval(read.right, positions)
    scores: dict[str, Any] = {
        "accuracy": right.mean().item(),
        "n": right.numel(),
        "low": low,
        "high": high,
        "accuracy_state_zeroed": None,
        "loss": loss,
        "perplexity": math.exp(loss),
        "loss_state_zeroed": None,
    }
    if zeroed is not None:
        scores["accuracy_state_zeroed"] = zeroed.right[:, positions].double().mean().item()
        scores["loss_state_zeroed"] = zeroed.loss[:, positions].double().mean().item()
    return scores
