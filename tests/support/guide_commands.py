"""Every command of the training guide, with this project's names.

`-m longctx_layers.training.train` or `examples/train.py` is `-m efficient_longctx.training.train`
of the guide, `-m longctx_layers.evals.synthetic` or `examples/evaluate.py` is
`-m efficient_longctx.evals.synthetic`, `examples/report.py` is `scripts/generate_report.py`, and
`longctx_layers` is `efficient_longctx.models.models`; `uv run` is left out. Nothing else was
changed.
"""

from __future__ import annotations

from typing import NamedTuple


class Fit(NamedTuple):
    """A whole training command: its section in the guide, and its flags."""

    section: str
    flags: tuple[str, ...]


class Flags(NamedTuple):
    """Flags that the guide shows by themselves, to be added to a training command."""

    section: str
    flags: tuple[str, ...]


class Evaluation(NamedTuple):
    """A whole evaluation command: its section in the guide, and its flags."""

    section: str
    flags: tuple[str, ...]


class Other(NamedTuple):
    """Another command of the guide: what it is here, and its outcome.

    `kind` is how a test checks it: "python" runs the snippet, "make" looks for the target, "file"
    for the program, "system" is not part of this project.
    """

    section: str
    command: str
    kind: str
    outcome: str


def _model(size: str, block: str, **options: int) -> tuple[str, ...]:
    flags = {"num_params": size, "block": block, **options}
    return tuple(f"--model.{name}={value}" for name, value in flags.items())


def _trainer(**options: object) -> tuple[str, ...]:
    return tuple(f"--trainer.{name}={value}" for name, value in options.items())


_WIKITEXT = (
    "--data.dataset_name=wikitext",
    "--data.dataset_config=wikitext-2-raw-v1",
    "--data.seq_len=512",
    *_trainer(max_steps=10000, devices=1, enable_progress_bar=False, max_epochs=2),
)


def _gpu(length: int, steps: int) -> tuple[str, ...]:
    trainer = _trainer(max_steps=steps, devices=1, accelerator="gpu", max_epochs=2)
    return (f"--data.max_seq_len={length}", *trainer)


# Size, window or chunk, state dimension, random tokens, length, steps: the guide's three stages.
_STAGES = (
    ("150m", 128, 64, 4, 8192, 5000),
    ("250m", 256, 128, 8, 16384, 50000),
    ("350m", 512, 256, 16, 32768, 100000),
)


def _stages(section: str, block: str) -> list[Fit]:
    commands = []
    for size, window, state, random, length, steps in _STAGES:
        options = {
            "dpassm": {"window_size": window, "ssm_state_dim": state},
            "blade": {"chunk_size": window, "state_dim": state},
            "baseline_longformer": {"window_size": window, "n_global_tokens": 2},
            "baseline_bigbird": {
                "window_size": window,
                "n_random_tokens": random,
                "n_global_tokens": 2,
            },
        }[block]
        commands.append(Fit(section, (*_model(size, block, **options), *_gpu(length, steps))))
    return commands


def _pipeline() -> list[Fit]:
    blocks = ("dpassm", "blade", "baseline_longformer", "baseline_bigbird", "vanilla")
    return [
        Fit(
            "train_all_models.sh",
            (
                *_model(size, block),
                f"--data.max_seq_len={length}",
                *_trainer(max_steps=10000, devices=1, accelerator="gpu"),
                f"--trainer.default_root_dir=logs/{size}-{block}-{length}",
            ),
        )
        for size in ("150m", "250m", "350m")
        for block in blocks
        for length in (8192, 16384, 32768)
    ]


FITS = [
    Fit("Basic", (*_model("150m", "dpassm", window_size=128, ssm_state_dim=64), *_WIKITEXT)),
    Fit(
        "Basic",
        (*_model("150m", "baseline_longformer", window_size=128, n_global_tokens=2), *_WIKITEXT),
    ),
    Fit(
        "Basic",
        (
            *_model(
                "150m", "baseline_bigbird", window_size=128, n_random_tokens=4, n_global_tokens=2
            ),
            *_WIKITEXT,
        ),
    ),
    *_stages("DP-ASSM", "dpassm"),
    *_stages("BLADE", "blade"),
    *_stages("Longformer", "baseline_longformer"),
    *_stages("BigBird", "baseline_bigbird"),
    Fit("Vanilla", (*_model("150m", "vanilla"), *_gpu(8192, 5000))),
    Fit(
        "Debug mode",
        (
            *_model("150m", "dpassm"),
            "--data.max_seq_len=1024",
            *_trainer(max_steps=100, devices=1, accelerator="gpu", fast_dev_run=True),
        ),
    ),
    *_pipeline(),
]

_WIKITEXTS = ("wikitext-2-raw-v1", "wikitext-103-raw-v1", "wikitext-2-v1", "wikitext-103-v1")

