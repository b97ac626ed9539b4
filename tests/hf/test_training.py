"""The Trainer on real text, PEFT adapters on the projections, bitsandbytes weights."""

import inspect
import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hf_models import every_pattern, hf_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from longctx_layers import LAYERS
from longctx_layers.hf import LongCtxConfig, LongCtxForCausalLM
from longctx_layers.testing import small_model


def text_rows(length: int, count: int) -> list[dict[str, Tensor]]:
    """Rows of bytes from a module of the standard library."""
    text = inspect.getsource(json.decoder) + inspect.getsource(string)
    ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    rows = ids[: length * count].view(count, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def byte_model(block: str = "dpassm") -> LongCtxForCausalLM:
    options = {"window_size": 8, "ssm_state_dim": 4, "chunk_size": 8, "state_dim": 4}
    torch.manual_seed(0)
    return LongCtxForCausalLM(
        LongCtxConfig(
            vocab_size=256,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            block_type=block,
            block_kwargs={
                name: value
                for name, value in options.items()
                if name in inspect.signature(LAYERS[block]).parameters
            },
        )
    )


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "save_strategy": "no",
            "logging_steps": 1,
            "seed": 0,
            **options,
        },
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- The Trainer


@pytest.mark.parametrize("block", ["dpassm", "blade", "vanilla"])
def test_trainer_learns_real_text(block: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    rows = text_rows(64, 128)
    trainer = Trainer(
        model=byte_model(block),
        args=arguments(tmp_path, max_steps=30),
        train_dataset=rows[:112],
        eval_dataset=rows[112:],
    )
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(5.5, abs=1.0)  # ln 256
    trainer.train()
    assert losses(trainer)[-1] < 3.4  # the entropy of single bytes is about 3.2 here
    after = trainer.evaluate()["eval_loss"]
    assert after < 3.4
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = Trainer(model=loaded, args=arguments(tmp_path), eval_dataset=rows[112:])
    assert again.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-5)


def test_trainer_on_packed_documents_with_checkpointing(tmp_path: Path) -> None:
    """Documents of different lengths, flattened into one row without padding."""
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    rows = [
        {"input_ids": row["input_ids"][: 20 + 7 * (i % 7)]}
        for i, row in enumerate(text_rows(64, 112))
    ]
    weights = []
    for checkpointing in (False, True):
        model = byte_model()
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, max_steps=3, gradient_checkpointing=checkpointing),
            train_dataset=rows,
            data_collator=DataCollatorWithFlattening(),
        )
        trainer.train()
        assert model.model.gradient_checkpointing == checkpointing
        assert losses(trainer)[-1] < losses(trainer)[0]
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_accumulated_batches_equal_a_large_one(tmp_path: Path) -> None:
    """Also if the parts have different numbers of labels, because of num_items_in_batch."""
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    rows = text_rows(64, 16)
    for i, row in enumerate(rows):
        row["labels"] = row["labels"].clone()
        row["labels"][: 4 * i] = -100
    runs = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = Trainer(
            model=byte_model(),
            args=arguments(
                tmp_path,
                max_steps=2,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                optim="sgd",
            ),
            train_dataset=rows,
        )
        trainer.train()
        runs.append((losses(trainer), trainer.model.state_dict()))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@every_pattern
