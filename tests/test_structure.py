"""benchmarks/structure.py draws, counts and traces a small made-up project as one would by hand."""

import runpy
from pathlib import Path

import pytest

from benchmarks import structure

FILES = {
    "pyproject.toml": '[tool.mypy]\npackages = ["longctx_layers"]\nfiles = ["gpu"]\n',
    # Floors: kernels; ops; layers; model and notes, whose import of model is only for types.
    "longctx_layers/__init__.py": "from .model import Model\n",
    "longctx_layers/__main__.py": "from longctx_layers import hf\n",
    "longctx_layers/ops/__init__.py": "def f():\n    from longctx_layers.kernels import fast\n",
    "longctx_layers/layers/__init__.py": "from .one import One\n",
    "longctx_layers/layers/one.py": "from ..ops import f\nfrom longctx_layers.layers import two\n",
    "longctx_layers/layers/two.py": "import longctx_layers.layers.one\nimport torch.nn\n",
    "longctx_layers/model.py": "from . import layers, notes\nfrom .layers import One\n",
    "longctx_layers/notes.py": (
        "import typing\n"
        "if typing.TYPE_CHECKING:\n    from longctx_layers.model import Model\n"
        "else:\n    from longctx_layers import ops\n"
    ),
    # Programs, which the graph leaves out.
    "longctx_layers/cli.py": "from longctx_layers import model, training\n",
    "longctx_layers/training/train.py": "from longctx_layers import layers, ops, reports\n",
    "longctx_layers/reports/__init__.py": "from longctx_layers import training\n",
    "longctx_layers/evals/__init__.py": "from longctx_layers.evals.synthetic import main\n",
    "longctx_layers/evals/synthetic.py": "from longctx_layers.model import Model\n",
    "kernels/__init__.py": "",
    "kernels/fast.py": "x: Any\n",
    "gpu/check.py": "a, b = 1, None  # fmt: skip\nx: Any\n",
    "tests/test_it.py": "assert 1\nwith pytest.raises(E):\n    assert_close(1, 1)\nassertions()\n",
    "docs/page.md": "# Page\n\nText\n",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_graph(root: Path) -> None:
    graph = structure.graph(root)
    assert graph["floor by floor"] == ["evals, kernels", "ops", "layers, notes", "model"]
    assert (graph["rooms"], graph["floors"]) == (6, 4)
    # ops > kernels, layers > ops, notes > ops, model > layers, model > notes, notes > model
    assert graph["arrows"] == 6
    assert (graph["rooms with `__init__`"], graph["floors with `__init__`"]) == (7, 5)
    assert graph["arrows with `__init__`"] == 7
    assert graph["circles between rooms"] == [["model", "notes"]]
    assert graph["circles between files"] == [
        ["longctx_layers.layers.one", "longctx_layers.layers.two"],
        ["longctx_layers.model", "longctx_layers.notes"],
    ]


def test_a_circle_that_runs_is_one_floor() -> None:
    arrows = {("a", "b", True), ("b", "c", True), ("c", "b", True), ("c", "d", True)}
    assert structure.floors({*"abcd"}, arrows) == [["d"], ["b", "c"], ["a"]]


def count(*folders: str) -> int:
    return sum(text.count("\n") for path, text in FILES.items() if path.startswith(folders))


def test_lines(root: Path) -> None:
    lines = structure.lines(root)
    product = count("longctx_layers", "kernels", "gpu")
    assert lines["lines in all"] == product + count("tests", "docs")
    assert lines["lines, docs .md"] == 3
    checked = product - count("kernels")
    assert lines["lines under mypy, of all .py but tests"] == f"{checked / product:.1%}"
    programs = ("cli", "training", "reports", "evals/synthetic", "__main__")
    assert lines["lines, library without programs"] == count("longctx_layers") - count(
        *(f"longctx_layers/{name}" for name in programs)
    )
    assert lines["longest files, but tests"][0] == "longctx_layers/notes.py 5"


def test_habits(root: Path) -> None:
    assert structure.habits(root) == {
        "assertions in tests": 3,
        "`fmt: skip`": 1,
        "`Any`, library": 0,
        "tuple assignments, library": 0,
        "tuple assignments of unequal kind, library": 0,
        "`Any`, all but tests": 2,
        "tuple assignments, all but tests": 1,
        "tuple assignments of unequal kind, all but tests": 1,
    }


@pytest.mark.parametrize(
    ("code", "mixed"),
    [
        ("a, b = 1, 2", [False]),
        ("k, v = f(k), f(v)", [False]),
        ("dtype, ys = x.dtype, []", [True]),
        ("self.a, (b, c) = x.a, x.shape", [True]),
        ("a, b = f()", []),
        ("shape = 1, 2", []),
    ],
)
def test_tuple_assignments(code: str, mixed: list[bool]) -> None:
    assert structure.tuple_assignments(code) == mixed


def test_calls_and_changes_of_file(tmp_path: Path) -> None:
    sources = {
        "longctx_layers/upper.py": (
            "def upper(lower):\n    lower()\n    lower()\n    near()\n\ndef near():\n    pass\n"
        ),
        "kernels/lower.py": "def lower():\n    return len([])\n",
        "elsewhere.py": "def outside(call, *args):\n    return call(*args)\n",
    }
    functions = {}
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        functions |= runpy.run_path(str(tmp_path / name))
    counts = structure.count_calls(
        tmp_path, functions["outside"], functions["upper"], functions["lower"]
    )
    # upper, lower, lower, near
    assert counts == {"changes": 2, "files": 2, "calls": 4}


def test_table_compares_two_runs() -> None:
    before = {"floors": 8, "gone": 1}
    now = {"floors": 5, "circles": [["a", "b"]], "trace": {"changes": 40, "files": 20}}
    assert structure.table({"before": before, "now": now}).splitlines() == [
        "| | before | now |",
        "|---|---|---|",
        "| floors | 8 | 5 |",
        "| gone | 1 |  |",
        "| circles |  | 1<br>a <-> b |",
        "| trace |  | 40 changes, 20 files |",
    ]


def test_expects_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        structure.main(["--root", str(tmp_path)])
    assert f"expected a checkout with longctx_layers/__init__.py, got {tmp_path}" in (
        capsys.readouterr().err
    )


def test_the_library_has_no_circle() -> None:
    graph = structure.graph(Path(__file__).parents[1])
    assert graph["circles between rooms"] == []
    assert graph["circles between files"] == []
