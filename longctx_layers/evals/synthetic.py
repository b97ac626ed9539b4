r"""Does a model remember, and how far? Memory tasks at lengths that double.

    python examples/evaluate.py --task passkey --block dpassm --train_steps 1000 \
        --window_size 16 --seq_len 256 --max_len 8192
    python examples/evaluate.py --task needle --checkpoint_path logs/checkpoints/last.ckpt \
        --seq_len 1024 --max_len 32768
    python examples/evaluate.py --task streaming_ppl --pretrained_model model --max_len 100000

Rows are added to OUTPUT_DIR/TASK.jsonl as they are measured; the same command again measures what
is missing. docs/evaluation.md says what the tasks are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from longctx_layers.evals.program.measuring import measure, settle
from longctx_layers.evals.program.options import check, parser
from longctx_layers.evals.program.table import table


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the command line; returns the rows by length."""
    flags = parser(str(__doc__).splitlines()[0])
    args: argparse.Namespace = flags.parse_args(argv)
    try:
        check(args)
        rows = measure(settle(args))
    except (OSError, ValueError, TypeError) as error:  # OSError: ConnectionError among others
        flags.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        flags.exit(130, "\nInterrupted. What was measured is kept: the same command goes on.\n")
    print(table(rows, args))
    return rows


if __name__ == "__main__":
    main()