def test_trainer_trains_every_block_in_bfloat16_and_resumes(
    pattern: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    rows = text_rows(64, 64)
    options = {"bf16": True, "save_strategy": "steps", "save_steps": 5}

    def trained(folder: Path, steps: int, resume: bool = False) -> Trainer:
        torch.manual_seed(0)
        shape = small_model(*pattern, vocab_size=256, d_model=32).config
        model = LongCtxForCausalLM(LongCtxConfig.from_model_config(shape))
        args = arguments(folder, max_steps=steps, **options)
        trainer = Trainer(model=model, args=args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(tmp_path / "whole", 10)
    trained(tmp_path / "parts", 5)
    parts = trained(tmp_path / "parts", 10, resume=True)
    assert losses(whole)[-1] < losses(whole)[0] - 1
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, msg=name)


# ---- PEFT

# Tests require `MIN_PEFT_VERSION` where an older PEFT cannot work: transformers refuses it for its
# own adapters, and from 5.24 on `generate` of an older PEFT passes no cache (for a Llama, too).


def lora(model: LongCtxForCausalLM, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    config = peft.LoraConfig(
        **{
            "task_type": "CAUSAL_LM",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            **options,
        }
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("checkpointing", [False, True])
@every_pattern
def test_lora_on_our_projections(
    pattern: tuple[str, ...], checkpointing: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model = hf_model(*pattern, dtype=torch.float32)
    ids = torch.randint(0, 13, (4, 12), generator=torch.Generator().manual_seed(0))
    before, first = model(ids).logits, {n: v.clone() for n, v in model.state_dict().items()}
    adapted = lora(model)
    torch.testing.assert_close(adapted(ids).logits, before)  # B is 0 at first
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(trained) == 8 * len(model.model.blocks)

    adapted.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    history = []
    for _ in range(15):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < 0.9 * history[0]
    adapted.eval()
    after = adapted(ids).logits
    made = adapted.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    adapted.save_pretrained(tmp_path)

    fresh = hf_model(*pattern, dtype=torch.float32)
    assert all(torch.equal(v, first[n]) for n, v in fresh.state_dict().items())
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(loaded(ids).logits, after)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, LongCtxForCausalLM)
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(ids, max_new_tokens=5, do_sample=False), made)
    assert not torch.allclose(after, before)


def test_lora_on_all_linear_layers_leaves_the_head() -> None:
    pytest.importorskip("peft", reason="adapters need peft")
    adapted = lora(hf_model("dpassm"), target_modules="all-linear")
    named = {
        name.rsplit(".", 3)[0].split("mixer.")[-1].split(".")[-1]
        for name, p in adapted.named_parameters()
        if p.requires_grad
    }
    assert {"q_proj", "in_proj", "dt_proj", "gate_proj", "up_proj", "down_proj"} <= named
    assert "head" not in named


def test_transformers_own_adapters() -> None:
    """`add_adapter` and `disable_adapters`, without PEFT's wrapper."""
    peft = pytest.importorskip("peft", MIN_PEFT_VERSION, reason="adapters need peft")
    model, ids = hf_model("blade"), torch.randint(0, 13, (2, 9))
    before = model(ids).logits
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.add_adapter(config)
    assert not torch.allclose(model(ids).logits, before)
    model.disable_adapters()
    torch.testing.assert_close(model(ids).logits, before)


def test_prompt_tuning_goes_through_embeddings() -> None:
    peft = pytest.importorskip("peft", MIN_PEFT_VERSION, reason="adapters need peft")
    model, ids = hf_model("dpassm", dtype=torch.float32), torch.randint(0, 13, (2, 9))
    tuned = peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    loss = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    grads = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert len(grads) == 1
    assert grads[0].abs().sum() > 0
    tuned.eval()
    made = tuned.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
    )
    by_hand = ids
    for _ in range(4):
        last = tuned(input_ids=by_hand, attention_mask=torch.ones_like(by_hand)).logits[:, -1]
        by_hand = torch.cat([by_hand, last.argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, by_hand)


# ---- bitsandbytes


# The head and dt_proj, with its few outputs, are not quantised: on a CPU, 4-bit products need
# outputs in multiples of 32.
KEPT_EXACT = ["head", "dt_proj"]


def quantized(folder: Path, **options: Any) -> LongCtxForCausalLM:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(llm_int8_skip_modules=KEPT_EXACT, **options),
        device_map="cpu",
        dtype=torch.float32,
    )


@pytest.fixture
def exact(pattern: tuple[str, ...], tmp_path: Path) -> LongCtxForCausalLM:
    """A model with widths of multiples of 32, saved in tmp_path."""
    pytest.importorskip("bitsandbytes", reason="quantised weights need bitsandbytes")
    pytest.importorskip("accelerate", reason="quantised weights need accelerate")
    options = {
        name: {key: 16 if "state_dim" in key else value for key, value in given.items()}
        for name, given in small_model(*pattern).config.block_kwargs.items()
    }
    model = hf_model(*pattern, dtype=torch.float32, d_model=64, ffn_dim=64, block_kwargs=options)
    model.save_pretrained(tmp_path)
    return model


IDS = torch.randint(0, 13, (2, 12), generator=torch.Generator().manual_seed(0))


@every_pattern
def test_bitsandbytes_8_bit(exact: LongCtxForCausalLM, tmp_path: Path) -> None:
    loaded = quantized(tmp_path, load_in_8bit=True)
    assert loaded.model.blocks[0].mixer.q_proj.weight.dtype == torch.int8
    assert type(loaded.model.head) is nn.Linear
    expected, actual = exact(IDS).logits, loaded(IDS).logits
    assert not torch.allclose(actual, expected, rtol=1e-3)
    # Four products follow one another in each block. Their inputs and weights are rounded to 1/127
    # of the largest value of a row.
    assert (actual - expected).norm() < 8 * len(exact.model.blocks) / 127 * expected.norm()
    assert loaded.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 16)


@every_pattern
def test_bitsandbytes_4_bit(exact: LongCtxForCausalLM, tmp_path: Path) -> None:
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    loaded = quantized(tmp_path, load_in_4bit=True, **options)
    assert loaded.model.blocks[0].mixer.q_proj.weight.dtype == torch.uint8
    assert type(loaded.model.head) is nn.Linear
    rounded = quantized(tmp_path, load_in_4bit=True, **options).dequantize()
    actual = loaded(IDS).logits
    assert not torch.allclose(actual, exact(IDS).logits, rtol=1e-3)
    torch.testing.assert_close(actual, rounded(IDS).logits, rtol=1e-4, atol=1e-4)
    made = loaded.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(made, rounded.generate(IDS, max_new_tokens=4, do_sample=False))
