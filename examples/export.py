"""Turn a checkpoint of examples/train.py into a folder that `from_pretrained` reads.

    python examples/export.py --checkpoint logs/checkpoints/step=00010000.ckpt --output model

The folder gets the model (`config.json`, `model.safetensors`) and the tokenizer's files. Before the
program ends it loads the folder anew and compares the logits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from training.checkpoints import read_checkpoint

from longctx_layers import LongContextLM

MODEL_FILES = ("config.json", "model.safetensors")


def export(checkpoint: Path, output: Path) -> LongContextLM:
    """Write the folder and check it.

    Raises:
        FileNotFoundError, ValueError: for a checkpoint that cannot be read, or a folder that gives
            other logits.
    """
    model, tokenizer = read_checkpoint(checkpoint)
    taken = sorted(set(tokenizer) & set(MODEL_FILES))
    if taken:
        raise ValueError(f"tokenizer: its files {taken} would replace the model's")
    model.save_pretrained(output)
    for name, content in tokenizer.items():
        (output / name).write_bytes(content)
    loaded = LongContextLM.from_pretrained(output)
    ids = torch.arange(256)[None] * 7919 % model.config.vocab_size
    with torch.no_grad():
        difference = (model(ids) - loaded(ids)).abs().max().item()
    if difference != 0:
        raise ValueError(f"{output}: its logits differ by {difference} from the checkpoint's")
    return loaded


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", "--checkpoint_path", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    args = parser.parse_args(argv)
    try:
        model = export(args.checkpoint, args.output)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(model.describe())
    print(f"Written to {args.output}; loaded from there it gives the checkpoint's logits.")


if __name__ == "__main__":
    main()
