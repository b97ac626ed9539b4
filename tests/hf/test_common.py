"""What every transformers model must do, for each layer: loading, tying, padding, outputs."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.hf_models import VOCABULARY, every_pattern, hf_model, some_ids
from support.pretrained_models import pretrained
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from longctx_layers import LongContextLM
from longctx_layers.convert import convert_attention
from longctx_layers.hf import LongCtxCache, LongCtxConfig, LongCtxForCausalLM
from longctx_layers.testing import parameter_dtypes, rates, small_model

tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    weights = a.state_dict()
    assert weights.keys() == b.state_dict().keys()
    for name, value in b.state_dict().items():
        assert torch.equal(weights[name], value), name


# ---- Saving and loading


@tied_or_not
@every_pattern
def test_save_and_load(pattern: tuple[str, ...], tied: bool, tmp_path: Path) -> None:
    model, ids = hf_model(*pattern, tie_embeddings=tied), some_ids(2, 11)
    model.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(loaded, LongCtxForCausalLM)
    assert not loaded.training
    assert loaded.dtype == torch.float64
    assert loaded.config.to_model_config() == model.config.to_model_config()
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert_same_weights(loaded, model)
    # Close, not equal: rounding depends on how the operands are aligned in memory.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@tied_or_not
@every_pattern
def test_our_own_folder_and_back(pattern: tuple[str, ...], tied: bool, tmp_path: Path) -> None:
    native, ids = small_model(*pattern, tie_embeddings=tied).eval(), some_ids(2, 11)
    native.save_pretrained(tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(model(ids).logits, native(ids))
    model.save_pretrained(tmp_path / "theirs")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    loaded.to_native().save_pretrained(tmp_path / "back")
    back = LongContextLM.from_pretrained(tmp_path / "back")
    assert back.config == native.config
    assert_same_weights(back, native)


def test_a_folder_of_transformers_names_what_loads_it(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("ours", "llama", "converted")}
    hf_model("window").save_pretrained(folders["ours"])
    llama = pretrained("llama")
    llama.save_pretrained(folders["llama"])
    convert_attention(llama, "window", window_size=8).save_pretrained(folders["converted"])
    ways = {
        "ours": r"LongCtxForCausalLM\.from_pretrained\('.*ours'\), whose to_native\(\)",
        "llama": "type 'llama': load it with AutoModelForCausalLM",
        "converted": r"use longctx_layers\.convert\.load_converted\('.*converted'\)",
    }
    for name, way in ways.items():
        with pytest.raises(ValueError, match=way):
            LongContextLM.from_pretrained(folders[name])


@tied_or_not
def test_native_models_share_their_weights(tied: bool) -> None:
    native = small_model("dpassm", tie_embeddings=tied)
    native.gradient_checkpointing = True
    model = LongCtxForCausalLM.from_native(native)
    assert model.training
    assert model.model.gradient_checkpointing
    back = model.to_native()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    theirs = back.state_dict()
    for name, value in native.state_dict().items():
        assert theirs[name].data_ptr() == value.data_ptr(), name
    assert torch.equal(model(some_ids(1, 5)).logits, native(some_ids(1, 5)))


def test_wrapped_model_streams_as_ever() -> None:
    model, ids = hf_model("dpassm"), some_ids(2, 11)
    first, state = model.model(ids[:, :6], return_state=True)
    second = model.model(ids[:, 6:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), model(ids).logits)


@pytest.mark.parametrize("kind", ["bfloat16", torch.float16, torch.float32, "auto"], ids=str)
def test_dtype_on_loading(kind: Any, tmp_path: Path) -> None:
    saved = hf_model("dpassm", dtype=torch.float32)
    saved.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kind)
    named = {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(kind, kind)
    assert parameter_dtypes(model) == ({torch.float32}, {named})
    assert all(torch.equal(p, rates(saved)[name]) for name, p in rates(model).items())
    assert model(some_ids(1, 9)).logits.isfinite().all()


def test_weights_in_shards(tmp_path: Path) -> None:
    model = hf_model("blade")
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_first_weights_are_those_of_our_own_model() -> None:
    shape = small_model("dpassm", "blade", tie_embeddings=False).config
    torch.manual_seed(0)
    model = LongCtxForCausalLM(LongCtxConfig.from_model_config(shape))
    torch.manual_seed(0)
    native = LongContextLM(shape)
    ours = {f"model.{name}": value for name, value in native.state_dict().items()}
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())


@every_pattern
def test_weights_that_a_checkpoint_lacks_are_drawn(
    pattern: tuple[str, ...], tmp_path: Path
) -> None:
    model = hf_model(*pattern, d_model=64, n_heads=4, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    lacking = {
        name
        for name in weights
        if any(part in name for part in ("o_proj.weight", "dt_bias", "A_log", "ffn_norm", "scale"))
    }
    safetensors.torch.save_file(
        {name: value for name, value in weights.items() if name not in lacking},
        path,
        metadata={"format": "pt"},
    )
    loaded, info = LongCtxForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == lacking
    for name, value in loaded.state_dict().items():
        if name not in lacking and name in weights:
            assert torch.equal(value, weights[name]), name
        assert value.isfinite().all()
    for i, block in enumerate(loaded.model.blocks):
        n_blocks = len(loaded.model.blocks)
        std = (block.mixer.o_proj.in_features * 2 * n_blocks) ** -0.5
        assert block.mixer.o_proj.weight.std().item() == pytest.approx(std, rel=0.1)
        assert (block.ffn_norm.weight == 1).all()
        assert not torch.equal(block.mixer.o_proj.weight, model.model.blocks[i].mixer.o_proj.weight)


def test_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model, ids = hf_model("dpassm"), some_ids(2, 9)
    model.save_pretrained(tmp_path)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@tied_or_not
@every_pattern
def test_blocks_offloaded_to_disk(pattern: tuple[str, ...], tied: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    model, ids = hf_model(*pattern, tie_embeddings=tied), some_ids(2, 9)
    expected = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    accelerate.disk_offload(model, tmp_path, "cpu", preload_module_classes=["Block"])
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(model(ids).logits, expected[0])
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected[1])


def test_offloading_while_loading_says_what_to_do_instead(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    hf_model("dpassm").save_pretrained(tmp_path / "saved")
    parts = ("embedding", "dropout", "blocks.0", "norm", "head")
    device_map = {f"model.{part}": "cpu" for part in parts} | {"model.blocks.1": "disk"}
    with pytest.raises(ValueError, match=r"on a device that computes.*disk_offload"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "away"
        )


def test_what_push_to_hub_would_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The local half of push_to_hub: the folder and its list of files. Nothing is sent."""
    sent: dict[str, bytes] = {}

    def create_repo(self: Any, repo_id: str, **_: Any) -> Any:
        return type("Url", (), {"repo_id": f"someone/{repo_id}"})()

    def create_commit(self: Any, repo_id: str, operations: list[Any], **_: Any) -> None:
        assert repo_id == "someone/longctx"
        for operation in operations:
            with operation.as_file() as file:
                sent[operation.path_in_repo] = file.read()

    api, hub = "huggingface_hub.hf_api.HfApi", "transformers.utils.hub"
    monkeypatch.setattr(f"{api}.create_repo", create_repo)
    monkeypatch.setattr(f"{api}.create_branch", lambda *a, **k: None)
    monkeypatch.setattr(f"{api}.create_commit", create_commit)
    # The functions of this module are methods that were bound at import.
    monkeypatch.setattr(f"{hub}.create_repo", partial(create_repo, None), raising=False)
    monkeypatch.setattr(f"{hub}.create_commit", partial(create_commit, None), raising=False)
    monkeypatch.setattr(
        "huggingface_hub.ModelCard.load",
        lambda *a, **k: (_ for _ in ()).throw(_entry_not_found()),
    )
    model = hf_model("dpassm")
    model.push_to_hub("longctx")
    assert {"config.json", "generation_config.json", "model.safetensors"} <= sent.keys()
    for name, content in sent.items():
        (tmp_path / name).write_bytes(content)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)


