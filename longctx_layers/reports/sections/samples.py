"""What the models write after the beginnings of held-out documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longctx_layers.reports.checkpoint import Checkpoint
from longctx_layers.reports.content import Part, Sample, Section
from longctx_layers.reports.text import Text

PROMPT_CHARACTERS, TEMPERATURE, TOP_P = 200, 0.8, 0.95


def section(
    checkpoints: Sequence[Checkpoint], text: Text, count: int, new_tokens: int, seed: int
) -> Section:
    """Samples of each checkpoint, after the same prompts."""
    parts: list[Part] = [
        f"After the first {PROMPT_CHARACTERS} characters of held-out documents, "
        f"{new_tokens} tokens at temperature {TEMPERATURE}, top-p {TOP_P}, seed {seed}, as they "
        "came out. Control characters are shown as symbols."
    ]
    numbers: dict[str, list[dict[str, str]]] = {}
    long_enough = [d for d in text.documents if len(d) > PROMPT_CHARACTERS] or text.documents
    for document in long_enough[:count]:
        prompt = document[:PROMPT_CHARACTERS]
        for one in checkpoints:
            if one.tokenizer is None:
                continue
            continuation = write(one, prompt, new_tokens, seed)
            parts += [f"{one.label}:", Sample(prompt, continuation)]
            numbers.setdefault(one.label, []).append(
                {"prompt": prompt, "continuation": continuation}
            )
    return Section("Samples", parts, numbers)


def write(checkpoint: Checkpoint, prompt: str, new_tokens: int, seed: int) -> str:
    """What a model with a tokenizer goes on with."""
    assert checkpoint.tokenizer is not None
    device = checkpoint.model.embedding.weight.device
    ids = torch.tensor(checkpoint.tokenizer.encode(prompt), device=device)
    text = checkpoint.model.generate(
        ids, max_new_tokens=new_tokens, temperature=TEMPERATURE, top_p=TOP_P,
        eos=checkpoint.tokenizer.end_of_text,
        generator=torch.Generator(device).manual_seed(seed),
    )  # fmt: skip
    return checkpoint.tokenizer.decode(text[len(ids) :])
