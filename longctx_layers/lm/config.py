"""The configuration of a language model: everything that is needed to build it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from longctx_layers.layers import LAYERS, Projection, RopeScaling, layer_name
from longctx_layers.layers.registry import canonical_name, layer_parameters
from longctx_layers.ops.checks import closest, expect_positive


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a `LongContextLM`, checked when it is made; it can be stored as JSON.

    >>> config = ModelConfig(vocab_size=256, d_model=64, n_layers=2, n_heads=4, ffn_dim=128)
    >>> config.block_names
    ('dpassm', 'dpassm')
    >>> ModelConfig.from_dict(config.to_dict()) == config
    True

    Attributes:
        vocab_size: number of token ids.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads: query heads of every block; divides d_model.
        ffn_dim: hidden width of every block's SwiGLU.
        pattern: names of layers in `LAYERS`, repeated over depth: with `("dpassm",)` every block
            is a DPASSM, with `("dpassm", "dpassm", "vanilla")` every third one has full attention.
        block_kwargs: options of the layers by name, `{"dpassm": {"window_size": 128}}`. If the
            pattern has one name only, the options suffice: `{"window_size": 128}`. They are stored
            by name.
        tie_embeddings: whether the head uses the embedding's weight (one parameter, counted once).
        dropout: of the embedding and of every residual branch, in training only. The layers get it
            as their `dropout`, unless block_kwargs has another value.
        norm_eps: epsilon of the model's RMSNorms; those inside the layers have their own.

    Raises:
        ValueError, TypeError: for sizes below 1, a dropout outside [0, 1), unknown names of layers
            or fields, or options for a layer that is not in the pattern.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    pattern: tuple[str, ...] = ("dpassm",)
    block_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tie_embeddings: bool = True
    dropout: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "ffn_dim"):
            expect_positive(name, getattr(self, name))
        if not isinstance(self.tie_embeddings, bool):
            raise TypeError(
                f"tie_embeddings: expected a bool, got {self.tie_embeddings!r}; pass True or False"
            )
        for name in ("dropout", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
        pattern = _checked_pattern(self.pattern, self.n_layers)
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "block_kwargs", _by_block_name(self.block_kwargs, pattern))

    @property
    def block_names(self) -> tuple[str, ...]:
        """The name of each block's layer, from the first block to the last."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.n_layers))

    def layer_options(self, index: int) -> dict[str, Any]:
        """The options of layer `index`, including defaults that vary over depth.

        `chunk_shift` alternates between 0 and half a chunk, so that tokens of neighbouring chunks
        mix. `seed` is the layer's index, so that each layer draws other random keys.
        """
        name = self.block_names[index]
        accepted = layer_parameters(name)
        options = {"dropout": self.dropout, **self.block_kwargs.get(name, {})}
        if "chunk_shift" in accepted:
            chunk_size = options.get("chunk_size", accepted["chunk_size"].default)
            # Alternates among layers of this name: in a hybrid they might all have even indices.
            earlier = self.block_names[:index].count(name)
            if isinstance(chunk_size, int):  # the layer's own check refuses anything else
                options.setdefault("chunk_shift", earlier % 2 * (chunk_size // 2))
        if "seed" in accepted:
            options.setdefault("seed", index)
        return options

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain dicts, lists, numbers and strings, for `from_dict`."""
        return {**asdict(self), "pattern": list(self.pattern)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Rebuild a config from what `to_dict` returned.

        Raises:
            ValueError: for an unknown key, or if a field without a default is missing.
        """
        valid = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(valid))
        if unknown:
            raise ValueError(
                f"ModelConfig: unknown keys {unknown}{closest(unknown[0], valid)} (valid keys are "
                f"{valid}). If a later version of longctx_layers wrote them, install that version"
            )
        required = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"ModelConfig: the keys {missing} are missing; add them")
        return cls(**values)


def _checked_pattern(pattern: Any, n_layers: int) -> tuple[str, ...]:
    if isinstance(pattern, str):
        pattern = (pattern,)
    if not isinstance(pattern, Iterable):
        raise TypeError(
            f"pattern: expected names of layers, got {pattern!r}; pass e.g. ('dpassm', 'vanilla')"
        )
    pattern = tuple(layer_name(name) for name in pattern)
    if not pattern:
        raise ValueError(f"pattern: expected at least one of the layers {list(LAYERS)}, got none")
    if len(pattern) > n_layers:
        raise ValueError(
            f"pattern: expected at most n_layers = {n_layers} names, got {len(pattern)}; "
            "the names beyond that would never be used"
        )
    return pattern


def _by_block_name(block_kwargs: Any, pattern: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    if not isinstance(block_kwargs, Mapping):
        raise TypeError(
            f"block_kwargs: expected a dict of options, got {block_kwargs!r}; "
            "pass e.g. {'window_size': 128}"
        )
    block_kwargs = {canonical_name(name): value for name, value in block_kwargs.items()}
    names = sorted(set(pattern))
    by_name = all(isinstance(options, Mapping) for options in block_kwargs.values())
    if len(names) == 1 and not (by_name and set(block_kwargs) <= set(LAYERS)):
        block_kwargs = {names[0]: block_kwargs}
    elif not (by_name and set(block_kwargs) <= set(names)):
        raise ValueError(
            f"block_kwargs: expected a dict of options for each of {names}, got "
            f"{dict(block_kwargs)}; pass options by name, {{{names[0]!r}: {{...}}}}"
        )
    return {name: _with_projection(dict(options)) for name, options in block_kwargs.items()}


def _with_projection(options: dict[str, Any]) -> dict[str, Any]:
    # In JSON they are dicts.
    if isinstance(options.get("projection"), Mapping):
        projection = dict(options["projection"])
        if isinstance(projection.get("rope_scaling"), Mapping):
            scaling = _built("rope_scaling", RopeScaling, projection["rope_scaling"])
            projection["rope_scaling"] = scaling
        options["projection"] = _built("projection", Projection, projection)
    return options


def _built(name: str, kind: Any, values: Mapping[str, Any]) -> Any:
    valid = [field.name for field in fields(kind)]
    if unknown := sorted(set(values) - set(valid)):
        hint = closest(unknown[0], valid)
        raise ValueError(f"{name}: unknown keys {unknown}{hint} (valid keys are {valid})")
    return kind(**values)
