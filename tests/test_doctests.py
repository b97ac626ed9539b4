"""The examples in docstrings run, and every public name has one."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import longctx_layers

PACKAGE = Path(longctx_layers.__file__).parent
MODULES = [
    ".".join(("longctx_layers", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]
PUBLIC = {name: getattr(longctx_layers, name) for name in longctx_layers.__all__}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    try:
        module = importlib.import_module(name.removesuffix(".__init__"))
    except ModuleNotFoundError as error:
        pytest.skip(f"needs {error.name}")
    torch.manual_seed(0)
    names = {"torch": torch, **PUBLIC, **vars(module)}
    result = doctest.testmod(module, globs=names, optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if callable(value)])
def test_public_names_have_an_example(name):
    assert ">>>" in (PUBLIC[name].__doc__ or ""), f"{name} has no example"
