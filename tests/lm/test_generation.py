"""Generation: greedy is argmax by hand, batches are their rows, sampling keeps its distribution."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longctx_layers.layers import LAYERS
from longctx_layers.lm.generation import _sample
from longctx_layers.lm.model import LongContextLM
from longctx_layers.testing import MemoryMeter, small_model

PATTERNS = [*((name,) for name in LAYERS), ("dpassm", "blade", "vanilla")]
CONSTANT_STATE = ["window", "dpassm", "blade", "baseline_longformer"]
VOCABULARY = 13

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)


def some_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy_by_hand(model: LongContextLM, ids: Tensor, n: int) -> Tensor:
    """The likeliest tokens, each from a pass over all tokens before it."""
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("prefill_size", [1, 4, 1000])
@every_pattern
def test_greedy_is_argmax_of_full_passes(pattern: tuple[str, ...], prefill_size: int) -> None:
    model, prompt = small_model(*pattern), some_ids(2, 11)
    expected = greedy_by_hand(model, prompt, 12)
    assert len(expected[:, 11:].unique()) > 1  # not one token for ever
    made = model.generate(prompt, 12, temperature=0, prefill_size=prefill_size)
    assert torch.equal(made, expected)


@every_pattern
def test_prompts_of_different_lengths_equal_single_ones(pattern: tuple[str, ...]) -> None:
    model = small_model(*pattern)
    prompts = [some_ids(n, seed=n) for n in (3, 11, 1, 7)]
    made = model.generate(prompts, 9, temperature=0, prefill_size=4)
    assert isinstance(made, list)
    for row, prompt in zip(made, prompts, strict=True):
        assert torch.equal(row, model.generate(prompt, 9, temperature=0))


@every_pattern
def test_eos_ends_rows_and_leaves_the_others_alone(pattern: tuple[str, ...]) -> None:
    model, prompts = small_model(*pattern), some_ids(4, 5)
    free = model.generate(prompts, 12, temperature=0)
    eos = {int(free[0, 7]), int(free[1, 9])}
    tails = [row[5:].tolist() for row in free]
    lengths = [next((i + 1 for i, t in enumerate(tail) if t in eos), 12) for tail in tails]
    assert min(lengths) < max(lengths)  # some row goes on while another has finished

    made = model.generate(prompts, 12, temperature=0, eos=eos)
    assert made.shape == (4, 5 + max(lengths))
    rows = model.generate(list(prompts), 12, temperature=0, eos=eos)
    for i, n in enumerate(lengths):
        expected = free[i, : 5 + n]
        assert torch.equal(made[i, : 5 + n], expected)
        assert (made[i, 5 + n :] == expected[-1]).all()
        assert torch.equal(rows[i], expected)


def test_eos_forms_and_early_end() -> None:
    model, prompt = small_model("dpassm"), some_ids(5)
    first = int(model.generate(prompt, 1, temperature=0)[-1])
    for eos in (first, [first], {first}, torch.tensor([first]), (first, (first + 1) % 13)):
        assert len(model.generate(prompt, 50, temperature=0, eos=eos)) == 6
    other = model.generate(prompt, 3, temperature=0, eos=[])
    assert torch.equal(other, model.generate(prompt, 3, temperature=0))


def test_returns_the_kind_it_is_given() -> None:
    model = small_model("window")
    assert model.generate(some_ids(5), 2).shape == (7,)
    assert model.generate(some_ids(3, 5), 2).shape == (3, 7)
    rows = model.generate([[1, 2, 3], some_ids(5).int(), (4,)], 2)
    assert [len(row) for row in rows] == [5, 7, 3]
    assert {row.dtype for row in rows} == {torch.int64}
    assert rows[0][:3].tolist() == [1, 2, 3]


def test_no_new_tokens() -> None:
    model, prompt = small_model("window"), some_ids(2, 5)
    assert torch.equal(model.generate(prompt, 0), prompt)
    assert [row.tolist() for row in model.generate([[1, 2], [3]], 0)] == [[1, 2], [3]]


def test_generator_makes_sampling_repeatable() -> None:
    model, prompt = small_model("dpassm"), some_ids(2, 5)

    def sample(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt, 20, generator=generator)

    before = torch.random.get_rng_state()
    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_modes_are_restored_and_dropout_is_off() -> None:
    model, prompt = small_model("dpassm", dropout=0.5), some_ids(2, 9)
    model.blocks[1].eval()  # frozen by the user
    modes = [module.training for module in model.modules()]
    assert torch.equal(
        model.generate(prompt, 9, temperature=0), model.generate(prompt, 9, temperature=0)
    )
    assert [module.training for module in model.modules()] == modes
    model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(prompt, 9)
    assert [module.training for module in model.modules()] == modes


def fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


def test_result_can_be_trained_on() -> None:
    model = small_model("blade")
    made = model.generate(some_ids(2, 5), 5)
    model.loss(made[:, :-1], made[:, 1:]).backward()
    assert not made.is_inference()


@pytest.mark.parametrize("name", LAYERS)
def test_memory_is_constant_in_the_prompt(name: str) -> None:
    model = small_model(name)

    def peak(length: int) -> int:
        ids = some_ids(1, length)
        with MemoryMeter() as meter:
            model.generate(ids, 2, temperature=0, prefill_size=32)
        return meter.peak - 8 * length * 4  # ids, their copies, and segment ids

    growth = peak(256) - peak(128)
    state = model.state_size(256) - model.state_size(128)
    if name in CONSTANT_STATE:
        assert state == 0
        assert growth <= 0
    else:
        assert growth >= state > 0  # the meter sees what grows


# ---- Sampling

LOGITS = torch.tensor([[0.1, 2.0, -1.0, 1.2, 0.5]], dtype=torch.float64)


def frequencies(**options: Any) -> Tensor:
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    drawn = _sample(LOGITS.expand(n, -1), **settings, generator=generator)
    return torch.bincount(drawn, minlength=5) / n


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"temperature": 3.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.53}, [1]),  # its probability is 0.534
        ({"top_p": 0.54}, [1, 3]),
        ({"top_p": 0.77}, [1, 3]),  # together 0.774
        ({"top_p": 0.78}, [1, 3, 4]),
        ({"top_p": 1e-12}, [1]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # of what top_k left, its probability is 0.69
        ({"top_k": 3, "top_p": 0.9, "temperature": 2.0}, [1, 3, 4]),
    ],
)
def test_sampling_follows_the_distribution(options: dict[str, Any], kept: list[int]) -> None:
    weights = (LOGITS[0] / options.get("temperature", 1.0)).exp()
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = weights[kept] / weights[kept].sum()
    drawn = frequencies(**options)
    assert set(drawn.nonzero().flatten().tolist()) == set(kept)
    # Five standard errors of a frequency out of 40,000.
    assert (drawn - expected).abs().max() <= 5 * 0.5 / 40_000**0.5


@pytest.mark.parametrize("temperature", [0, 1e-30, 5e-324])
def test_vanishing_temperature_is_greedy(temperature: float) -> None:
    assert frequencies(temperature=temperature)[1] == 1


def test_equal_logits_keep_exactly_k() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = _sample(torch.zeros(2000, 9), 1.0, 4, None, generator)
    assert len(drawn.unique()) == 4


def test_sampling_options_reach_the_model() -> None:
    model, prompt = small_model("window"), some_ids(2, 5)
    greedy = model.generate(prompt, 20, temperature=0)
    assert torch.equal(model.generate(prompt, 20, top_k=1), greedy)
    assert torch.equal(model.generate(prompt, 20, top_p=1e-9), greedy)
    assert torch.equal(model.generate(prompt, 20, temperature=1e-9), greedy)
    assert not torch.equal(model.generate(prompt, 20, temperature=5.0), greedy)


# ---- Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": torch.zeros(0, dtype=torch.int64)}, "at least one token in each"),
        ({"prompt": torch.zeros(2, 0, dtype=torch.int64)}, "at least one token in each"),
        ({"prompt": torch.zeros(0, 3, dtype=torch.int64)}, "at least one prompt"),
        ({"prompt": []}, "at least one prompt"),
        ({"prompt": [[1], []]}, r"lengths \[1, 0\]"),
        ({"prompt": [1, 2, 3]}, "put a single list of ids into a tensor"),
        ({"prompt": "text"}, "encode text first"),
        (
            {"prompt": torch.zeros(1, 2, 3, dtype=torch.int64)},
            r"\[T\] or \[B, T\], got \[1, 2, 3\]",
        ),
        ({"prompt": torch.tensor([0.5])}, "integer token ids, got torch.float32"),
        ({"prompt": [[0.5]]}, "integer token ids, got torch.float32"),
        ({"prompt": torch.tensor([True])}, "integer token ids, got torch.bool"),
        ({"prompt": torch.tensor([3, 13])}, r"\[0, 13\), got ids from 3 to 13"),
        ({"prompt": [[3], [-1]]}, r"\[0, 13\), got ids from -1 to -1"),
        ({"prompt": [torch.zeros(2, 2, dtype=torch.int64)]}, "expected 1-D tensors"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected at least 0, got -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected an integer, got 1.5"),
        ({"temperature": -0.1}, "temperature: expected a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature: expected a finite number"),
        ({"temperature": float("inf")}, "temperature: expected a finite number"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_k": 2.0}, "top_k: expected an integer, got 2.0"),
        ({"top_p": 0.0}, r"top_p: expected a probability in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p: expected a probability in \(0, 1\], got 1.1"),
        ({"eos": 13}, r"eos: expected token ids in \[0, 13\)"),
        ({"eos": {-1, 3}}, r"eos: expected token ids in \[0, 13\)"),
        ({"eos": 1.5}, "eos: expected integer token ids, got torch.float32"),
        ({"prefill_size": 0}, "prefill_size: expected at least 1, got 0"),
        ({"generator": torch.Generator(), "device": "meta"}, "generator: expected one on meta"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    model: nn.Module = small_model("window")
    model.to(options.pop("device", "cpu"))
    arguments = {"prompt": torch.tensor([1, 2]), "max_new_tokens": 3, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate(**arguments)
