"""Kill training at random moments, resume it, and compare it with a run that nobody killed.

    cd tests; python -m support.kill_campaign --kills 8 [--kinds stream ddp] [--seed 1]

Each kind is trained once without interruption. Then it is started again, killed by SIGKILL at a
random moment (start-up, data, forward, optimizer, checkpoints, validation) and resumed with
`--ckpt_path=last`, until it has been killed often enough; the last run may finish. Weights,
optimizer, schedule, place in the data and every logged loss must have the same bits, and the
folder must hold as many checkpoints as were to be kept. A run that finishes before its killer comes
is compared, too, and begun again. The processes are forks of this one, which has imported
everything, so that a resumption takes about a second.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from longctx_layers.training import cli
from support.program import SMALL, merged, scalars

KEEP = 2
BASE = merged(
    *SMALL, "--trainer.max_steps=12", "--model.block=window", "--model.window_size=16",
    "--data.seq_len=32", f"--checkpoint.keep={KEEP}", "--checkpoint.every_n_steps=3",
)  # fmt: skip
KINDS = {
    "accumulation": ("--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_steps=4"),
    # Epochs whose last step has fewer batches, and validation between two batches of a step.
    "incomplete accumulation": (
        "--trainer.accumulate_grad_batches=3",
        "--trainer.limit_train_batches=7",
        "--trainer.val_check_interval=2",
        "--checkpoint.every_n_steps=1",
    ),
    "carried state": (
        "--data.carry_state=True",
        "--trainer.accumulate_grad_batches=2",
        "--data.dataset_config=4",
        "--data.seq_len=256",
        "--model.block=dpassm",
        "--model.ssm_state_dim=16",
        "--model.window_curriculum={0: 8, 5: 16}",
    ),
    "stream with carried state": (
        "--data.streaming=True",
        "--data.carry_state=True",
        "--trainer.accumulate_grad_batches=2",
        "--model.block=blade",
        "--model.window_size=null",
        "--model.chunk_size=16",
    ),
    "mixed lengths, several workers": (
        "--data.num_workers=2",
        "--data.persistent_workers=True",
        "--model.dropout=0.2",
        "--model.mixed_lengths=[8, 16, 32]",
        "--trainer.val_check_interval=3",
    ),
    "length curriculum, stream with workers": (
        "--data.streaming=True",
        "--data.num_workers=2",
        "--model.length_curriculum={0: 8, 4: 16, 8: 32}",
        "--trainer.accumulate_grad_batches=2",
    ),
    "two processes": (
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.accumulate_grad_batches=2",
        "--data.carry_state=True",
        "--trainer.val_check_interval=3",
    ),
    "two processes, stream": (
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--data.streaming=True",
        "--trainer.accumulate_grad_batches=2",
        "--model.dropout=0.1",
    ),
}


def fork(flags: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run `fit` in a process group of its own; its id."""
    if child := os.fork():
        return child
    os.setsid()
    code = 1
    try:
        os.environ.update(environment)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        cli.main(["fit", *flags])
        code = 0
    except SystemExit as error:
        print(error)
        code = 0 if error.code in (None, 0) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def start(flags: list[str], log: Path) -> list[int]:
    """The processes of a run."""
    if "--trainer.devices=2" not in flags:
        return [fork(flags, log, {})]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": "2"}
    return [fork(flags, log, {**common, "LOCAL_RANK": str(rank)}) for rank in range(2)]


def kill(processes: list[int], random: random.Random) -> None:
    """Kill a process, and the others a little later; with them their workers."""
    random.shuffle(processes)
    for process in processes:
        os.killpg(process, signal.SIGKILL)
        time.sleep(random.choice([0, 0.1]))


def wait(processes: list[int], seconds: float | None = None) -> bool:
    """Whether the processes ended by themselves, well, and within a time."""
    end = None if seconds is None else time.monotonic() + seconds
    running = dict.fromkeys(processes)
    while running:
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                del running[process]
                if status:
                    kill(list(running), random.Random(0))
                    raise RuntimeError(f"a process ended with status {status}; see its log")
        if end is not None and time.monotonic() > end:
            processes[:] = running
            return not running
        time.sleep(0.005)
    return True


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two nested values differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) == len(other):
            pairs = enumerate(zip(one, other, strict=True))
            return [d for i, (a, b) in pairs for d in differences(a, b, f"{name}/{i}")]
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [name]
    return [] if one == other and type(one) is type(other) else [name]


def compare(whole: Path, killed: Path) -> None:
    """Fail unless both runs ended with the same bits."""
    names = [sorted(p.name for p in (root / "checkpoints").iterdir()) for root in (whole, killed)]
    assert names[0] == names[1], f"checkpoints {names[0]} and {names[1]}"
    assert len(names[0]) == KEEP
    contents = [
        torch.load(root / "checkpoints" / names[0][-1], weights_only=True)
        for root in (whole, killed)
    ]
    for part in (
        "global_step", "state_dict", "optimizer_states", "lr_schedulers", "longctx",
        "LongContextData",
    ):  # fmt: skip
        assert not (found := differences(contents[0][part], contents[1][part], part)), found
    for name in ("train_loss", "gradient_norm", "learning_rate", "val_loss"):
        expected, got = scalars(whole, name), scalars(killed, name)
        assert got == expected, f"{name}: {expected} and {got}"
        for folder in (killed / "lightning_logs").iterdir():
            part = scalars(killed, name, int(folder.name[8:]))
            assert part.items() <= expected.items(), f"{name} of {folder}: {expected} and {part}"


def campaign(kind: str, kills: int, folder: Path, seed: int) -> str:
    """Kill runs of a kind this often; what happened, in words."""
    draw = random.Random(f"{kind} {seed}")
    flags = merged(*BASE, *KINDS[kind])
    flags = [flag for flag in flags if not flag.endswith("=null")]
    began = time.monotonic()
    wait(start([*flags, "--trainer.default_root_dir=whole"], folder / "whole.log"))
    seconds = time.monotonic() - began
    done = finished = most = resumed = in_a_row = 0
    while done < kills or in_a_row:
        root = f"killed{finished}"
        processes = start(
            [*flags, f"--trainer.default_root_dir={root}", "--ckpt_path=last"],
            folder / f"{root}.log",
        )
        # Late moments are likelier: half of the time goes into the start.
        moment = draw.triangular(0, seconds, 0.8 * seconds) if done < kills else None
        if not wait(processes, moment):
            kill(processes, draw)
            for process in processes:
                os.waitpid(process, 0)
            done, in_a_row = done + 1, in_a_row + 1
            continue
        compare(folder / "whole", folder / root)
        said = (folder / f"{root}.log").read_text()
        resumed += said.count(f"=last: {root}/checkpoints") // (1 + ("devices=2" in str(flags)))
        finished, most, in_a_row = finished + 1, max(most, in_a_row), 0
    return (
        f"{kind}: {done} kills, up to {most} of one run; {resumed} resumed from a file; "
        f"{finished} runs compared, all equal"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=8, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                print(campaign(kind, args.kills, Path(folder), args.seed), flush=True)
            except Exception:
                for log in sorted(Path(folder).glob("*.log")):
                    print(f"---- {log.name}", *log.read_text().splitlines()[-40:], sep="\n")
                raise


if __name__ == "__main__":
    main()
