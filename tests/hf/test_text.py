"""Programs that work on text: the pipeline, and lm-evaluation-harness, offline."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from longctx_layers.hf import LongCtxForCausalLM
from longctx_layers.testing import small_model

END = "<end>"
QUESTIONS = [
    {"question": "2 + 2 =", "choices": [" 4", " 5", " twenty"], "answer": 0},
    {"question": "The sky is", "choices": [" green", " blue"], "answer": 1},
    {"question": "One, two,", "choices": [" three", " four", " ten"], "answer": 0},
    {"question": "Up and", "choices": [" left", " down"], "answer": 1},
    {"question": "a b c", "choices": [" d", " 1"], "answer": 0},
]
TEXTS = ["A quick brown fox.", "Many were the men whose cities he saw,\nand whose mind he learned."]
TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "local_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{expected}}",
        "generation_kwargs": {"until": ["~~"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": END})
    tokenizer.padding_side = "left"
    return tokenizer


def log_likelihood(model: Any, tokenizer: Any, context: str, text: str) -> float:
    before, after = tokenizer(context).input_ids, tokenizer(text).input_ids
    logits = model(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1]
    return logits.double().log_softmax(-1)[range(len(after)), after].sum().item()


def write_tasks(folder: Path, documents: dict[str, list[dict[str, Any]]]) -> None:
    for name, task in TASKS.items():
        lines = "".join(json.dumps(document) + "\n" for document in documents[name])
        (folder / f"{name}.jsonl").write_text(lines)
        described = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "test_split": "test",
            **task,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(described))  # JSON is YAML


def text_model(*pattern: str) -> LongCtxForCausalLM:
    native = small_model(*pattern, vocab_size=257, d_model=32, dtype=torch.float32)
    return LongCtxForCausalLM.from_native(native.eval())


def test_pipeline() -> None:
    """Prompts of different lengths in one batch, padded by the tokenizer."""
    model, tokenizer = text_model("dpassm", "blade"), byte_tokenizer()
    prompts = [question["question"] for question in QUESTIONS]
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=5)
    generated = write(prompts, max_new_tokens=6, do_sample=False, return_tensors=True)
    for prompt, (row,) in zip(prompts, generated, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        alone = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=256)
        real = [i for i in row["generated_token_ids"] if i != 256]
        assert real == [i for i in alone[0].tolist() if i != 256]


@pytest.mark.parametrize("pattern", [("dpassm",), ("blade", "vanilla")], ids="+".join)
@torch.no_grad()
def test_figures_of_a_saved_folder(
    pattern: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    transformers.logging.set_verbosity_error()
    tokenizer = byte_tokenizer()
    model = text_model(*pattern)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    answers = []
    for question in QUESTIONS[:2]:
        ids = torch.tensor([tokenizer(question["question"]).input_ids])
        generated = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=256)
        answers.append(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))
    asked = [
        {"question": QUESTIONS[0]["question"], "expected": answers[0]},
        {"question": QUESTIONS[1]["question"], "expected": answers[1] + "no"},
    ]
    texts = [{"text": text} for text in TEXTS]
    documents = {"local_choice": QUESTIONS, "local_generation": asked, "local_perplexity": texts}
    write_tasks(tmp_path, documents)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"},
        tasks=list(TASKS),
        task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )["results"]

    right = 0
    for question in QUESTIONS:
        scores = [
            log_likelihood(model, tokenizer, question["question"], choice)
            for choice in question["choices"]
        ]
        right += scores.index(max(scores)) == question["answer"]
    assert results["local_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert results["local_generation"]["exact_match,none"] == 0.5
    total = sum(log_likelihood(model, tokenizer, END, text) for text in TEXTS)
    bits = -total / sum(len(text.encode()) for text in TEXTS) / math.log(2)
    assert results["local_perplexity"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("longest", [None, 3000])
@torch.no_grad()
def test_long_prompts_are_read_as_asked(longest: int | None, tmp_path: Path) -> None:
    """lm-evaluation-harness truncates prompts to the length in the config, by default 2,048."""
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = text_model("window")
    if longest is not None:
        model.config.max_position_embeddings = longest
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    harness = HFLM(pretrained=str(tmp_path), device="cpu", batch_size=1)
    read: list[int] = []
    harness.model.model.embedding.register_forward_hook(
        lambda module, args, out: read.append(args[0].shape[1])
    )
    request = Instance("loglikelihood", {}, ("x" * 4000, " y"), 0)
    harness.loglikelihood([request], disable_tqdm=True)
    assert read == [4001 if longest is None else longest]
