"""What the models generate after the beginnings of held-out documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longctx_layers.reports.checkpoint import Checkpoint
from longctx_layers.reports.content import Part, Sample, Section
from longctx_layers.reports.text import Text

PROMPT_CHARACTERS = 200
TEMPERATURE = 0.8
TOP_P = 0.95


def section(
    checkpoints: Sequence[Checkpoint], text: Text, count: int, new_tokens: int, seed: int
) -> Section:
    """Samples of every checkpoint that has a tokenizer, all after the same prompts."""
    parts: list[Part] = [
        f"{new_tokens} tokens after the first {PROMPT_CHARACTERS} characters of held-out "
        f"documents, at temperature {TEMPERATURE}, top-p {TOP_P}, seed {seed}; not selected. "
        "Control characters are shown as symbols."
    ]
    numbers: dict[str, list[dict[str, str]]] = {}
    long_enough = [d for d in text.documents if len(d) > PROMPT_CHARACTERS] or text.documents
    for document in long_enough[:count]:
        prompt = document[:PROMPT_CHARACTERS]
        for checkpoint in checkpoints:
            if checkpoint.tokenizer is None:
                continue
            continuation = write(checkpoint, prompt, new_tokens, seed)
            parts += [f"{checkpoint.label}:", Sample(prompt, continuation)]
            numbers.setdefault(checkpoint.label, []).append(
                {"prompt": prompt, "continuation": continuation}
            )
    return Section("Samples", parts, numbers)


def write(checkpoint: Checkpoint, prompt: str, new_tokens: int, seed: int) -> str:
    """A continuation of the prompt, from a model with a tokenizer."""
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    device = checkpoint.model.embedding.weight.device
    ids = torch.tensor(tokenizer.encode(prompt), device=device)
    text = checkpoint.model.generate(
        ids,
        max_new_tokens=new_tokens,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        eos=tokenizer.end_of_text,
        generator=torch.Generator(device).manual_seed(seed),
    )
    return tokenizer.decode(text[len(ids) :].tolist())
