"""The language model: budgets, initialisation, streaming, and the loss in pieces."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from longctx_layers.layers import LAYERS, Projection, build_layer, detach_state
from longctx_layers.lm.config import ModelConfig
from longctx_layers.lm.factory import SIZES, create_model
from longctx_layers.lm.model import LongContextLM
from longctx_layers.testing import MemoryMeter, max_error, small_model

HYBRID = ("dpassm", "blade", "vanilla")
PATTERNS = [*((name,) for name in LAYERS), HYBRID]
VOCABULARY = 13

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)


def some_ids(batch: int, length: int, seed: int = 0, vocab_size: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, length), generator=generator)


def assert_states_equal(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    assert len(actual) == len(expected)
    for layer, wanted in zip(actual, expected, strict=True):
        assert type(layer) is type(wanted)
        for x, y in zip(layer, wanted, strict=True):
            assert max_error(x, y) <= tolerance


# ---- Budgets


@pytest.mark.parametrize(
    ("num_params", "vocab_size"),
    [("tiny", 257), ("150m", 1000), ("150m", 50257), ("250m", 50257), ("350m", 50257)],
)
@pytest.mark.parametrize("name", LAYERS)
def test_every_block_meets_the_budget(name: str, num_params: str, vocab_size: int) -> None:
    model = create_model(vocab_size, num_params, name, device="meta")
    size = SIZES[num_params]
    total = sum(p.numel() for p in model.parameters())
    assert abs(total / size.parameters - 1) <= 0.01
    assert sum(model.parameter_counts().values()) == total
    c = model.config
    assert (c.d_model, c.n_layers, c.n_heads) == size[1:]
    assert c.pattern == (name,)
    assert c.ffn_dim % 8 == 0
    assert {block.ffn.up_proj.out_features for block in model.blocks} == {c.ffn_dim}


def test_sizes_are_those_of_the_guide() -> None:
    assert SIZES["150m"] == (150_000_000, 768, 12, 12)
    assert SIZES["250m"] == (250_000_000, 1024, 16, 16)
    assert SIZES["350m"] == (350_000_000, 1280, 20, 20)


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": HYBRID, "block_kwargs": {"dpassm": {"ssm_state_dim": 256}}},
        {"pattern": ("dpassm", "dpassm", "vanilla")},
        {"block_type": "blade", "block_kwargs": {"state_update": "mlp", "state_dim": 256}},
        {"block_type": "vanilla", "block_kwargs": {"n_kv_heads": 3}, "vocab_size": 128_256},
        {"tie_embeddings": False, "vocab_size": 50_257},
    ],
)
def test_options_change_the_width_and_not_the_budget(options: dict[str, Any]) -> None:
    model = create_model(**{"vocab_size": 1000, **options}, device="meta")
    total = sum(p.numel() for p in model.parameters())
    assert abs(total / 150_000_000 - 1) <= 0.01


def test_impossible_budget_says_so_with_numbers() -> None:
    with pytest.raises(ValueError, match=r"1,000,000 parameters within 1%.*4,096,000.*vocabulary"):
        create_model(32_000, "tiny", device="meta")
    model = create_model(32_000, "tiny", ffn_dim=52, device="meta")  # at one's own risk
    assert model.config.ffn_dim == 52


def test_solving_draws_nothing_from_the_generator() -> None:
    torch.manual_seed(0)
    solved = create_model(257, "tiny", "dpassm")
    torch.manual_seed(0)
    given_width = create_model(257, "tiny", "dpassm", ffn_dim=solved.config.ffn_dim)
    for x, y in zip(solved.parameters(), given_width.parameters(), strict=True):
        assert torch.equal(x, y)


INITIALISATION_SNIPPET = """
from longctx_layers import create_model
model = create_model(vocab_size=1000, num_params='150m', block_type='dpassm', block_kwargs={'window_size': 128})
print(f'Model parameters: {sum(p.numel() for p in model.parameters()):,}')
"""  # noqa: E501
FORWARD_SNIPPET = """
import torch
from longctx_layers import create_model
model = create_model(vocab_size=1000, num_params='150m', block_type='dpassm', block_kwargs={'window_size': 128})
x = torch.randint(0, 1000, (2, 64))
logits = model(x)
print(f'Output shape: {logits.shape}')
"""  # noqa: E501


@pytest.mark.parametrize("device", ["meta", pytest.param("cpu", marks=pytest.mark.slow)])
def test_snippets_of_the_guide(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device(device):
        exec(INITIALISATION_SNIPPET, {})
        exec(FORWARD_SNIPPET, {})
    parameters, shape = capsys.readouterr().out.splitlines()
    count = int(parameters.removeprefix("Model parameters: ").replace(",", ""))
    assert abs(count / 150_000_000 - 1) <= 0.01
    assert shape == "Output shape: torch.Size([2, 64, 1000])"


def test_describe_names_the_width_and_the_counts() -> None:
    model = create_model(257, "tiny", pattern=("dpassm", "vanilla"), device="meta")
    for text in (model.describe(), repr(model)):
        assert "dpassm + vanilla" in text
        assert f"ffn_dim {model.config.ffn_dim}" in text
        assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text
        assert "embedding 32,896" in text


# ---- What a config means


def test_options_that_vary_over_depth() -> None:
    shape = {"vocab_size": 5, "d_model": 16, "n_heads": 2, "n_layers": 6, "ffn_dim": 8}
    blades = ModelConfig(**shape, pattern=("blade",), block_kwargs={"chunk_size": 10})
    assert [blades.layer_options(i)["chunk_shift"] for i in range(6)] == [0, 5, 0, 5, 0, 5]
    # Every blade has an even index here, and still they alternate.
    hybrid = ModelConfig(**shape, pattern=("blade", "vanilla"))
    assert [hybrid.layer_options(i)["chunk_shift"] for i in (0, 2, 4)] == [0, 64, 0]
    assert "chunk_shift" not in hybrid.layer_options(1)
    fixed = ModelConfig(**shape, pattern=("blade",), block_kwargs={"chunk_shift": 3})
    assert [fixed.layer_options(i)["chunk_shift"] for i in range(6)] == [3] * 6
    bigbird = ModelConfig(**shape, pattern=("vanilla", "baseline_bigbird"))
    assert [bigbird.layer_options(i)["seed"] for i in (1, 3, 5)] == [1, 3, 5]
    assert LongContextLM(bigbird, device="meta").blocks[3].mixer.seed == 3


def test_pattern_cycles_and_options_go_by_name() -> None:
    model = small_model(
        *("dpassm", "dpassm", "vanilla"),
        n_layers=5,
        block_kwargs={"dpassm": {"window_size": 7}, "vanilla": {"n_kv_heads": 2, "dropout": 0.5}},
        dropout=0.25,
    )
    kinds = [type(block.mixer).__name__ for block in model.blocks]
    assert kinds == ["DPASSM", "DPASSM", "CausalAttention", "DPASSM", "DPASSM"]
    assert model.blocks[4].mixer.window_size == 7
    assert model.blocks[2].mixer.n_kv_heads == 2
    assert [block.mixer.dropout for block in model.blocks] == [0.25, 0.25, 0.5, 0.25, 0.25]
    assert model.blocks[2].dropout.p == model.dropout.p == 0.25


def test_config_goes_through_plain_values() -> None:
    config = ModelConfig(
        vocab_size=5,
        d_model=16,
        n_layers=2,
        n_heads=2,
        ffn_dim=8,
        pattern=("vanilla",),
        block_kwargs={"projection": Projection(head_dim=4, qk_norm=True)},
    )
    values = config.to_dict()
    assert values["block_kwargs"]["vanilla"]["projection"]["head_dim"] == 4
    assert ModelConfig.from_dict(values) == config
    assert LongContextLM(config, device="meta").blocks[0].mixer.head_dim == 4


VALID = {"vocab_size": 5, "d_model": 16, "n_layers": 2, "n_heads": 2, "ffn_dim": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected at least 1, got 0"),
        ({"n_layers": 2.0}, "n_layers: expected an integer"),
        ({"tie_embeddings": 1}, "tie_embeddings: expected a bool"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\)"),
        ({"dropout": "0.1"}, r"dropout: expected a number in \[0, 1\)"),
        ({"pattern": ()}, "pattern: expected at least one of the layers .*'blade'"),
        ({"pattern": ("dpasm",)}, "unknown layer 'dpasm'; did you mean 'dpassm'.*'blade'"),
        ({"pattern": ("vanilla", "blade", "dpassm")}, "at most n_layers = 2 names, got 3"),
        ({"block_kwargs": 128}, "block_kwargs: expected a dict"),
        ({"block_kwargs": {"blade": {}}}, r"a dict of options for each of \['dpassm'\]"),
        ({"pattern": ("blade", "dpassm"), "block_kwargs": {"window_size": 4}}, "by name"),
        ({"pattern": ("blade", "dpassm"), "block_kwargs": {"blade": 4}}, "by name"),
    ],
)
def test_wrong_config_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ModelConfig(**{**VALID, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_params": "150"}, "num_params: expected one of .*'150m'.*'350m'"),
        ({"block_type": "dpasm"}, "unknown layer 'dpasm'; did you mean 'dpassm'.*bigbird"),
        ({"block_kwargs": {"window_sise": 4}}, "no options .*; did you mean 'window_size'.*'ssm'"),
        ({"block_type": "blade", "pattern": ("dpassm",)}, "block_type or pattern, got both"),
        ({"ffn_dim": 0}, "ffn_dim: expected at least 1"),
        ({"block_kwargs": {"window": 4}}, "no options .*'window'.*its options are .*'window_size'"),
        ({"pattern": "dpasm"}, "unknown layer 'dpasm'; did you mean 'dpassm'"),
        ({"pattern": 5}, "expected names of layers, got 5"),
    ],
)
def test_wrong_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        create_model(**{"vocab_size": 257, "num_params": "tiny", **change})


# ---- Initialisation


def assert_initialised(model: LongContextLM) -> None:
    def std(module: nn.Module) -> float:
        return module.weight.std().item()

    def usual(module: nn.Module) -> float:
        return module.weight.shape[1] ** -0.5

    residual = (2 * len(model.blocks)) ** -0.5
    assert std(model.embedding) == pytest.approx(usual(model.embedding), rel=0.05)
    assert std(model.head) == pytest.approx(usual(model.head), rel=0.05)
    for block in model.blocks:
        assert torch.equal(block.mixer_norm.weight, torch.ones(model.config.d_model))
        assert std(block.ffn.gate_proj) == pytest.approx(usual(block.ffn.gate_proj), rel=0.05)
        expected = residual * usual(block.ffn.down_proj)
        assert std(block.ffn.down_proj) == pytest.approx(expected, rel=0.05)
        for name, module in block.mixer.named_modules():
            if name == "gate_proj":  # both paths count alike at first: the layer's own choice
                assert not module.weight.any()
            elif isinstance(module, nn.Linear):
                expected = usual(module) * (residual if name == "o_proj" else 1)
                assert std(module) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", LAYERS)
def test_initialisation_and_materialising_from_meta(name: str) -> None:
    torch.manual_seed(0)
    assert_initialised(create_model(257, "tiny", name, tie_embeddings=False))
    model = create_model(257, "tiny", name, tie_embeddings=False, device="meta")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(0)
    model.reset_parameters()
    assert_initialised(model)
    # What else a layer has (time scales, norms, memory) is as the layer itself draws it.
    alone = build_layer(name, 128, 4)
    torch.manual_seed(0)
    alone.reset_parameters()
    first = model.blocks[0].mixer.state_dict()
    for key, value in alone.state_dict().items():
        assert key == "o_proj.weight" or torch.equal(first[key], value), key


@every_pattern
def test_meta_device(pattern: tuple[str, ...]) -> None:
    with torch.device("meta"):
        model = small_model(*pattern)
        logits, state = model(torch.zeros(2, 9, dtype=torch.int64), return_state=True)
    assert logits.shape == (2, 9, VOCABULARY)
    assert {x.device.type for x in (*model.parameters(), logits, *state[0])} == {"meta"}


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = small_model("window"), small_model("window", tie_embeddings=False)
    names = {name for name, _ in untied.named_parameters()}
    assert names - {name for name, _ in tied.named_parameters()} == {"head.weight"}
    assert tied.parameter_counts()["head"] == 0
    assert untied.parameter_counts()["head"] == VOCABULARY * 16
    assert list(tied.state_dict()) == [name for name, _ in tied.named_parameters()]


# ---- Running


def packed_and_padded(length: int, seed: int) -> Tensor:
    """Segment ids of three rows: documents with pads among them, documents, and one document."""
    documents = torch.arange(length) // 7
    pads = some_ids(1, length, seed, vocab_size=3)[0] == 0
    return torch.stack([documents.masked_fill(pads, -1), documents, torch.zeros_like(documents)])


def assert_streams(pattern: tuple[str, ...], pieces: list[int], seed: int) -> None:
    model = small_model(*pattern)
    ids, segments = some_ids(3, sum(pieces), seed), packed_and_padded(sum(pieces), seed)
    expected, final = model(ids, segment_ids=segments, return_state=True)
    state, outputs = model.init_state(3), []
    for piece, segment in zip(ids.split(pieces, 1), segments.split(pieces, 1), strict=True):
        logits, state = model(piece, state, segment_ids=segment, return_state=True)
        outputs.append(logits)
    real = segments >= 0
    assert max_error(torch.cat(outputs, 1)[real], expected[real]) <= 1e-10
    assert_states_equal(state, final, 1e-10)


@every_pattern
def test_streams_like_one_pass(pattern: tuple[str, ...]) -> None:
    assert_streams(pattern, [1, 0, 12, 6], seed=0)


@pytest.mark.slow
@every_pattern
@given(pieces=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_any_split_streams_like_one_pass(
    pattern: tuple[str, ...], pieces: list[int], seed: int
) -> None:
    assert_streams(pattern, pieces, seed)


@every_pattern
def test_left_pads_change_nothing(pattern: tuple[str, ...]) -> None:
    model, ids, more = small_model(*pattern), some_ids(1, 20), some_ids(1, 9, seed=1)
    padded = F.pad(ids, (3, 0), value=7)
    segments = F.pad(torch.zeros_like(ids), (3, 0), value=-1)
    logits, state = model(padded, segment_ids=segments, return_state=True)
    expected, final = model(ids, return_state=True)
    assert max_error(logits[:, 3:], expected) <= 1e-12
    assert max_error(model(more, state), model(more, final)) <= 1e-12


@every_pattern
def test_last_only_and_return_state(pattern: tuple[str, ...]) -> None:
    model, ids = small_model(*pattern), some_ids(2, 11)
    logits = model(ids)
    assert logits.shape == (2, 11, VOCABULARY)
    last, state = model(ids, last_only=True, return_state=True)
    assert last.shape == (2, 1, VOCABULARY)
    assert max_error(last, logits[:, -1:]) <= 1e-12
    assert len(state) == len(model.blocks)
    assert model(ids[:, :0]).shape == (2, 0, VOCABULARY)


def test_state_size_is_the_sum_over_the_layers() -> None:
    model = small_model(*HYBRID)
    _, state = model(some_ids(1, 21), return_state=True)
    nbytes = sum(x.nbytes for layer in state for x in layer)
    assert model.state_size(21) == nbytes
    assert model.state_size(42) > nbytes  # vanilla grows
    assert small_model("dpassm").state_size(21) == small_model("dpassm").state_size(10**6)


def test_wrong_inputs_are_refused() -> None:
    model, ids = small_model(*HYBRID), some_ids(2, 5)
    with pytest.raises(ValueError, match=r"ids: expected \[B, T\]"):
        model(ids[0])
    with pytest.raises(TypeError, match="ids: expected int64 or int32, got torch.float32"):
        model(ids.float())
    with pytest.raises(ValueError, match=r"token ids in \[0, 13\), got ids from .* to 13"):
        model(torch.cat([ids, torch.full((2, 1), 13)], 1))
    with pytest.raises(ValueError, match=r"token ids in \[0, 13\), got ids from -1"):
        model(ids.clamp(max=3) - 1 - ids.clamp(max=3))
    with pytest.raises(ValueError, match="one for each of 3 blocks, got 2"):
        model(ids, model.init_state(2)[:2])
    with pytest.raises(ValueError, match="segment_ids"):
        model(ids, segment_ids=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels: .*got \[2, 4\]"):
        model.loss(ids, ids[:, 1:])
    with pytest.raises(TypeError, match="labels: expected int64, got torch.float32"):
        model.loss(ids, ids.float())
    with pytest.raises(ValueError, match="reduction: expected one of .*'none'"):
        model.loss(ids, ids, reduction="avg")
    with pytest.raises(ValueError, match="tokens_at_once: expected at least 1"):
        model.loss(ids, ids, tokens_at_once=0)


def test_half_precision() -> None:
    model = small_model(*HYBRID, dtype=torch.bfloat16)
    ids = some_ids(2, 9)
    assert model(ids).dtype == torch.bfloat16
    assert model.loss(ids, ids).dtype == torch.float32
    # The norm's squares are summed in float32: in bfloat16, 1 + 2^-8 would already be 1.
    norm = nn.RMSNorm(512, 1e-5, dtype=torch.bfloat16)
    x = torch.full((512,), 2**-4, dtype=torch.bfloat16)
    x[0] = 1.0
    expected = F.rms_norm(x.double(), (512,), eps=1e-5)
    assert max_error(norm(x), expected) <= torch.finfo(torch.bfloat16).eps * expected.max().item()


def test_autocast() -> None:
    model, ids = small_model(*HYBRID, dtype=torch.float32), some_ids(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        loss, state = model.loss(ids, ids, return_state=True)
        model(ids, state)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model.loss(ids, ids).item(), rel=0.1)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.slow
@every_pattern
def test_compiled_in_one_graph(pattern: tuple[str, ...]) -> None:
    model, ids = small_model(*pattern), some_ids(2, 20)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert max_error(compiled(ids), model(ids)) <= 1e-10


# ---- The loss


def plain_loss(model: LongContextLM, ids: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), **options)


def gradients(model: LongContextLM, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


@pytest.mark.parametrize(
    ("tokens_at_once", "tie_embeddings"), [(1, True), (7, False), (7, True), (1000, False)]
)
@every_pattern
def test_loss_is_plain_cross_entropy(
    pattern: tuple[str, ...], tokens_at_once: int, tie_embeddings: bool
) -> None:
    model = small_model(*pattern, tie_embeddings=tie_embeddings)
    ids, labels = some_ids(2, 11), some_ids(2, 11, seed=1)
    labels[0, 3:6] = -100
    loss = model.loss(ids, labels, tokens_at_once=tokens_at_once)
    expected = plain_loss(model, ids, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for x, y in zip(gradients(model, loss), gradients(model, expected), strict=True):
        assert max_error(x, y) <= 1e-12


def test_reductions() -> None:
    model, ids, labels = small_model("window"), some_ids(2, 9), some_ids(2, 9, seed=1)
    labels[1, 4] = -100
    single = model.loss(ids, labels, reduction="none", tokens_at_once=4)
    assert single.shape == (2, 9)
    assert single[1, 4] == 0
    expected = plain_loss(model, ids, labels, reduction="none").view(2, 9)
    assert max_error(single, expected) <= 1e-12
    total = model.loss(ids, labels, reduction="sum").item()
    assert total == pytest.approx(single.sum().item())
    assert model.loss(ids, labels).item() == pytest.approx(total / 17)


def test_pads_have_no_loss() -> None:
    model, ids = small_model("dpassm"), some_ids(1, 9)
    segments = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, -1, -1]])
    loss = model.loss(ids, ids, segment_ids=segments)
    assert loss.item() == pytest.approx(plain_loss(model, ids[:, 2:7], ids[:, 2:7]).item())


def test_labels_outside_the_vocabulary_are_refused() -> None:
    model, ids = small_model("window"), some_ids(2, 5)
    with pytest.raises(
        ValueError, match=r"labels: expected -100 or token ids in \[0, 13\), got 3 to 13"
    ):
        model.loss(ids, torch.tensor([[3, 4, 13, -100, 5]] * 2))


def test_loss_without_any_label_is_zero() -> None:
    model, ids = small_model("blade"), some_ids(2, 5)
    loss = model.loss(ids, torch.full_like(ids, -100))
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(model, loss))


@every_pattern
def test_truncated_back_propagation(pattern: tuple[str, ...]) -> None:
    model, ids = small_model(*pattern), some_ids(2, 20)
    labels = ids.roll(-1, 1)
    first, state = model.loss(ids[:, :9], labels[:, :9], return_state=True, reduction="sum")
    second = model.loss(ids[:, 9:], labels[:, 9:], state, reduction="sum")
    whole = model.loss(ids, labels, reduction="sum")
    expected = gradients(model, whole)
    for x, y in zip(gradients(model, first + second), expected, strict=True):
        assert max_error(x, y) <= 1e-10
    cut = model.loss(ids[:, 9:], labels[:, 9:], detach_state(state), reduction="sum")
    assert cut.item() == pytest.approx(second.item())
    different = [
        max_error(x, y) > 1e-6
        for x, y in zip(gradients(model, cut), gradients(model, second), strict=True)
    ]
    assert any(different)


def test_whole_logits_never_exist() -> None:
    length, vocab_size = 96, 1000
    model = small_model("window", vocab_size=vocab_size, d_model=8, n_heads=2)
    ids = some_ids(2, length, vocab_size=vocab_size)
    with MemoryMeter() as ours:
        model.loss(ids, ids, tokens_at_once=16).backward()
    with MemoryMeter() as plain:
        plain_loss(model, ids, ids).backward()
    assert plain.largest == 2 * length * vocab_size  # the meter sees them where they exist
    assert ours.largest == 16 * vocab_size
    assert ours.peak < plain.peak / 4


# ---- Activation checkpointing


@every_pattern
def test_checkpointing_changes_no_gradient(pattern: tuple[str, ...]) -> None:
    model, ids = small_model(*pattern, dropout=0.3), some_ids(2, 17)
    results = []
    for flag in (False, True):
        model.gradient_checkpointing = flag
        torch.manual_seed(0)
        first, state = model.loss(ids, ids, return_state=True)
        results.append(gradients(model, first + model.loss(ids, ids, state)))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_checkpointing_saves_memory() -> None:
    ids, peaks = some_ids(2, 128), []
    for flag in (False, True):
        model = create_model(257, "tiny", "window", gradient_checkpointing=flag)
        assert model.gradient_checkpointing is flag
        with MemoryMeter() as meter:
            loss = model.loss(ids, ids)
            loss.backward()
        peaks.append(meter.peak)
    assert peaks[1] < peaks[0] * 0.6
