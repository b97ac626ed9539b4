r"""Does a model remember, and how far? Memory tasks at lengths that double.

    python -m longctx_layers.evals.synthetic --task passkey --block dpassm --train_steps 1000 \
        --window_size 16 --seq_len 256 --max_len 8192
    python -m longctx_layers.evals.synthetic --task needle \
        --checkpoint_path logs/checkpoints/last.ckpt --seq_len 1024 --max_len 32768
    python -m longctx_layers.evals.synthetic --task streaming_ppl --pretrained_model model \
        --max_len 100000

Rows are added to OUTPUT_DIR/TASK.jsonl as they are measured; the same command measures what is
missing. docs/evaluation.md describes the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

from longctx_layers.evals.program.measuring import measure, settle
from longctx_layers.evals.program.options import options_of, parser
from longctx_layers.evals.program.rows import Row
from longctx_layers.evals.program.table import table


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; returns the rows by length."""
    program = parser(str(__doc__).splitlines()[0])
    flags = program.parse_args(argv)
    try:
        plan = settle(options_of(flags))
        rows = measure(plan)
    except (OSError, ValueError, TypeError) as error:  # OSError: ConnectionError among others
        program.exit(2, f"{program.prog}: error: {error}\n")
    except KeyboardInterrupt:
        program.exit(130, "\nInterrupted. Rows that were measured are kept; run it again.\n")
    print(table(rows, plan.rows.path.parent))
    return rows


if __name__ == "__main__":
    main()
