"""Do whole models work on this GPU? `python gpu/check_models.py`

Streaming, packing, generation, a compiled step, activation checkpointing, autocast, and two runs
with the same bits: for each block, a small model of random weights. Prints WRONG lines, and at the
end ALL RIGHT or how many were wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from check import Report, relative_error
from torch import Tensor

from longctx_layers import LongContextLM, create_model

BLOCKS = ("dpassm", "blade", "vanilla", "window", "baseline_longformer", "baseline_bigbird")
VOCABULARY = 256
LARGEST_ERROR = 2e-2  # of the norm, in float32 with products of TF32
ROUNDED_ERROR = 6e-2  # under autocast to bfloat16, through all layers


class Trial(NamedTuple):
    """A model with some text."""

    model: LongContextLM
    ids: Tensor  # [B, T + 1]
    block: str

    def gradients(
        self, loss_of: Callable[..., Tensor] | None = None, autocast: bool = False
    ) -> list[Tensor]:
        """The loss and the gradients of all parameters."""
        loss_of = loss_of or self.model.loss
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(self.ids[:, :-1], self.ids[:, 1:])
        loss.backward()
        return [loss.detach(), *self.parameter_gradients()]

    def parameter_gradients(self) -> list[Tensor]:
        """Copies of those that there are."""
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


def differ(actual: list[Tensor], expected: list[Tensor], largest: float = LARGEST_ERROR) -> str:
    """What is wrong, if anything."""
    # Of a gradient that is all but zero nothing but rounding is left: all of them together count.
    flat = [torch.cat([x.double().flatten() for x in group]) for group in (actual, expected)]
    error = relative_error(*flat)
    return "" if error < largest else f"relative error {error:.1e}, expected below {largest:.1e}"


def streams(trial: Trial) -> str:
    """Pieces with a state give what one call gives."""
    ids = trial.ids
    with torch.no_grad():
        expected = trial.model(ids)
        state, pieces = None, []
        for piece in ids.split([70, 1, 1, ids.shape[1] - 72], dim=1):
            logits, state = trial.model(piece, state, return_state=True)
            pieces.append(logits)
    return differ([torch.cat(pieces, 1)], [expected])


def packs(trial: Trial) -> str:
    """Two documents in one row give what they give alone, forward and backward."""
    ids, cut = trial.ids, trial.ids.shape[1] // 3
    segments = (torch.arange(ids.shape[1], device=ids.device) >= cut).long().expand_as(ids)

    def results(logits: Tensor) -> list[Tensor]:
        trial.model.zero_grad(set_to_none=True)
        logits.square().mean().backward()
        return [logits.detach(), *trial.parameter_gradients()]

    packed = results(trial.model(ids, segment_ids=segments.contiguous()))
    parts = ids.split([cut, ids.shape[1] - cut], dim=1)
    return differ(packed, results(torch.cat([trial.model(part) for part in parts], dim=1)))


def generates(trial: Trial) -> str:
    """Greedy decoding takes tokens that one call over the whole text finds likeliest, too."""
    prompt = trial.ids[:, :40]
    text = trial.model.generate(prompt, 24, temperature=0.0)
    with torch.no_grad():
        logits = trial.model(text[:, :-1])[:, prompt.shape[1] - 1 :]
    chosen = logits.gather(2, text[:, prompt.shape[1] :, None]).squeeze(2)
    gap = (logits.amax(2) - chosen).max() / logits.std()
    return (
        "" if gap < LARGEST_ERROR else f"a token {gap:.1e} standard deviations from the likeliest"
    )


def compiles(trial: Trial) -> str:
    """torch.compile gives the same loss and gradients."""
    compiled = torch.compile(trial.model.loss)
    return differ(trial.gradients(compiled), trial.gradients())


def checkpoints(trial: Trial) -> str:
    """Activations that are computed again give the same gradients."""
    expected = trial.gradients()
    trial.model.gradient_checkpointing = True
    actual = trial.gradients()
    trial.model.gradient_checkpointing = False
    return differ(actual, expected)


def casts(trial: Trial) -> str:
    """Autocast to bfloat16 gives nearly the same."""
    return differ(trial.gradients(autocast=True), trial.gradients(), ROUNDED_ERROR)


def repeats(trial: Trial) -> str:
    """Two equal steps give the same bits."""
    first, second = trial.gradients(), trial.gradients()
    moved = sum(not torch.equal(x, y) for x, y in zip(first, second, strict=True))
    return f"{moved} of {len(first)} tensors differ" if moved else ""


def keeps_rows_apart(trial: Trial) -> str:
    """A row gives the same alone as in a batch."""
    with torch.no_grad():
        return differ([trial.model(trial.ids[:1])], [trial.model(trial.ids)[:1]])


CHECKS: tuple[Callable[[Trial], str], ...] = (
    streams,
    packs,
    generates,
    checkpoints,
    casts,
    repeats,
    keeps_rows_apart,
    compiles,  # last: it takes longest
)


def main(argv: list[str] | None = None) -> None:
    """Every check with every block, as far as time allows."""
    names = [check.__name__ for check in CHECKS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu to try the program")
    parser.add_argument("--blocks", nargs="+", default=BLOCKS)
    parser.add_argument("--checks", nargs="+", default=names, choices=names)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--length", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=75)
    args = parser.parse_args(argv)
    report = Report(args.seconds)
    torch.manual_seed(0)
    trials = []
    for block in args.blocks:
        model = create_model(VOCABULARY, args.size, block, device=args.device)
        ids = torch.randint(VOCABULARY, (2, args.length), device=args.device)
        trials.append(Trial(model, ids, block))
    for check in CHECKS:
        for trial in trials:
            if check.__name__ not in args.checks:
                continue
            if report.left() < 5:
                print(f"out of time: {check.__name__} did not run with {trial.block}")
                continue
            try:
                problem = check(trial)
            except Exception as error:  # whatever a compiler or a driver may raise
                problem = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            report.add(f"{trial.block} {check.__name__}", problem)
    print("ALL RIGHT" if report.right and not report.wrong else f"{report.wrong} WRONG", flush=True)


if __name__ == "__main__":
    main()
