"""What every test starts from: packages of the checkout, hypothesis, torch's threads."""

import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

# No deadlines: no test asserts a time. "fast" draws the same examples on every run, so that a red
# test is the change's fault; "slow" (`make test-slow`) draws new ones on each.
settings.register_profile("fast", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("slow", deadline=None, max_examples=500, print_blob=True)
settings.load_profile("fast")

# The programs in these folders are tested too. They are imported by these names, and the checkout's
# root stays off sys.path, where `kernels` would be found as a package of its own.
for name in ("benchmarks", "examples"):
    package = ModuleType(name)
    package.__path__ = [str(Path(__file__).parents[1] / name)]
    sys.modules[name] = package

# Whatever the tests' results depend on: what they passed with is in every log.
PACKAGES = ("torch", "triton", "transformers", "peft", "lightning", "datasets", "lm_eval", "numpy")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def pytest_report_header() -> str:
    return "versions: " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES)


# Parallel tests already use every core, and the last bits of a sum depend on the number of threads:
# the programs that tests start have one, too.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _small_calls_take_the_fast_path(request):
    """Except where training is tested: those tests compare with runs in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name not in ("training", "data", "examples"):
            patch.setattr("longctx_layers.ops.attention.cpu.FEWEST_SCORES", 200)
        yield


@pytest.fixture(autouse=True)
def _quiet_transformers(request):
    """Other people's models warn and draw bars."""
    if request.path.parent.name in ("hf", "convert", "integrations"):
        transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
