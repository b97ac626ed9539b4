"""The package as others get it: what the wheel holds, who imports whom, what an import loads."""

import ast
import email
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = {"triton", "flash", "flash4", "liger", "train", "deepspeed", "hf", "bench", "docs", "dev"}
HEAVY = [
    "accelerate",
    "datasets",
    "flash_attn",
    "liger_kernel",
    "lightning",
    "matplotlib",
    "peft",
    "tokenizers",
    "transformers",
    "triton",
]


def run(*command: object, cwd: Path, **env: str) -> str:
    """What the command prints; its whole output is the failure's message."""
    # PYTHONPATH of the caller could lend the library to a test that must find an installed one.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def library_files() -> dict[str, Path]:
    """The library's Python files in the checkout, by their path in an installed library."""
    folders = {
        "longctx_layers": ROOT / "longctx_layers",
        "longctx_layers/kernels": ROOT / "kernels",
    }
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for name, folder in folders.items()
        for path in folder.rglob("*.py")
    }


DATA_FILES = {"longctx_layers/py.typed", "longctx_layers/reports/page.html"}


# ---- The wheel and the editable install


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from: setuptools leaves folders behind and packs what is in them."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("longctx_layers", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=sources)
    (built,) = out.glob("*.whl")
    return built


def assert_imports_from(place: Path, python: Path | str, cwd: Path, **env: str) -> None:
    """`longctx_layers` and its kernels come from `place`, which offers no top-level `kernels`."""
    code = (
        "import importlib.util, json, longctx_layers, longctx_layers.kernels\n"
        "other = importlib.util.find_spec('kernels')\n"
        "print(json.dumps([longctx_layers.__file__, longctx_layers.kernels.__file__,"
        " other and other.origin]))"
    )
    library, kernels, other = json.loads(run(python, "-c", code, cwd=cwd, **env))
    assert Path(library).is_relative_to(place)
    assert Path(kernels).is_relative_to(place)
    assert other is None or not Path(other).is_relative_to(place)