FLAGS = [
    Flags("Out of memory", ("--data.max_seq_len=4096",)),
    Flags("Out of memory", ("--data.batch_size=1",)),
    Flags("Out of memory", ("--trainer.strategy=deepspeed_stage_2",)),
    Flags("Out of memory", ("--model.num_params=150m",)),
    Flags("Instability", ("--model.learning_rate=1e-4",)),
    Flags("Instability", ("--model.gradient_clip_val=1.0",)),
    Flags("Instability", ("--model.optimizer=AdamW",)),
    Flags("Slow training", ("--data.batch_size=4",)),
    Flags("Slow training", ("--trainer.precision=16",)),
    Flags("Slow training", ("--trainer.devices=2",)),
    Flags("Slow training", ("--data.num_workers=4",)),
    *(
        Flags("Datasets", ("--data.dataset_name=wikitext", f"--data.dataset_config={name}"))
        for name in _WIKITEXTS
    ),
    Flags("Datasets", ("--data.dataset_name=synthetic",)),
    Flags("Datasets", ("--data.dataset_name=local", "--data.dataset_config=path/to/data")),
    Flags("Progress bar", ("--trainer.enable_progress_bar=False",)),
    Flags("Progress bar", ("--trainer.callbacks=[]",)),
    Flags("CUDA", ("--trainer.accelerator=cpu",)),
    Flags("Speed", ("--data.num_workers=4", "--data.persistent_workers=True")),
    Flags("Speed", ("--model.compile=True",)),
    Flags("Batch size", ("--data.batch_size=2",)),
    Flags("Batch size", ("--data.batch_size=8",)),
]

COUNT_PARAMETERS = """
from longctx_layers import create_model
model = create_model(vocab_size=1000, num_params='150m', block_type='dpassm', block_kwargs={'window_size': 128})
print(f'Model parameters: {sum(p.numel() for p in model.parameters()):,}')
"""  # noqa: E501
FORWARD = """
import torch
from longctx_layers import create_model
model = create_model(vocab_size=1000, num_params='150m', block_type='dpassm', block_kwargs={'window_size': 128})
x = torch.randint(0, 1000, (2, 64))
logits = model(x)
print(f'Output shape: {logits.shape}')
"""  # noqa: E501


def _evaluation(section: str, task: str, lengths: tuple[int, int], *model: str) -> Evaluation:
    flags = ("--task", task, "--seq_len", str(lengths[0]), "--max_len", str(lengths[1]))
    return Evaluation(section, (*flags, *model, "--device", "cuda"))


EVALUATIONS = [
    _evaluation("Evaluation", "passkey", (8192, 8192), "--block", "dpassm"),
    _evaluation("Evaluation", "copy_recall", (8192, 8192), "--block", "blade"),
    _evaluation("Evaluation", "drift_curve", (8192, 32768), "--block", "baseline_longformer"),
    _evaluation(
        "Results",
        "passkey",
        (32768, 32768),
        "--block",
        "dpassm",
        "--pretrained_model=path/to/checkpoint",
    ),
    *(
        _evaluation("Results", "passkey", (16384, 16384), "--block", block)
        for block in ("dpassm", "blade", "baseline_longformer", "baseline_bigbird", "vanilla")
    ),
    _evaluation(
        "evaluate_all_models.sh", "passkey", (32768, 32768), "--checkpoint_path=path/to/checkpoint"
    ),
]

OTHERS = [
    Other("Prerequisites", "git pull origin main", "system", "git's own"),
    Other("Prerequisites", "make setup", "make", "as written"),
    Other("Prerequisites", "make test", "make", "as written"),
    Other("Monitoring", "tail -f logs/lightning_logs/version_*/events.out.tfevents.*", "system",
          "the files are there, and binary: use tensorboard"),
    Other("Monitoring", "tensorboard --logdir logs/lightning_logs", "system", "as written"),
    Other("Monitoring", "watch -n 1 nvidia-smi", "system", "NVIDIA's own"),
    Other("Monitoring", "nvidia-smi -l 1", "system", "NVIDIA's own"),
    Other("Validation", COUNT_PARAMETERS, "python", "prints 150 M within 1 %"),
    Other("Validation", FORWARD, "python", "prints the shape [2, 64, 1000]"),
    Other("Import errors", "make clean", "make", "as written"),
    Other("Import errors", "import longctx_layers; print(longctx_layers.__file__)", "python",
          "prints where the library is"),
    Other("Parameters", "examples/train.py fit --help | grep model", "help",
          "lists every --model flag"),
    Other("Progress bar", "export TOKENIZERS_PARALLELISM=false", "system", "as written"),
    Other("CUDA", "nvidia-smi; nvcc --version", "system", "NVIDIA's own"),
    Other("CUDA", "pip install torch torchvision torchaudio --index-url ...", "system",
          "pip's own; make setup PYTHON=... keeps a torch that is there"),
    Other("Debug mode", "export PYTHONPATH=$PWD:$PYTHONPATH CUDA_LAUNCH_BLOCKING=1 "
          "TORCH_USE_CUDA_DSA=1", "system", "as written"),
    Other("Memory", "export FLASH_ATTENTION_FORCE_BUILD=1", "system", "flash-attn's own"),
    Other("Results", "examples/report.py --checkpoint_path=path/to/checkpoint "
          "--output_dir=reports/", "file", "in place of scripts/generate_report.py"),
    Other("Pipelines", "examples/train_all_models.sh", "file", "its 45 commands are listed above"),
    Other("Pipelines", "examples/evaluate_all_models.sh", "file",
          "its command for each checkpoint is listed above"),
]  # fmt: skip
