"""The experiments of `make results` as a list of small runs: what is trained, how, and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from longctx_layers.evals import TASKS, Mqar, Passkey, Task
from longctx_layers.evals.program.rows import key_of
from longctx_layers.evals.program.task_training import Recipe
from longctx_layers.evals.scoring import doubling

WINDOW = 16
REACH = 2 * (WINDOW - 1)  # of the two layers of every model
DISTANCE = 8 * WINDOW  # between a value and its question, in measurements
TRAINED = 256
FARTHEST = 128 * TRAINED
PAIRS = (4, 8, 16, 32)
SEEDS = (0, 1, 2)

WINDOWED = {"window_size": WINDOW}
BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpassm": ("dpassm", {**WINDOWED, "ssm_state_dim": 16}),
    "blade": ("blade", {"chunk_size": WINDOW, "state_dim": 16}),
    "dpassm, state path off": ("dpassm", {**WINDOWED, "ssm": None}),
    "blade, state path off": ("blade", {"chunk_size": WINDOW, "state_update": None}),
    "window": ("window", WINDOWED),
    "baseline_longformer": ("baseline_longformer", {**WINDOWED, "n_global_tokens": 2}),
    "baseline_bigbird": (
        "baseline_bigbird",
        {**WINDOWED, "n_random_tokens": 4, "n_global_tokens": 2},
    ),
    "vanilla": ("vanilla", {}),
}


def _key(run: Run | Drift | Depths, **further: Any) -> str:
    """A hash of all settings of a run, which says whether its stored result is up to date.

    The keys of the committed results must not change: there an experiment is called a proof, and
    training on easier sequences is only mentioned by the runs that have it.
    """
    settings = {**asdict(run), "proof": run.experiment, **further}
    del settings["experiment"]
    if settings.get("easier", ...) is None:
        del settings["easier"]
    return key_of(settings)


@dataclass(frozen=True)
class Run:
    """One model, trained on one task from one seed.

    Attributes:
        experiment: passkey, copy_recall or mqar.
        name: a key of `BLOCKS`.
        seed: of the weights, and of the training sequences.
        recipe: how it is trained.
        lengths: at which it is measured.
        state_dim: of the state paths, if it differs from that in `BLOCKS`.
        easier: how it is trained on easier sequences first, because full attention takes many
            times as long to learn which token precedes which. After that, training sequences have
            as many questions as in the measurement: with more, the first question, close to the
            value, would serve as a copy of it for the others.
    """

    experiment: str
    name: str
    seed: int
    recipe: Recipe
    lengths: tuple[int, ...]
    state_dim: int | None = None
    easier: Recipe | None = None

    @property
    def block(self) -> str:
        """The name of the layer."""
        return BLOCKS[self.name][0]

    @property
    def options(self) -> dict[str, Any]:
        """The options of the layer."""
        options = dict(BLOCKS[self.name][1])
        for name in ("ssm_state_dim", "state_dim"):
            if self.state_dim is not None and name in options:
                options[name] = self.state_dim
        return options

    @property
    def key(self) -> str:
        """Equal for equal runs."""
        return _key(self, options=self.options, distance=DISTANCE)

    @property
    def steps(self) -> int:
        """Number of steps of all stages."""
        return sum(stage["recipe"].steps for stage in self.stages())

    def stages(self) -> list[dict[str, Any]]:
        """The arguments of the consecutive trainings."""
        if self.easier is None:
            return [{"tasks": self.training_tasks(), "recipe": self.recipe}]
        return [
            {"tasks": self.easier_tasks(), "recipe": self.easier},
            {"tasks": self.training_tasks(), "recipe": self.recipe, "extra_questions": 0},
        ]

    def training_tasks(self) -> list[Task]:
        """With distances just beyond the reach or larger, so that windows alone do not suffice."""
        return self._tasks(REACH + 1)

    def easier_tasks(self) -> list[Task]:
        """Few pairs of few symbols, or a value close to its questions."""
        if self.experiment != "mqar":
            return [Passkey(distance=8)]
        sizes = [(pairs, n) for pairs in (2, 4, 8) for n in (8, 16, 32, 64)]
        return [Mqar(pairs=pairs, n_symbols=n) for pairs, n in sizes]

    def tasks(self) -> list[Task]:
        """What is measured."""
        return self._tasks(DISTANCE)

    def _tasks(self, distance: int) -> list[Task]:
        if self.experiment == "mqar":  # pairs and questions leave no room for a larger distance
            return [Mqar(pairs=pairs, distance=REACH + 1) for pairs in PAIRS]
        return [TASKS[self.experiment](distance=distance)]


@dataclass(frozen=True)
class Drift:
    """One model of real text, trained by longctx_layers.training, that reads a long stream.

    Attributes:
        name: a key of `BLOCKS`.
        seed: of the weights and of the order of the text.
        steps: number of steps, each of 8 rows of `length` bytes.
        length: number of bytes of a row.
        stream: number of bytes that are read afterwards.
        anew: whether the state is reset at the beginning of each file in training. In the stream
            it never is.
    """

    name: str
    seed: int
    steps: int = 150
    length: int = 512
    stream: int = 100_000
    anew: bool = False
    experiment: str = field(default="drift", init=False)

    @property
    def key(self) -> str:
        """Equal for equal runs."""
        return _key(self, options=BLOCKS[self.name][1])


@dataclass(frozen=True)
class Depths:
    """The model of a passkey run, measured in long sequences by the position of the value.

    Attributes:
        name, seed: of the run.
        length: of the sequences.
        n: number of sequences at each of `depths` positions.
        depths: number of positions.
        early: number of tokens after which a layer's state is saved, to be restored at the end.
        before: number of noise tokens that are put before a value at the beginning.
    """

    name: str
    seed: int
    length: int = 64 * TRAINED
    n: int = 16
    depths: int = 5
    early: int = 4 * TRAINED
    before: int = 2
    experiment: str = field(default="depths", init=False)

    @property
    def key(self) -> str:
        """Equal for equal runs."""
        return _key(self)


def plan(seeds: Sequence[int] = SEEDS) -> list[Run | Drift | Depths]:
    """All runs: every run of the first seed before the next seed, the most important first."""
    return [run for seed in seeds for run in _of_seed(seed)]


def _of_seed(seed: int) -> list[Run | Drift | Depths]:
    far = tuple(doubling(TRAINED, FARTHEST))
    off = ("dpassm, state path off", "blade, state path off", "window")
    others = ("baseline_longformer", "baseline_bigbird")
    memories = ("dpassm", "blade")
    long = Recipe(2000, TRAINED, tokens=4096, longest=128)
    short = Recipe(250, TRAINED, tokens=4096, longest=1)
    copying = Recipe(1000, TRAINED, tokens=8192, longest=4)
    baseline = Recipe(2000, TRAINED, tokens=4096, longest=4)
    halved = replace(baseline, steps=1000)
    pairs = Recipe(2000, TRAINED, tokens=4096, longest=4)
    full = Recipe(2000, TRAINED, tokens=4096, curriculum=0.5, longest=4)
    marks = Recipe(400, TRAINED // 4, tokens=4096, curriculum=0.0, longest=1)
    matches = replace(marks, steps=2000)
    return [
        *(Run("passkey", name, seed, long, far) for name in memories),
        *(Depths(name, seed) for name in memories),
        *(Run("passkey", name, seed, short, far[:3]) for name in off),
        *(Run("copy_recall", name, seed, copying, far[:5]) for name in memories),
        *(Run("copy_recall", name, seed, short, far[:1]) for name in off),
        Run("mqar", "dpassm", seed, pairs, far[:3], state_dim=32),
        Run("passkey", "vanilla", seed, full, far[:5], easier=marks),
        *(Run("passkey", name, seed, baseline, far[:5]) for name in others),
        *(Drift(name, seed) for name in (*memories, "window")),
        Run("mqar", "vanilla", seed, full, far[:3], state_dim=32, easier=matches),
        Run("copy_recall", "vanilla", seed, full, far[:5], easier=marks),
        *(Run("copy_recall", name, seed, halved, far[:5]) for name in others),
        *(
            Run("mqar", name, seed, pairs, far[:3], state_dim=32)
            for name in ("blade", *others, "window")
        ),
        Drift("dpassm", seed, anew=True),
    ]
