"""Train a language model over any of the layers: docs/training.md.

The same as `python -m longctx_layers.training.train`.
"""

from longctx_layers.training.train import main

if __name__ == "__main__":
    main()
