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
from pathlib import Path

import pytest

from benchmarks import structure

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


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel in it, as site-packages would have it."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index")
    run(*pip, "--target", target, wheel, cwd=target)
    return target


@pytest.mark.xdist_group("package")
def test_wheel_imports_from_another_directory(installed: Path, tmp_path: Path) -> None:
    assert_imports_from(installed, sys.executable, cwd=tmp_path, PYTHONPATH=str(installed))


@pytest.mark.xdist_group("package")
def test_programs_run_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="needs the extra `train`")
    where = {"cwd": tmp_path, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    python = (sys.executable, "-m")
    options = (
        "--model.num_params=tiny --model.block=window --data.dataset_name=synthetic "
        "--data.dataset_config=30 --data.seq_len=64 --data.batch-size=2 --trainer.max_steps=1 "
        "--trainer.limit_val_batches=1 --trainer.accelerator=cpu"
    )
    run(*python, "longctx_layers.training.train", "fit", *options.split(), **where)
    checkpoint = next(tmp_path.glob("logs/checkpoints/*.ckpt"))
    common = ("--checkpoint-path", checkpoint, "--seq_len", "64", "--max_len", "64")
    task = ("--task", "passkey", "--n", "1", "--no_probe", "--output_dir", "measured")
    run(*python, "longctx_layers.evals.synthetic", *task, *common, **where)
    assert (tmp_path / "measured/passkey.jsonl").is_file()
    brief = ("--samples", "0", "--documents", "2", "--output-dir", "report")
    run(*python, "longctx_layers.reports", *brief, *common, **where)
    assert (tmp_path / "report/report.html").is_file()
    longctx = installed / "bin/longctx"
    run(sys.executable, longctx, "export", "--checkpoint", checkpoint, "--output", "m", **where)
    assert (tmp_path / "m/model.safetensors").is_file()


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

# Files and folders of the library by level: each may import its own level and those below. `data`
# is apart: it may import the ground only. Others, such as the programs' command line, are free.
LEVELS = {
    "files": 0,
    "kernels": 1,
    "command_line": 1,
    "ops": 2,
    "layers": 3,
    "packing": 3,
    "transformers_calls": 4,
    "lm": 4,
    "hf": 5,
    "convert": 5,
    "evals": 5,
    "training": 5,
    "reports": 6,
    "testing": 6,
}
GROUND = {"files", "command_line"}
OUTSIDE = {"kernels", "tests", "support", "benchmarks", "examples"}


def wrong_arrows(root: Path) -> list[str]:
    """Imports in a checkout's library that go the wrong way."""
    files = structure.modules(root)
    wrong = []
    for importer, imported, _ in structure.file_arrows(files):
        above, below = structure.room(importer), structure.room(imported)
        if above == "data" and below not in {"data", *GROUND}:
            wrong.append(f"{importer} imports {imported}, but data imports nothing of the library")
        if LEVELS.get(below, 0) > LEVELS.get(above, 9):
            wrong.append(f"{importer} imports {imported}, which stands above it")
        if imported == "longctx_layers" and above in LEVELS and LEVELS[above] < 5:
            wrong.append(f"{importer} imports the package, which imports everything")
    for module, path in files.items():
        for name, _ in structure.imports(ast.parse(path.read_text(encoding="utf-8")), module):
            if name.split(".")[0] in OUTSIDE:
                wrong.append(f"{module} imports {name}, which is outside of the package")
    return wrong


def test_imports_go_one_way() -> None:
    wrong = wrong_arrows(ROOT)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels/ssd.py", "from longctx_layers.ops import checks"),
        ("longctx_layers/ops/ssd.py", "def f():\n    from longctx_layers.layers.base import Layer"),
        ("longctx_layers/ops/ssd.py", "from ..layers import base"),
        ("longctx_layers/ops/ssd.py", "from longctx_layers import DPASSM"),
        ("longctx_layers/ops/ssd.py", "import kernels.ssd"),
        ("longctx_layers/layers/base.py", "import longctx_layers.lm"),
        ("longctx_layers/lm/__init__.py", "from ..convert import api"),
        ("longctx_layers/hf/__init__.py", "from tests.conftest import settings"),
        ("longctx_layers/data/__init__.py", "from longctx_layers.lm import model"),
    ],
)
def test_a_planted_wrong_arrow_is_found(module: str, source: str, tmp_path: Path) -> None:
    for name in ("kernels", *(f"longctx_layers/{name}" for name in LEVELS if name != "kernels")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "longctx_layers/data").mkdir()
    for name in ("longctx_layers/__init__.py", "longctx_layers/layers/base.py"):
        (tmp_path / name).touch()
    for name in ("lm/model", "convert/api"):
        (tmp_path / f"longctx_layers/{name}.py").touch()
    assert not wrong_arrows(tmp_path)
    (tmp_path / module).write_text(source)
    assert wrong_arrows(tmp_path)


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