def _entry_not_found() -> Exception:
    from huggingface_hub.errors import LocalEntryNotFoundError

    return LocalEntryNotFoundError("offline")


def test_auto_classes() -> None:
    config = AutoConfig.for_model("longctx", hidden_size=16, n_heads=4, n_layers=1, vocab_size=9)
    assert isinstance(config, LongCtxConfig)
    assert isinstance(AutoModelForCausalLM.from_config(config), LongCtxForCausalLM)


# ---- Tying and resizing


@tied_or_not
def test_tied_weights(tied: bool, tmp_path: Path) -> None:
    hf_model("dpassm", tie_embeddings=tied).save_pretrained(tmp_path)
    model = LongCtxForCausalLM.from_pretrained(tmp_path)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    in_file = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert ("model.head.weight" in in_file) != tied
    assert model.num_parameters() == sum(value.numel() for value in in_file.values())
    assert model.model.parameter_counts()["head"] == (0 if tied else embedding.weight.numel())

    ids = some_ids(2, 9)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert (embedding.weight is head.weight) == tied
    other = copy.deepcopy(model)
    assert (other.model.embedding.weight is other.model.head.weight) == tied


@tied_or_not
@every_pattern
def test_resizing_embeddings(pattern: tuple[str, ...], tied: bool, tmp_path: Path) -> None:
    model, ids = hf_model(*pattern, tie_embeddings=tied), some_ids(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 7)
    after = model(ids).logits
    assert after.shape[-1] == VOCABULARY + 7
    torch.testing.assert_close(after[..., :VOCABULARY], before)
    assert model.config.vocab_size == model.model.config.vocab_size == VOCABULARY + 7
    assert (model.model.embedding.weight is model.model.head.weight) == tied
    assert model(torch.full((1, 3), VOCABULARY + 6), labels=ids[:1, :3]).loss.isfinite()

    model.save_pretrained(tmp_path)
    assert_same_weights(LongCtxForCausalLM.from_pretrained(tmp_path), model)
    model.to_native().save_pretrained(tmp_path / "ours")
    native = LongContextLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(native(ids), after)

    model.resize_token_embeddings(VOCABULARY - 2)
    small = ids.clamp(max=VOCABULARY - 3)
    assert model(small).logits.shape[-1] == VOCABULARY - 2
    model.resize_token_embeddings(VOCABULARY, pad_to_multiple_of=8)
    assert model.config.vocab_size == 16


