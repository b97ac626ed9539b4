"""Train a language model over any of the layers.

    python examples/train.py fit --model.block=dpassm --data.dataset_name=stdlib

`fit --help` lists every flag; docs/training.md is the guide.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `training`, also as python -m examples.train

from training.cli import main

if __name__ == "__main__":
    main()
