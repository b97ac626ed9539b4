"""What the interpreted tests of all kernels start from."""

import pytest

from longctx_layers.ops import availability, operation

if availability.VERSION >= availability.MINIMUM:
    from support.sizes import SIZES

    from benchmarks.kernels.interpreter import interpreted


class _Refused(pytest.Module):
    """A module of tests that is not even imported: its imports may need another Triton."""

    def collect(self):
        oldest = ".".join(map(str, availability.MINIMUM))
        found = ".".join(map(str, availability.VERSION)) or "none"
        pytest.skip(f"the kernels need Triton {oldest} or newer, got {found}")


def pytest_pycollect_makemodule(module_path, parent):
    """Tests of kernels are skipped where the library itself would refuse Triton."""
    if availability.VERSION < availability.MINIMUM:
        return _Refused.from_parent(parent, path=module_path)
    return None


@pytest.fixture
def small(monkeypatch):
    """Small programs, and Triton's backend accepts CPU tensors."""
    monkeypatch.setitem(operation.KINDS, "triton", operation.Kind())
    monkeypatch.setattr(availability, "refuse_device", lambda *_: None)
    for module, sizes in SIZES.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


@pytest.fixture
def interpret(small):
    """The interpreter runs Triton's kernels, small ones."""
    with interpreted():
        yield
