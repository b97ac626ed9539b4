"""Turn a checkpoint of the training into a folder that `from_pretrained` reads.

    python -m longctx_layers.training.export \\
        --checkpoint_path logs/checkpoints/step=00010000.ckpt --output_dir model

The folder holds the model (`config.json`, `model.safetensors`) and the tokenizer's files, as
transformers reads them, with the end of text at which `generate` stops. A folder with another
model, or another tokenizer's files, is refused. Finally the program loads the folder and compares
the logits.
"""

from __future__ import annotations

import fnmatch
import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from longctx_layers import LongContextLM, ModelConfig
from longctx_layers.command_line import Parser, program_name
from longctx_layers.data.tokenizers import load_tokenizer
from longctx_layers.files import write, write_folder
from longctx_layers.training.checkpoints import packed_tokenizer, read_checkpoint, unpack_tokenizer

MODEL_FILES = ("config.json", "model.safetensors")
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*.spm",
)


def export(checkpoint: Path, output: Path) -> LongContextLM:
    """Export a checkpoint to a folder, and check it; after an error the folder is unchanged.

    Args:
        checkpoint: a file that the training wrote.
        output: a new folder, or one with an earlier export of this model.

    Returns:
        The model, loaded from the folder.

    Raises:
        FileNotFoundError, ValueError: for a checkpoint that cannot be read, a folder with something
            else in it, or one that gives other logits.
        OSError: if the folder cannot be written.
    """
    model, files = read_checkpoint(checkpoint)
    tokenizer, end_of_text = current_files(files)
    taken = sorted(set(tokenizer) & set(MODEL_FILES))
    if taken:
        raise ValueError(f"tokenizer: its files {taken} would replace the model's")
    check_folder(output, model.config, tokenizer)
    with write_folder(output) as partial:
        model.save_pretrained(partial)
        unpack_tokenizer(tokenizer, partial)
        add_end_of_text(partial, end_of_text)
        loaded = LongContextLM.from_pretrained(partial)
        ids = torch.arange(256)[None] * 7919 % model.config.vocab_size
        with torch.no_grad():
            difference = (model(ids) - loaded(ids)).abs().max().item()
        if difference != 0:
            raise ValueError(f"{output}: its logits differ by {difference} from the checkpoint's")
    return loaded


def current_files(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], int]:
    """A tokenizer's files as transformers reads them, and its end of text.

    An earlier version of this library may have written the checkpoint; its files for a tokenizer of
    bytes were different.
    """
    with tempfile.TemporaryDirectory() as folder:
        unpack_tokenizer(files, folder)
        tokenizer = load_tokenizer(folder)
    packed = packed_tokenizer(tokenizer)
    return {n: bytes(t.tolist()) for n, t in packed.items()}, tokenizer.end_of_text


def add_end_of_text(folder: Path, end_of_text: int) -> None:
    """Write the id of the end of text into the configs of the model and of its generation."""
    ids = {"eos_token_id": end_of_text}
    config = json.loads((folder / MODEL_FILES[0]).read_bytes())
    for name, content in ((MODEL_FILES[0], {**config, **ids}), (GENERATION_FILE, ids)):
        write(folder / name, (json.dumps(content, indent=2) + "\n").encode())


def check_folder(output: Path, config: ModelConfig, tokenizer: Collection[str]) -> None:
    """Check that an export to `output` would not mix with other files.

    Args:
        output: the folder to write.
        config: of the model.
        tokenizer: the names of the tokenizer's files.

    Raises:
        ValueError: for a file, and for a folder with another model's or tokenizer's files.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(
            f"--output_dir: expected a folder, got the file {output}; choose another name"
        )
    files = [path for path in output.rglob("*") if not path.is_dir()]
    names = sorted(path.relative_to(output).as_posix() for path in files)
    remedy = "remove that folder, or choose another --output_dir"
    if set(names) & set(MODEL_FILES) and not _holds(output, config):
        raise ValueError(
            "--output_dir: expected a new folder, or one with an earlier export of this model, "
            f"got {output}, which holds another model; {remedy}"
        )
    present = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in TOKENIZER_FILES)]
    if stale := [name for name in present if name not in tokenizer]:
        raise ValueError(
            f"--output_dir: expected a folder without another tokenizer's files, got "
            f"{', '.join(stale)} in {output}; {remedy}"
        )


def _holds(folder: Path, config: ModelConfig) -> bool:
    """Whether the model in a folder has this configuration."""
    try:
        content = json.loads((folder / MODEL_FILES[0]).read_bytes())
        stored = ModelConfig.from_dict(content["model"])
    except (OSError, ValueError, KeyError, TypeError):  # none, damaged or another program's
        return False
    # In JSON a tuple is a list.
    return _as_json(stored) == _as_json(config)


def _as_json(config: ModelConfig) -> str:
    return json.dumps(config.to_dict(), sort_keys=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program.

    Args:
        arguments: the command line; `sys.argv[1:]` by default.
    """
    parser = Parser(
        prog=program_name("longctx_layers.training.export", "export"),
        description="Turn a checkpoint of the training into a folder that `from_pretrained` reads.",
    )
    parser.add_argument("--checkpoint_path", "--checkpoint", type=Path, required=True)
    parser.add_argument(
        "--output_dir",
        "--output",
        type=Path,
        required=True,
        help="the folder to write: a new one, or one with an earlier export of this model, whose "
        "files are replaced; a folder that holds another model or tokenizer is refused",
    )
    flags = parser.parse_args(arguments)
    try:
        model = export(flags.checkpoint_path, flags.output_dir)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(model.describe())
    print(f"Written to {flags.output_dir}; loaded from there it gives the checkpoint's logits.")


if __name__ == "__main__":
    main()
