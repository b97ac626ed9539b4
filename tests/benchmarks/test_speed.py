"""Benchmarks measure what they claim, of correct results; streaming stays in its bounds."""

import json
import runpy
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed import by_length, memory, model_targets, peers, peers_table, targets
from benchmarks.speed.common import RUNS, Shape
from benchmarks.speed.contenders import FLOOR, case, module
from benchmarks.speed.measuring import Row, Timing, command, interleave, slope
from benchmarks.speed.operations import OPERATIONS, operation_case
from longctx_layers import LAYERS, create_model
from longctx_layers.layers import Layer
from longctx_layers.layers.state import Field

SHAPE = Shape(d_model=32, n_heads=4, local=8)
SMALL = ["--d_model", "32", "--n_heads", "4", "--local", "8", "--rounds", "2", "--no_memory"]


class Products(TorchDispatchMode):
    """Counts the operations of matrix products that are not batched."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.operations += 2 * left.numel() * right.shape[1]
        return func(*args, **(kwargs or {}))


def matrix_flops(run):
    with Products() as products:
        run()
    return products.operations


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", LAYERS)
def test_floor_is_every_projection_of_its_layer(name, run):
    length = 24
    layer = module(name, SHAPE)
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    rows = {n: layer.n_global_tokens if n.startswith("global_") else length for n in linears}
    flops = sum(2 * rows[n] * m.weight.numel() for n, m in linears.items())
    floor = RUNS[run](case(FLOOR + name, SHAPE, length))
    assert matrix_flops(floor) == flops * (3 if run == "forward+backward" else 1)
    if run == "forward+backward":
        assert all(m.weight.grad is not None for m in linears.values())


@pytest.mark.parametrize("name", [*LAYERS, *OPERATIONS])
def test_backward_reaches_every_leaf(name):
    computation = case(name, SHAPE, 20)
    RUNS["forward+backward"](computation)()
    assert all(leaf.grad is not None for leaf in computation.leaves)


@pytest.mark.parametrize("name", OPERATIONS)
def test_decode_of_operations_is_one_token(name):
    (y,) = operation_case(name, SHAPE, 1, cached=40).call()
    x = operation_case(name, SHAPE, 1).leaves[0]
    assert y.shape == x.shape


COMPILES = [pytest.param(peers.FLEX, marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", [*(n for n in peers.PEERS if n != peers.FLEX), *COMPILES])
def test_peer_equals_ours(name):
    if reason := peers.PEERS[name].missing:
        pytest.skip(reason)
    peers.check(name)


def test_a_peer_that_differs_is_found(monkeypatch):
    wrong = peers.PEERS[peers.SDPA]._replace(ours=peers.our_window)
    monkeypatch.setitem(peers.PEERS, peers.SDPA, wrong)
    agreeing, reasons = peers_table.checked([peers.SDPA, peers.MASKED_SDPA])
    assert agreeing == [peers.MASKED_SDPA]
    assert "differ" in reasons[peers.SDPA]


def test_an_absent_peer_has_a_reason(monkeypatch):
    absent = peers.PEERS[peers.SDPA]._replace(package="no_such_package")
    monkeypatch.setitem(peers.PEERS, peers.SDPA, absent)
    agreeing, reasons = peers_table.checked([peers.SDPA])
    assert not agreeing
    assert "no_such_package is not installed" in reasons[peers.SDPA]


def test_rounds_are_interleaved():
    order = []
    times = interleave({n: lambda n=n: order.append(n) for n in "ab"}, rounds=4)
    assert order == ["a", "b"] * 5  # the first round warms up
    assert times["a"].rounds == 4
    order.clear()
    interleave({"a": lambda: order.append("a")}, rounds=9, seconds=0)
    assert len(order) == 1 + 3


def test_slope_is_the_exponent():
    lengths = [64, 128, 512]
    assert slope(lengths, [3 * n**1.5 for n in lengths]) == pytest.approx(1.5)


def test_targets_are_met_or_not():
    fast, slow = Timing(1.0, 1.0, 1.0, 3), Timing(2.0, 2.0, 2.0, 3)
    assert targets.layer_targets.ratio("r", slow, fast, at_most=1.5).met is False
    assert targets.layer_targets.ratio("r", slow, fast, at_least=1.5).met is True
    assert Row("r", 1.0).met is None


def test_peak_memory_is_that_of_the_call(monkeypatch):
    # The process that is measured imports the benchmarks by itself, from what is on this path.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    shape = Shape(d_model=256, n_heads=4)
    length = 16384
    peak = memory.peak_bytes(memory.passes, FLOOR + "vanilla", "forward", length, shape)
    # The output, and two of q, k and v at a time.
    assert 3 <= peak / (4 * length * shape.d_model) < 3.5


@pytest.mark.parametrize("kind", by_length.KINDS)
def test_by_length(kind, tmp_path):
    lengths = ["--lengths", "16", "32", "--quadratic_up_to", "16"]
    by_length.main([*SMALL, *lengths, "--only", kind, "--output_dir", str(tmp_path)])
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"{kind}.json", f"{kind}.md", f"{kind}_time.png"}
    rows = json.loads((tmp_path / f"{kind}.json").read_text())["rows"]
    measured = {(row["name"], row["run"], row["length"]) for row in rows}
    quadratic = {peers.SDPA, "vanilla", "sparse_attention, full"}
    for name in by_length.contenders(kind):
        for run in RUNS:
            assert (name, run, 16) in measured
            assert ((name, run, 32) in measured) == (name not in quadratic)


def test_peers_table(tmp_path):
    options = ["--lengths", "32", "--peers", peers.SDPA, peers.MASKED_SDPA]
    rows = peers_table.main([*SMALL, *options, "--output", str(tmp_path)])
    assert {row["name"] for row in rows} >= {peers.SDPA, peers.MASKED_SDPA, *LAYERS}
    assert "= ours: vanilla" in (tmp_path / "peers.md").read_text()


def test_targets_keep_what_is_not_measured_again(tmp_path):
    options = [*SMALL, "--length", "32", "--layers", "dpassm", "window"]
    options += ["--size", "tiny", "--vocab_size", "64", "--output_dir", str(tmp_path)]
    first = targets.main(["floor", "bf16", "training", *options])
    assert len(first["floor"]["rows"]) == len(first["bf16"]["rows"]) == 4
    second = targets.main(["sdpa", "slopes", *options])
    assert second["floor"] == json.loads(json.dumps(first["floor"]))
    assert second["slopes"]["rows"][0]["what"].startswith("dpassm, slope of time")
    page = (tmp_path / "targets.md").read_text()
    assert page.index("own linear projections") < page.index("full causal") < page.index("training")


@pytest.fixture
def registered(monkeypatch):
    """A layer of a third party: a moving average, without any projection."""

    class AverageState(NamedTuple):
        mean: torch.Tensor
        position: torch.Tensor
        segment: torch.Tensor

    class Average(Layer[AverageState]):
        state_type = AverageState

        def __init__(self, d_model, n_heads, **options):
            super().__init__(d_model, **options)
            self.rate = torch.nn.Parameter(torch.tensor(0.1))

        def fields(self):
            return {"mean": Field((self.d_model,), "accumulator")}

        def mix(self, x, state, segments, offset):
            mean = x.new_zeros(len(x), self.d_model) if state is None else state.mean
            outputs = []
            for u in x.unbind(1):
                mean = mean + self.rate * (u - mean)
                outputs.append(mean)
            return torch.stack(outputs, 1), {"mean": mean}

    monkeypatch.setitem(LAYERS, "average", Average)
    return "average"


def test_a_registered_layer_is_in_all_tables(registered, tmp_path):
    options = [*SMALL, "--output_dir", str(tmp_path)]
    by_length.main([*options, "--lengths", "16", "24", "--only", "layers"])
    assert "| average | " in (tmp_path / "layers.md").read_text()
    rows = peers_table.main([*options, "--lengths", "16", "--peers", peers.SDPA])
    assert registered in {row["name"] for row in rows}
    rows = targets.main(["floor", "bf16", "slopes", *options, "--length", "32"])
    names = {row["what"].split()[0].strip(",") for row in rows["floor"]["rows"]}
    assert names == {name for name in LAYERS if name not in ("vanilla", registered)}
    measured = [row for part in ("bf16", "slopes") for row in rows[part]["rows"]]
    of_registered = [Row(**row) for row in measured if row["what"].startswith(registered)]
    assert len(of_registered) == 2 + 2
    assert all(row.met is None for row in of_registered)


def test_hyphens_and_the_older_flag_are_understood(tmp_path):
    args = by_length.parse(["--no-memory", "--quadratic-up-to", "7", "--output", str(tmp_path)])
    assert (args.no_memory, args.quadratic_up_to, args.output_dir) == (True, 7, tmp_path)
    args = targets.parse(["--vocab-size", "64", "--publish"])
    assert (args.vocab_size, args.output_dir) == (64, Path("reports/bench"))


def test_an_unknown_section_gets_the_closest_one(capsys):
    with pytest.raises(SystemExit):
        targets.parse(["slope"])
    assert "unknown section 'slope'; did you mean 'slopes'?" in capsys.readouterr().err


def test_command_is_what_one_types(monkeypatch):
    program = str(Path(targets.__file__).resolve())
    monkeypatch.setattr("sys.argv", [program, "floor", "--length", "64"])
    assert command() == "python -m benchmarks.speed.targets floor --length 64"


def test_decode_rows():
    args = Namespace(size="tiny", vocab_size=64, local=8, rounds=1, seconds=0)
    rows = {row.what: row for row in model_targets.decode(args)}
    assert rows["state after 1,000,000 / after 1,000"].measured == 1


def test_weights_once_multiplies_every_matrix():
    model = create_model(64, "tiny", "dpassm", {"window_size": 8})
    linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    flops = matrix_flops(model_targets.weights_once(model))
    assert flops == sum(2 * w.numel() for w in [*linears, model.embedding.weight])


# ---- examples/stream.py


@pytest.fixture
def stream():
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "stream.py"))


def test_stream(stream, tmp_path):
    out = tmp_path / "out"
    command = f"--size tiny --length 1300 --piece 128 --decode 3 --output-dir {out}"
    metrics = stream["main"](command.split())
    written = {path.name for path in out.iterdir()}
    assert written == {"stream.png", "stream.json", "stream.md"}
    assert json.loads((out / "stream.json").read_text())["pieces"] == metrics["pieces"]
    assert [piece["position"] for piece in metrics["pieces"]] == [1000, 1128, 1256, 1300]
    assert metrics["early"]["state_bytes"] == metrics["late"]["state_bytes"]


def test_stream_takes_the_whole_text_and_a_checkpoint(stream, tmp_path):
    model = create_model(256, "tiny", "window", {"window_size": 4})
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_bytes(bytes(range(7)))
    options = f"--length 1100 --piece 64 --checkpoint {tmp_path}/model --text {tmp_path}/text"
    args = stream["parse"](options.split())
    ids = torch.cat(list(stream["pieces"](args, 256)), dim=1)
    assert torch.equal(ids[0], torch.arange(1100) % 7)
    _, late, _ = stream["prefill"](stream["load"](args), args)
    _, expected = model(ids, return_state=True)
    for layer, other in zip(late, expected, strict=True):
        torch.testing.assert_close(layer, other)


def test_stream_errors(stream, tmp_path, capsys):
    with pytest.raises(SystemExit):
        stream["main"](["--length", "10"])
    assert "--length: expected more than 1000, got 10" in capsys.readouterr().err
    (tmp_path / "empty").touch()
    args = stream["parse"](["--text", str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="at least one byte"):
        next(stream["pieces"](args, 256))
