"""What `make proofs` shows, as a list of small runs: what is trained, how, and what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from longctx_layers.evals import CopyRecall, Mqar, Passkey, Task
from longctx_layers.evals.program.options import doubling
from longctx_layers.evals.program.rows import key_of
from longctx_layers.evals.program.task_training import Recipe

WINDOW = 16
REACH = 2 * (WINDOW - 1)  # of the two layers of every model here
DISTANCE = 8 * WINDOW  # between what is told and its question, where it is measured
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


@dataclass(frozen=True)
class Run:
    """One model, trained on one task from one seed.

    Attributes:
        proof: passkey, copy_recall or mqar.
        name: of `BLOCKS`.
        seed: of the weights, and of the sequences trained on.
        recipe: how it is trained.
        lengths: at which it is asked.
        state_dim: of the state paths, where it is not that of `BLOCKS`.
        easier: how it is trained on easier sequences before: full attention alone takes many
            times as long to find out which token stood before which. Behind it the sequences ask
            as they are measured: with more questions, the first one, close to the value, becomes
            a relay for the others.
    """

    proof: str
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
        """Of the layer."""
        options = dict(BLOCKS[self.name][1])
        for name in ("ssm_state_dim", "state_dim"):
            if self.state_dim is not None and name in options:
                options[name] = self.state_dim
        return options

    @property
    def key(self) -> str:
        """Equal for equal runs."""
        given = {k: v for k, v in asdict(self).items() if k != "easier" or v is not None}
        return key_of({**given, "options": self.options, "distance": DISTANCE})

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage["recipe"].steps for stage in self.stages())

    def stages(self) -> list[dict[str, Any]]:
        """What the training is called with, one time after the other."""
        if self.easier is None:
            return [{"tasks": self.training_tasks(), "recipe": self.recipe}]
        return [
            {"tasks": self.easier_tasks(), "recipe": self.easier},
            {"tasks": self.training_tasks(), "recipe": self.recipe, "extra_questions": 0},
        ]

    def training_tasks(self) -> list[Task]:
        """Told a little beyond the reach, or further: it must not be seen by windows alone."""
        return self._tasks(REACH + 1)

    def easier_tasks(self) -> list[Task]:
        """Few pairs of few symbols, or a value told close to its questions."""
        if self.proof != "mqar":
            return [Passkey(distance=8)]
        sizes = [(pairs, n) for pairs in (2, 4, 8) for n in (8, 16, 32, 64)]
        return [Mqar(pairs=pairs, n_symbols=n) for pairs, n in sizes]

    def tasks(self) -> list[Task]:
        """What is measured."""
        return self._tasks(DISTANCE)

    def _tasks(self, distance: int) -> list[Task]:
        if self.proof == "mqar":  # pairs and questions leave room for no more
            return [Mqar(pairs=pairs, distance=REACH + 1) for pairs in PAIRS]
        kind = {"passkey": Passkey, "copy_recall": CopyRecall}[self.proof]
        return [kind(distance=distance)]


@dataclass(frozen=True)
class Drift:
    """One model of real text, trained by examples/train.py, and read over a long stream.

    Attributes:
        name: of `BLOCKS`.
        seed: of the weights and of the order of the text.
        steps: of 8 rows of `length` bytes.
        stream: tokens that are read afterwards.
        anew: whether the state begins anew with each file in training. The stream never does.
    """

    name: str
    seed: int
    steps: int = 150
    length: int = 512
    stream: int = 100_000
    anew: bool = False
    proof: str = field(default="drift", init=False)

    @property
    def key(self) -> str:
        """Equal for equal runs."""
        return key_of({**asdict(self), "options": BLOCKS[self.name][1]})


@dataclass(frozen=True)
class Depths:
    """The model of a passkey run, asked in long sequences by where the value was told.

    Attributes:
        name, seed: of the run.
        length: of the sequences.
        n: how many at each of `depths` places.
        early: tokens after which a layer's state is kept, to be put in again at the end.
        before: tokens of noise put before a value that was told first.
    """

    name: str
    seed: int
    length: int = 64 * TRAINED
    n: int = 16
    depths: int = 5
    early: int = 4 * TRAINED
    before: int = 2
    proof: str = field(default="depths", init=False)

    @property
    def key(self) -> str:
        """Equal for equal runs."""
        return key_of(asdict(self))


def plan(seeds: Sequence[int] = SEEDS) -> list[Run | Drift | Depths]:
    """All runs, what matters most first, and everything from the first seed before the next."""
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
