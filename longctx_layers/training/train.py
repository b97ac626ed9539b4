"""The training program, to be started as a module.

    python -m longctx_layers.training.train fit --model.block=dpassm --data.dataset_name=stdlib

`fit --help` lists every flag; docs/training.md is the guide.
"""

from longctx_layers.training.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
