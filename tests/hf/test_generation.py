"""transformers' `generate` with each layer: every decoding method equals full forward passes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from support.hf_models import VOCABULARY, every_pattern, hf_model
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer

from longctx_layers.hf import LongCtxCache, LongCtxForCausalLM
from longctx_layers.testing import MemoryMeter, small_model

CONSTANT_STATE = ["window", "dpassm", "blade", "baseline_longformer"]
GROWING_STATE = ["vanilla", "baseline_bigbird"]
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def some_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad rows on the left with id 0. Returns the batch and its attention mask."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    return ids, mask


# ---- Decoding methods


@every_pattern
def test_greedy(pattern: tuple[str, ...]) -> None:
    native, ids = small_model(*pattern).eval(), some_ids(2, 9)
    model = LongCtxForCausalLM.from_native(native)
    generated = model.generate(ids, **GREEDY)
    assert len(generated[:, 9:].unique()) > 1
    assert torch.equal(generated, native.generate(ids, 12, temperature=0))
    assert torch.equal(generated, model.generate(ids, use_cache=False, **GREEDY))


@every_pattern
def test_left_padded_batch(pattern: tuple[str, ...]) -> None:
    model, rows = hf_model(*pattern), [some_ids(n, seed=n) for n in (11, 3, 1, 7)]
    ids, mask = left_padded(rows)
    generated = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, prompt in zip(generated, rows, strict=True):
        alone = model.generate(prompt[None], **GREEDY)[0]
        assert torch.equal(row[11 - len(prompt) :], alone)
    assert torch.equal(
        generated, model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    )
    # The first pieces of the short prompts consist of padding only.
    pieces = model.generate(ids, attention_mask=mask, prefill_chunk_size=4, **GREEDY)
    assert torch.equal(generated, pieces)


@every_pattern
def test_mask_is_found_from_the_pad_token(pattern: tuple[str, ...]) -> None:
    model = hf_model(*pattern)
    ids, mask = left_padded([some_ids(8), some_ids(5, seed=1)])
    generated = model.generate(ids, pad_token_id=0, **GREEDY)
    assert torch.equal(generated, model.generate(ids, attention_mask=mask, **GREEDY))


@every_pattern
def test_beams(pattern: tuple[str, ...]) -> None:
    model = hf_model(*pattern)
    ids, mask = left_padded([some_ids(9), some_ids(6, seed=1)])
    options: dict[str, Any] = {
        "attention_mask": mask,
        "num_beams": 4,
        "num_return_sequences": 3,
        "return_dict_in_generate": True,
        "output_scores": True,
        **GREEDY,
    }
    cached, full = model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, full.sequences)
    torch.testing.assert_close(cached.sequences_scores, full.sequences_scores)
    assert len(cached.sequences.unique(dim=0)) == 6
    # Beams are sorted by their score.
    best = cached.sequences_scores.view(2, 3)
    assert (best[:, 0] >= best[:, 1]).all()
    assert (best[:, 1] >= best[:, 2]).all()


@every_pattern
def test_sampling(pattern: tuple[str, ...]) -> None:
    model, ids = hf_model(*pattern), some_ids(2, 6)
    options: dict[str, Any] = {
        "do_sample": True,
        "max_new_tokens": 8,
        "top_k": 5,
        "temperature": 0.7,
        "num_return_sequences": 3,
    }
    torch.manual_seed(0)
    generated = model.generate(ids, **options)
    assert generated.shape == (6, 14)
    assert len(generated.unique(dim=0)) > 2
    torch.manual_seed(0)
    assert torch.equal(generated, model.generate(ids, use_cache=False, **options))
    # Every token is one of the five most likely.
    logits = model(generated).logits[:, 5:-1]
    likeliest = logits.topk(5).indices
    assert (likeliest == generated[:, 6:, None]).any(-1).all()


def test_sampling_follows_the_distribution() -> None:
    model, ids = hf_model("dpassm"), some_ids(1, 6)
    torch.manual_seed(0)
    generated = model.generate(ids.expand(1000, -1), do_sample=True, top_k=0, max_new_tokens=1)
    counts = generated[:, -1].bincount(minlength=VOCABULARY)
    expected = 1000 * model(ids).logits[0, -1].softmax(-1)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 39.1  # p = 0.0001 with 12 degrees of freedom


@every_pattern
def test_rows_that_end_early_leave_the_others_alone(pattern: tuple[str, ...]) -> None:
    model, ids = hf_model(*pattern), some_ids(4, 5)
    free = model.generate(ids, **GREEDY)
    eos = [int(free[0, 7]), int(free[1, 9])]
    tails = [row[5:].tolist() for row in free]
    lengths = [next((i + 1 for i, t in enumerate(tail) if t in eos), 12) for tail in tails]
    assert min(lengths) < max(lengths)
    generated = model.generate(ids, eos_token_id=eos, pad_token_id=0, **GREEDY)
    for i, n in enumerate(lengths):
        assert torch.equal(generated[i, : 5 + n], free[i, : 5 + n])
        assert (generated[i, 5 + n :] == 0).all()


@every_pattern
def test_prompt_as_embeddings(pattern: tuple[str, ...]) -> None:
    model, ids = hf_model(*pattern), some_ids(2, 9)
    embeds = model.get_input_embeddings()(ids)
    generated = model.generate(inputs_embeds=embeds, **GREEDY)
    assert torch.equal(generated, model.generate(ids, **GREEDY)[:, 9:])


@every_pattern
def test_assisted_by_the_prompt(pattern: tuple[str, ...]) -> None:
    """Tokens are guessed from the prompt, checked in one call, and removed if wrong."""
    model, ids = hf_model(*pattern), some_ids(1, 4).repeat(1, 5)
    # An end that never occurs: early versions of transformers 5 need one for prompt lookup.
    long = {**GREEDY, "max_new_tokens": 30, "eos_token_id": 99}
    generated = model.generate(ids, prompt_lookup_num_tokens=4, **long)
    expected = model.generate(ids, **long)
    assert torch.equal(generated[:, : expected.shape[1]], expected)
    # Early versions return guesses beyond max_new_tokens too.
    assert generated.shape == expected.shape or Version(transformers.__version__) < Version("5.23")


def test_the_recording_for_assistance_is_freed_by_the_next_call() -> None:
    model, cache, ids = hf_model("dpassm"), LongCtxCache(), some_ids(1, 9)
    guess = {"prompt_lookup_num_tokens": 4, "eos_token_id": 99}
    first = model.generate(ids, past_key_values=cache, **guess, **GREEDY)
    assert cache.is_recording_past()
    second = model.generate(first, past_key_values=cache, **GREEDY)
    assert torch.equal(second, model.generate(first, **GREEDY))
    assert not cache.is_recording_past()
    assert not cache._calls


@every_pattern
def test_assisted_by_a_model(pattern: tuple[str, ...]) -> None:
    model, ids = hf_model(*pattern), some_ids(1, 9)
    expected = model.generate(ids, **GREEDY)
    other, same = hf_model(*pattern, seed=3), hf_model(*pattern)
    for helper in (other, same):
        assert torch.equal(model.generate(ids, assistant_model=helper, **GREEDY), expected)


@pytest.mark.parametrize("name", CONSTANT_STATE)
def test_static_shapes(name: str) -> None:
    """The shapes of the state never change, so the cache is static anyway."""
    model, ids = hf_model(name), some_ids(2, 9)
    generated = model.generate(ids, cache_implementation="static", **GREEDY)
    assert torch.equal(generated, model.generate(ids, **GREEDY))
    cache, shapes = LongCtxCache(), set()
    for piece in ids.split([1, 1, 5, 1, 1], 1):
        model(piece, past_key_values=cache)
        shapes.add(tuple(x.shape for x in tree_leaves(cache.state)))
    assert len(shapes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTANT_STATE)
@torch.no_grad()
def test_a_compiled_step_serves_the_whole_generation(name: str) -> None:
    torch._dynamo.reset()
    model, ids = hf_model(name), some_ids(2, 12)
    programs = CompileCounter()
    step = torch.compile(
        lambda ids, cache: model(ids, past_key_values=cache).logits,
        backend=programs,
        fullgraph=True,
    )
    cache = model(ids[:, :4]).past_key_values
    actual = [step(ids[:, i : i + 1], cache) for i in range(4, 12)]
    torch.testing.assert_close(torch.cat(actual, 1), model(ids).logits[:, 4:])
    # The second program accepts any number of tokens read.
    assert programs.frame_count <= 2


@pytest.mark.parametrize("name", GROWING_STATE)
def test_no_static_cache_where_the_state_grows(name: str) -> None:
    with pytest.raises(ValueError, match=r"'static' for a model whose state has a constant.*grows"):
        hf_model(name).generate(some_ids(1, 3), cache_implementation="static", **GREEDY)


# ---- Memory


@pytest.mark.parametrize("name", ["dpassm", "blade"])
def test_memory_is_constant(name: str) -> None:
    model = hf_model(name, dtype=torch.float32)
    sizes, peaks = [], []
    for n in (20, 80):
        with MemoryMeter() as meter:
            generated = model.generate(
                some_ids(1, 8), max_new_tokens=n, do_sample=False, return_dict_in_generate=True
            )
        assert generated.sequences.shape == (1, 8 + n)
        leaves = tree_leaves(generated.past_key_values.state)
        sizes.append(sum(x.nbytes for x in leaves))
        peaks.append(meter.peak)
    native = model.to_native()
    assert sizes[0] == sizes[1] == native.state_size(0)
    # Apart from the state, only the ids grow, of which generate holds a few copies.
    assert peaks[1] - peaks[0] < 60 * 8 * 8


@pytest.mark.parametrize("name", ["dpassm", "blade"])
def test_prompts_in_pieces_take_the_memory_of_a_piece(name: str) -> None:
    model, ids = hf_model(name, dtype=torch.float32), some_ids(1, 1000)
    peaks = []
    for options in ({}, {"prefill_chunk_size": 50}):
        with MemoryMeter() as meter:
            generated = model.generate(ids, max_new_tokens=2, do_sample=False, **options)
        peaks.append((meter.peak, generated))
    assert torch.equal(peaks[0][1], peaks[1][1])
    assert peaks[1][0] < 0.2 * peaks[0][0]


# ---- The cache between calls of generate


@every_pattern
def test_a_conversation_continues(pattern: tuple[str, ...]) -> None:
    model, cache = hf_model(*pattern), LongCtxCache()
    first = model.generate(some_ids(2, 6), past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 6 + 12 - 1  # the last new token has not been read yet
    more = torch.cat([first, some_ids(2, 4, seed=1)], 1)
    second = model.generate(more, past_key_values=cache, **GREEDY)
    assert torch.equal(second, model.generate(more, **GREEDY))


def test_a_copy_is_a_fork() -> None:
    model, cache = hf_model("dpassm"), LongCtxCache()
    prompt = model.generate(some_ids(1, 6), past_key_values=cache, **GREEDY)
    fork = copy.deepcopy(cache)
    for seed, branch in ((1, cache), (2, fork)):
        ids = torch.cat([prompt, some_ids(1, 3, seed=seed)], 1)
        generated = model.generate(ids, past_key_values=branch, **GREEDY)
        assert torch.equal(generated, model.generate(ids, **GREEDY))


def test_a_row_of_a_padded_batch_continues_alone() -> None:
    model, cache = hf_model("dpassm", "blade"), LongCtxCache()
    ids, mask = left_padded([some_ids(8), some_ids(5, seed=1)])
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1]))
    logits = model(some_ids(1, 2, seed=2), past_key_values=cache).logits
    whole = torch.cat([some_ids(5, seed=1)[None], some_ids(1, 2, seed=2)], 1)
    torch.testing.assert_close(logits, model(whole).logits[:, -2:])


def test_scores_and_hidden_states_come_back() -> None:
    model, ids = hf_model("blade"), some_ids(2, 6)
    generated = model.generate(
        ids,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
        **GREEDY,
    )
    assert len(generated.scores) == len(generated.hidden_states) == 12
    assert [len(hidden) for hidden in generated.hidden_states] == [3] * 12
    full = model(generated.sequences[:, :-1])
    torch.testing.assert_close(torch.stack(generated.scores, 1), full.logits[:, 5:].float())


def test_streamer() -> None:
    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    class Kept(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text

    model, ids, streamer = hf_model("dpassm"), some_ids(1, 5), Kept(Words())
    generated = model.generate(ids, streamer=streamer, **GREEDY)
    assert streamer.text.split() == [str(int(i)) for i in generated[0]]


def test_generation_config_is_saved(tmp_path: Path) -> None:
    model, ids = hf_model("dpassm"), some_ids(1, 5)
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 7
    assert torch.equal(loaded.generate(ids), model.generate(ids))


# ---- Removing tokens


@settings(max_examples=12)
@given(
    steps=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5),
    data=st.data(),
)
@pytest.mark.parametrize("pattern", [("dpassm",), ("blade",), ("vanilla", "baseline_bigbird")])
def test_any_calls_and_crops_equal_one_pass(
    pattern: tuple[str, ...], steps: list[tuple[int, int]], data: Any
) -> None:
    model, cache = hf_model(*pattern), LongCtxCache()
    cache.activate_past_recording()
    seen = torch.zeros(2, 0, dtype=torch.int64)
    since = 0  # columns that may be removed
    for i, (n, wanted) in enumerate(steps):
        new = some_ids(2, n, seed=i)
        logits = model(new, past_key_values=cache).logits
        seen, since = torch.cat([seen, new], 1), since + n
        torch.testing.assert_close(logits, model(seen).logits[:, -n:])
        if data.draw(st.booleans()):
            back = min(wanted, since)
            cache.crop(-back)
            seen, since = seen[:, : seen.shape[1] - back], 0
        assert cache.get_seq_length() == seen.shape[1]
    last = model(some_ids(2, 1, seed=99), past_key_values=cache).logits
    whole = torch.cat([seen, some_ids(2, 1, seed=99)], 1)
    torch.testing.assert_close(last, model(whole).logits[:, -1:])


def test_long_calls_are_cut_without_all_of_them_again() -> None:
    model, cache, ids = hf_model("dpassm"), LongCtxCache(), some_ids(1, 300)
    expected = model(ids).logits
    cache.activate_past_recording()
    logits = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, expected)
    cache.crop(-3)
    lengths: list[int] = []
    model.model.norm.register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    again = model(ids[:, -3:], past_key_values=cache).logits
    torch.testing.assert_close(again, expected[:, -3:])
    assert lengths == [61, 3]
    cache.crop(0)
    assert not cache._calls


def test_two_crops_in_a_row() -> None:
    model, cache, ids = hf_model("blade"), LongCtxCache(), some_ids(2, 9)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.crop(-2)
    assert cache.batch_size == 2
    cache.crop(4)  # leave four, as before transformers 5.23
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == 4
    logits = model(ids[:, 4:].repeat_interleave(2, 0), past_key_values=cache).logits
    expected = model(ids).logits[:, 4:].repeat_interleave(2, 0)
    torch.testing.assert_close(logits, expected)


def test_crop_of_a_padded_batch() -> None:
    model, cache = hf_model("dpassm"), LongCtxCache()
    ids, mask = left_padded([some_ids(8), some_ids(5, seed=1)])
    cache.activate_past_recording()
    expected = model(ids, attention_mask=mask).logits
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.crop(-6)  # one row consists of padding only then
    assert cache.get_seq_length() == 2
    logits = model(ids[:, 2:], attention_mask=mask, past_key_values=cache).logits
    real = mask[:, 2:] == 1
    torch.testing.assert_close(logits[real], expected[:, 2:][real])


def test_rows_of_a_cache() -> None:
    model, ids = hf_model("dpassm", "blade", "vanilla"), some_ids(3, 7)
    tail = some_ids(3, 2, seed=1)
    expected = model(torch.cat([ids, tail], 1)).logits[:, -2:]

    def after(change: Any, rows: list[int]) -> None:
        cache = model(ids).past_key_values
        change(cache)
        assert cache.batch_size == len(rows)
        assert cache.get_seq_length() == 7
        logits = model(tail[rows], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[rows])

    after(lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0])
    after(lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2])
    after(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
    cache = model(ids).past_key_values
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (0, -1, 0)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


# ---- Errors


def test_mistakes_are_named() -> None:
    model, ids = hf_model("dpassm"), some_ids(2, 5)
    with pytest.raises(ValueError, match=r"no keys and values to offload or quantize"):
        model.generate(ids, cache_implementation="offloaded", **GREEDY)
    with pytest.raises(TypeError, match="expected a LongCtxCache, got a DynamicCache"):
        model.generate(ids, past_key_values=transformers.DynamicCache(), **GREEDY)
    with pytest.raises(ValueError, match=r"one prompt per row, got segment_ids \[2, 5\]"):
        model.generate(ids, segment_ids=torch.zeros(2, 5, dtype=torch.int64), **GREEDY)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"at most the 0 tokens.*activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match=r"at most the 0 tokens.*got 2"):
        cache.crop(3)  # leave three of five
    cache.crop(0)
    cache.crop(9)
    assert cache.get_seq_length() == 5
    with pytest.raises(TypeError, match="keys and values of another model"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="expected batch size 1"):
        model(ids[:1], past_key_values=cache)