@pytest.mark.xdist_group("package")
def test_wheel_holds_every_module_and_no_top_level_kernels(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {*library_files(), *DATA_FILES}
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == expected, "is a package missing from `packages` in pyproject.toml?"


@pytest.mark.xdist_group("package")
def test_wheel_requires_torch_einops_and_safetensors_only(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    requires = metadata.get_all("Requires-Dist", [])
    assert sorted(r for r in requires if "extra ==" not in r) == [
        "einops",
        "safetensors",
        "torch>=2.8",
    ]
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS


@pytest.mark.xdist_group("package")
def test_wheel_imports_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index")
    run(*pip, "--target", target, wheel, cwd=tmp_path)
    assert_imports_from(target, sys.executable, cwd=tmp_path, PYTHONPATH=str(target))


@pytest.mark.xdist_group("package")
def test_editable_install_imports_from_another_directory(sources: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code, cwd=tmp_path).strip())
    # It borrows torch and setuptools from here; .pth files there, of another editable install of
    # this library, are not read a second time.
    borrowed = [p for p in sys.path if p.endswith("-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, "--no-build-isolation", "--editable", sources, cwd=tmp_path)
    assert_imports_from(sources, python, cwd=tmp_path)


def test_bare_kernels_folder_imports_from_the_root() -> None:
    # Other libraries do `import kernels` for the PyPI package; from here they find our folder.
    assert (ROOT / "kernels/__init__.py").read_bytes() == b""
    run(sys.executable, "-c", "import kernels", cwd=ROOT)


def test_transformers_imports_from_the_root() -> None:
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    run(sys.executable, "-c", "from transformers import LlamaForCausalLM", cwd=ROOT)


# ---- Who imports whom

# A module may import its own level and those below. Top-level files without a line here, and the
# public names in longctx_layers itself, are of the model's level.
LEVELS = {
    "kernels": 1,
    "command_line": 1,
    "ops": 2,
    "layers": 3,
    "data": 4,
    "hf": 5,
    "convert": 5,
    "training": 5,
    "evals": 5,
    "reports": 6,
    "testing": 6,
}
MODEL = 4
OUTSIDE = {"triton": 0, "tests": 6, "benchmarks": 6, "examples": 6}


def level(module: str) -> int | None:
    """Where a module stands, lowest first; None for those that the rule is not about."""
    top, _, rest = module.partition(".")
    if top == "longctx_layers":
        return LEVELS.get(rest.split(".")[0], MODEL)
    return OUTSIDE.get(top)


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Full names that the source imports, anywhere in it: a lazy import is an arrow too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=base, names=names, level=dots):
                above = package[: len(package) - dots + 1] if dots else []
                parts = [*above, *([base] if base else [])]
                yield from (".".join([*parts, alias.name]) for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def wrong_arrows(source: str, module: str, is_package: bool = False) -> list[str]:
    own = level(module)
    assert own is not None
    wrong = []
    for name in imported(source, module, is_package):
        if name.split(".")[0] == "kernels":
            wrong.append(f"{module} imports {name}: its name is longctx_layers.kernels")
        elif (other := level(name)) is not None and other > own:
            wrong.append(f"{module} imports {name}, which stands above it")
    return wrong


def test_imports_go_one_way() -> None:
    wrong = []
    for name, path in library_files().items():
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        wrong += wrong_arrows(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longctx_layers.kernels.ssd", "from longctx_layers.ops import checks"),
        ("longctx_layers.ops.ssd", "def f():\n    from longctx_layers.layers.base import Layer"),
        ("longctx_layers.ops.ssd", "from .. import layers"),
        ("longctx_layers.ops.ssd", "from ..layers import base"),
        ("longctx_layers.ops.ssd", "from longctx_layers import DPASSM"),
        ("longctx_layers.ops.ssd", "import kernels.ssd"),
        ("longctx_layers.layers.dpassm", "import longctx_layers.lm.model"),
        (
            "longctx_layers.layers.dpassm",
            "import importlib; importlib.import_module('longctx_layers.hf')",
        ),
        ("longctx_layers.lm.model", "from ..convert import to_dpassm"),
        ("longctx_layers.lm.model", "from longctx_layers.testing import inputs"),
        ("longctx_layers", "from . import reports"),
        ("longctx_layers.hf", "from tests.conftest import settings"),
    ],
)
def test_planted_wrong_arrow_is_found(module: str, source: str) -> None:
    assert wrong_arrows(source, module, is_package=module == "longctx_layers")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longctx_layers.kernels.ssd", "import torch, triton.language as tl"),
        ("longctx_layers.ops.ssd", "from longctx_layers.kernels import ssd; from . import checks"),
        ("longctx_layers.layers.dpassm", "from ..ops.state_space.ssd import ssd"),
        ("longctx_layers.lm.model", "from .generation import generate; from ..layers import x"),
        ("longctx_layers", "from .lm.model import LongContextLM; from .layers import DPASSM"),
        ("longctx_layers.hf", "import transformers; from longctx_layers import create_model"),
        ("longctx_layers.testing", "from longctx_layers import layers"),
    ],
)
def test_right_arrows_pass(module: str, source: str) -> None:
    assert not wrong_arrows(source, module, is_package=module == "longctx_layers")


# ---- What `import longctx_layers` loads


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    # Empty stand-ins make the test mean something where the optional packages are not installed.
    for name in HEAVY:
        (tmp_path / f"{name}.py").touch()
    code = (
        "import json, sys, time, torch\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "before, start = set(sys.modules), time.perf_counter()\n"
        "import longctx_layers\n"
        "print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))"
    )
    seconds, added = json.loads(run(sys.executable, "-c", code, tmp_path, cwd=tmp_path.parent))
    print(f"import longctx_layers: {seconds:.3f} s and {len(added)} modules beyond torch's own")
    assert not {name.split(".")[0] for name in added} & set(HEAVY)
    # Counts, not seconds: what a fast import comes from, and the same on every machine.
    assert len(added) < 80, added
