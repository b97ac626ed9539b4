"""Turn a checkpoint of examples/train.py into a folder that `from_pretrained` reads.

    python examples/export.py --checkpoint logs/checkpoints/step=00010000.ckpt --output model

The folder gets the model (`config.json`, `model.safetensors`) and the tokenizer's files, as
transformers reads them, with the end of text at which `generate` stops. One that holds another
model, or another tokenizer's files, is refused. Before the program ends it loads the folder again
and compares the logits.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from longctx_layers import LongContextLM, ModelConfig
from longctx_layers.data.tokenizers import load_tokenizer
from longctx_layers.files import write, write_folder
from longctx_layers.training.checkpoints import packed_tokenizer, read_checkpoint, unpack_tokenizer

MODEL_FILES = ("config.json", "model.safetensors")
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*", "*.spm",
)  # fmt: skip


def export(checkpoint: Path, output: Path) -> LongContextLM:
    """Write the folder and check it; after an error it is as it was, or not there.

    Raises:
        FileNotFoundError, ValueError: for a checkpoint that cannot be read, a place that holds
            anything else, or a folder that gives other logits.
        OSError: if the folder cannot be written.
    """
    model, saved = read_checkpoint(checkpoint)
    tokenizer, end_of_text = written_anew(saved)
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


def written_anew(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], int]:
    """A tokenizer's files as transformers reads them, and its end of text.

    Those in a checkpoint may be of an earlier version, which wrote a tokenizer of bytes otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        unpack_tokenizer(files, folder)
        tokenizer = load_tokenizer(folder)
    packed = packed_tokenizer(tokenizer)
    return {n: bytes(t.tolist()) for n, t in packed.items()}, tokenizer.end_of_text


def add_end_of_text(folder: Path, end_of_text: int) -> None:
    """Name the end of text in the model's config and in that of its generation."""
    ids = {"eos_token_id": end_of_text}
    config = json.loads((folder / MODEL_FILES[0]).read_bytes())
    for name, content in ((MODEL_FILES[0], {**config, **ids}), (GENERATION_FILE, ids)):
        write(folder / name, (json.dumps(content, indent=2) + "\n").encode())


def check_folder(output: Path, config: ModelConfig, tokenizer: Collection[str]) -> None:
    """Refuse a place where this model and its tokenizer would not be alone.

    Raises:
        ValueError: for a file, and for a folder with another model's or tokenizer's files.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"--output: expected a folder, got the file {output}; choose another name")
    files = [path for path in output.rglob("*") if not path.is_dir()]
    names = sorted(path.relative_to(output).as_posix() for path in files)
    other = "remove that folder, or choose another --output"
    if set(names) & set(MODEL_FILES) and not _holds(output, config):
        raise ValueError(
            f"--output: expected a new folder, or one with an earlier export of this model, got "
            f"{output}, which holds another model; {other}"
        )
    known = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in TOKENIZER_FILES)]
    if stale := [name for name in known if name not in tokenizer]:
        raise ValueError(
            f"--output: expected a folder without another tokenizer's files, got "
            f"{', '.join(stale)} in {output}; {other}"
        )


def _holds(folder: Path, config: ModelConfig) -> bool:
    """Whether the model in a folder has this configuration."""
    try:
        content = json.loads((folder / MODEL_FILES[0]).read_bytes())
        found = ModelConfig.from_dict(content["model"])
    except (OSError, ValueError, KeyError, TypeError):  # none, damaged or another program's
        return False
    # As JSON has it, where a tuple is a list.
    one, other = (json.dumps(c.to_dict(), sort_keys=True) for c in (found, config))
    return one == other


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", "--checkpoint_path", type=Path, required=True)
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder to write: a new one, or one with an "
        "earlier export of this model, whose files are replaced; a folder that holds another model "
        "or tokenizer is refused"
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        model = export(args.checkpoint, args.output)
    except (OSError, ValueError) as error:
        parser.exit(2, f"export.py: error: {error}\n")
    print(model.describe())
    print(f"Written to {args.output}; loaded from there it gives the checkpoint's logits.")


if __name__ == "__main__":
    main()