# ---- Padding and batches


@pytest.mark.parametrize("side", ["left", "right", "both", "within"])
@every_pattern
def test_padding(pattern: tuple[str, ...], side: str) -> None:
    """Logits equal those of each row alone, whatever the ids at padding."""
    model = hf_model(*pattern)
    rows = [some_ids(n, seed=n) for n in (12, 9, 4)]
    ids, mask = torch.full((3, 12), 5), torch.zeros(3, 12, dtype=torch.int64)
    places = []
    for i, row in enumerate(rows):
        spare = 12 - len(row)
        place = torch.arange(len(row))
        first = {"left": spare, "right": 0, "both": spare // 2, "within": 0}[side]
        place = place + first
        if side == "within":  # a gap in the middle
            place[len(row) // 2 :] += spare
        ids[i, place], mask[i, place] = row, 1
        places.append(place)
    logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, places[i]], model(row[None]).logits[0])

    other = torch.where(mask == 0, (ids + 3) % VOCABULARY, ids)
    assert torch.equal(model(other, attention_mask=mask).logits[mask == 1], logits[mask == 1])
    if side != "right":  # padding after the tokens has no effect anyway
        assert not torch.allclose(model(ids).logits[-1, places[-1]], logits[-1, places[-1]])


@every_pattern
def test_batch_equals_single_rows(pattern: tuple[str, ...]) -> None:
    model, ids = hf_model(*pattern), some_ids(3, 12)
    together = model(ids)
    for i in range(3):
        alone = model(ids[i : i + 1])
        torch.testing.assert_close(together.logits[i], alone.logits[0])


def test_a_mask_of_ones_costs_nothing_and_bool_will_do() -> None:
    model, ids = hf_model("dpassm"), some_ids(2, 9)
    expected = model(ids).logits
    for mask in (torch.ones(2, 9), torch.ones(2, 9, dtype=torch.bool)):
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)


# ---- What forward returns


@every_pattern
def test_hidden_states(pattern: tuple[str, ...]) -> None:
    model, ids = hf_model(*pattern), some_ids(2, 9)
    output = model(ids, output_hidden_states=True)
    hidden = output.hidden_states
    assert len(hidden) == model.config.num_hidden_layers + 1
    assert torch.equal(hidden[0], model.model.embedding(ids))
    x, _ = model.model.blocks[0](hidden[0])
    torch.testing.assert_close(hidden[1], x)
    assert torch.equal(hidden[-1], model.model.backbone(ids)[0])
    assert torch.equal(model.model.project(hidden[-1]), output.logits)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert model(ids).hidden_states is not None


@every_pattern
def test_logits_are_our_own_models(pattern: tuple[str, ...]) -> None:
    native, ids = small_model(*pattern).eval(), some_ids(2, 11)
    model = LongCtxForCausalLM.from_native(native)
    assert torch.equal(model(ids).logits, native(ids))


