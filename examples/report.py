"""Write a report on a checkpoint: docs/reports.md.

The same as `python -m longctx_layers.reports`.
"""

from longctx_layers.reports.__main__ import main

if __name__ == "__main__":
    main()
