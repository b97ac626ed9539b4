"""Turn a checkpoint into a folder that `from_pretrained` reads: docs/training.md.

The same as `python -m longctx_layers.training.export`.
"""

from longctx_layers.training.export import main

if __name__ == "__main__":
    main()
