"""Two processes of DistributedDataParallel compute the gradients of one."""

import subprocess
import sys

# Two steps each: DDP notices only in the second that a parameter had no part in the first.
WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from longctx_layers.testing import LAYER_CASES, small_layer

rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for case in LAYER_CASES:
    single, replica = small_layer(case), DistributedDataParallel(small_layer(case))
    torch.manual_seed(0)
    for length in (1, 1, 12, 3):
        x = torch.randn(2, length, 16, dtype=torch.float64)
        (single(x)[0].square().sum() / 2).backward()
        replica(x[rank : rank + 1])[0].square().sum().backward()
    for name, parameter in single.named_parameters():
        shared = replica.module.get_parameter(name).grad
        assert_close(shared, parameter.grad, rtol=1e-9, atol=1e-9, msg=f"{case} {name}")
del replica  # it holds the group, whose threads must end before the interpreter does
dist.destroy_process_group()
"""


def test_gradients_equal_those_of_one_process(tmp_path):
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate()
        assert worker.returncode == 0, errors