@every_pattern
def test_cache_goes_on_where_it_stopped(pattern: tuple[str, ...]) -> None:
    model, ids = hf_model(*pattern), some_ids(2, 13)
    expected, cache, logits = model(ids).logits, LongCtxCache(), []
    for piece in ids.split([5, 1, 1, 6], 1):
        output = model(piece, past_key_values=cache)
        assert output.past_key_values is cache
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected)
    assert cache.get_seq_length() == 13


def test_a_cache_is_made_when_it_is_wanted() -> None:
    model, ids = hf_model("dpassm"), some_ids(1, 5)
    assert model(ids).past_key_values.get_seq_length() == 5
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None


def test_tuples_and_kept_logits() -> None:
    model, ids = hf_model("blade"), some_ids(2, 9)
    logits = model(ids).logits
    assert torch.equal(model(ids, return_dict=False)[0], logits)
    loss, first, *_ = model(ids, labels=ids, return_dict=False)
    assert loss.dim() == 0
    assert torch.equal(first, logits)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    columns = torch.tensor([0, 4, 8])
    torch.testing.assert_close(model(ids, logits_to_keep=columns).logits, logits[:, columns])


@every_pattern
def test_inputs_embeds(pattern: tuple[str, ...]) -> None:
    model, ids = hf_model(*pattern), some_ids(2, 9)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_loss() -> None:
    model, ids = hf_model("dpassm"), some_ids(3, 9)
    labels = ids.clone()
    labels[0, :5] = labels[2, 3] = -100
    output = model(ids, labels=labels)
    scores = output.logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = -scores.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)[targets >= 0]
    torch.testing.assert_close(output.loss.double(), picked.mean(), rtol=1e-5, atol=0)
    # The Trainer divides by the number of labels in the whole batch; this is a part of it.
    part = model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(part.double(), picked.sum() / 50, rtol=1e-5, atol=0)
    ours = model.model.loss(ids[:, :-1], labels[:, 1:])
    torch.testing.assert_close(output.loss.double(), ours, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@every_pattern
def test_gradient_checkpointing(pattern: tuple[str, ...], reentrant: bool) -> None:
    model, ids = hf_model(*pattern).train(), some_ids(2, 12)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.model.blocks[0].register_forward_pre_hook(count)
    expected = gradients()
    assert calls == 1
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.model.gradient_checkpointing
    actual = gradients()
    assert calls == 3  # the third is the recomputation in the backward pass
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
    model.gradient_checkpointing_disable()
    gradients()
    assert calls == 4


@every_pattern
def test_training_lowers_the_loss(pattern: tuple[str, ...]) -> None:
    model, ids = hf_model(*pattern, dtype=torch.float32).train(), some_ids(4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_dropout_is_for_training_only() -> None:
    model, ids = hf_model("dpassm", dropout=0.3), some_ids(2, 9)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


# ---- Errors


def test_mistakes_are_named() -> None:
    model, ids = hf_model("dpassm"), some_ids(2, 9)
    with pytest.raises(ValueError, match="expected input_ids or inputs_embeds, got neither"):
        model()
    with pytest.raises(ValueError, match="expected input_ids or inputs_embeds, got both"):
        model(ids, inputs_embeds=model.model.embedding(ids))
    with pytest.raises(ValueError, match=r"ids in \[0, 13\), got ids from 0 to 99"):
        model(torch.tensor([[0, 99]]))
    with pytest.raises(ValueError, match=r"attention_mask: expected \[B, length\].*segment_ids"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match="attention_mask: expected at least the 9 columns"):
        model(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(ids, output_attentions=True)
    with pytest.raises(TypeError, match="expected a LongCtxCache, got a DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    three = LongCtxForCausalLM.from_native(small_model("dpassm", n_layers=3))
    with pytest.raises(ValueError, match="expected states of 3 blocks, got 2"):
        three(ids, past_key_values=model(ids).past_key_values)
    with pytest.raises(ValueError, match=r"inputs_embeds: expected .*hidden_size"):
        model(inputs_embeds=torch.zeros(2, 9, 5))
    with pytest.raises(ValueError, match=r"labels: expected .*of the call"):
        model(ids, labels=ids[:, :4])
    with pytest.raises(ValueError, match="labels: expected logits of all 9 columns"):
        model(ids, labels=ids, logits_to_keep=5)
    wide = torch.ones(2, 12)
    wide[:, 9:] = 0  # columns after the call
    torch.testing.assert_close(model(ids, attention_mask=wide).logits, model(ids).logits)
    with pytest.raises(ValueError, match="logits_to_keep: expected at least 0, got -1"):
        model(ids, logits_to_keep=-1)
