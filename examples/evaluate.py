"""Measure what a model remembers, and how far: docs/evaluation.md.

The same as `python -m longctx_layers.evals.synthetic`.
"""

from longctx_layers.evals.synthetic import main

if __name__ == "__main__":
    main()
