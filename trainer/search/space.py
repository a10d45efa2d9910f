"""The space of a search: base hyperparameters with ranges, and the point that belongs to a trial's number."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from ..config.yaml_files import nearest
from ..errors import ConfigError

Scale = Literal["uniform", "log_uniform", "choices", "powers_of_two"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Sampler = Literal["random", "grid", "qmc", "tpe", "trust_region"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
ADAPTIVE: tuple[Sampler, ...] = ("tpe", "trust_region")
"""Those that look at the trials before, and so choose a point when it is asked for."""
Value = bool | int | float | str | None
Point = dict[str, Value]
FACTORS = "mup.factors."
"""Prefix of mup.factors.KIND.lr and the like, whose kinds stand in a config only where they are given."""

# Base hyperparameters: under muP their optimum does not move with the width. A prefix that ends in a dot stands for
# all keys below it.
TRANSFER = (
    "optim.lr", "optim.betas", "optim.eps", "optim.weight_decay", "optim.clip_norm", "optim.warmup_steps",
    "optim.muon.lr", "optim.muon.weight_decay", "optim.muon.momentum",
    "objective.repa_weight", "mup.output_multiplier", "mup.role_lr.", FACTORS,
)  # fmt: skip

# Why other keys are refused: the longest prefix counts.
_REASONS = {
    "model": "it makes another model, and muP transfers across width alone",
    "model.width": "it is what the proxy and its target differ in",
    "mup": "it is a rule of the transfer, which proxy and target share",
    "mup.base_width": "it is the width at which the base hyperparameters hold, which proxy and target share",
    "optim.kind": "losses of two optimizers compare at the best rates of each: search each alone",
    "optim.muon": "it is what Muon is, which proxy and target share",
    "optim": "it depends on the length of the run or guards it: give it in the config",
    "train": "it does not change what is learned, or it is the seed (see `seeds`)",
    "train.steps": "it is the budget of a trial, the same for all",
    "train.global_batch_size": "the best batch follows from budget and machine, and learning rates belong to a batch",
    "ema": "it changes how a trial is measured, not what it learns",
    "objective": "losses of different objectives do not compare",
    "data": "losses on different data do not compare",
    "text_encoder": "losses on different data do not compare",
    "autoencoder": "losses on different data do not compare",
}


@dataclass(frozen=True)
class Dimension:
    """One key and the values it may take. values: (low, high) of a range (exponents of powers_of_two), or choices."""

    key: str
    scale: Scale
    values: tuple[Value, ...]
    integer: bool = False

    @property
    def choices(self) -> tuple[Value, ...] | None:
        """All values, None of a continuous range."""
        if self.scale == "choices":
            return self.values
        if self.scale == "powers_of_two":
            low, high = (int(v) for v in self.values)  # pyright: ignore[reportArgumentType] (checked: two integers)
            return tuple(2**e if self.integer else 2.0**e for e in range(low, high + 1))
        return None

    @property
    def numeric(self) -> bool:
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.ends)

    @property
    def log(self) -> bool:
        """Whether distances are ratios: declared, or choices that are positive numbers and span a factor of 4."""
        if self.scale == "choices" and self.numeric:
            low, high = _numbers(self.ends)
            return low > 0 and high >= 4 * low
        return self.scale in ("log_uniform", "powers_of_two")

    @property
    def ends(self) -> tuple[Value, ...]:
        """Smallest and largest value; all choices where they have no order."""
        values = self.choices or self.values
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            ordered = sorted(values, key=lambda v: _numbers([v]))
            return ordered[0], ordered[-1]
        return values

    def at(self, u: float) -> Value:
        """The value at u in [0, 1), with four significant digits."""
        if self.choices is not None:
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        low, high = _numbers(self.values)
        value = low * (high / low) ** u if self.scale == "log_uniform" else low + (high - low) * u
        if self.integer:
            return round(value)
        return min(max(float(f"{value:.4g}"), low), high)

    def place(self, value: Value) -> float:
        """Where `at` has a value, in [0, 1]; of choices the middle of what gives this one."""
        if self.choices is not None:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        low, high, x = _numbers([*self.values, value])
        return math.log(x / low) / math.log(high / low) if self.scale == "log_uniform" else (x - low) / (high - low)

    @property
    def step(self) -> float:
        """How far apart neighbouring values are at least, as `place` counts; 0 of a continuous range."""
        if self.choices is not None:
            return 1 / len(self.choices)
        high = _numbers(self.values)[1]
        return self.place(high) - self.place(high - 1) if self.integer else 0.0

    def distribution(self) -> BaseDistribution:
        if self.choices is not None:
            return CategoricalDistribution(list(self.choices))
        low, high = _numbers(self.values)
        if self.integer:
            return IntDistribution(int(low), int(high), log=self.log)
        return FloatDistribution(low, high, log=self.log)


def at_the_ends(space: Sequence[Dimension], point: Point) -> list[str]:
    """A warning for each value of the best point at, or within 5 % of, an end of its range, beyond which a better one
    may lie. Of two choices both are ends, and say nothing."""
    found = []
    for dimension in space:
        if not dimension.numeric or (dimension.choices is not None and len(dimension.choices) < 3):
            continue
        low, high = _numbers(dimension.ends)
        value = _numbers([point[dimension.key]])[0]
        near = 0.0 if dimension.choices is not None else 0.05
        inner = (high / low) ** near if dimension.log else near * (high - low)
        lowest, highest = (low * inner, high / inner) if dimension.log else (low + inner, high - inner)
        if low < high and not lowest < value < highest:
            end = "lower" if value <= lowest else "upper"
            found.append(
                f"{dimension.key} {value:.4g} lies at the {end} end of its range ({low:.4g} to {high:.4g}): a better "
                "value may lie beyond; widen the range and search again"
            )
    return found


def _numbers(values: Sequence[Value]) -> list[float]:
    return [float(v) for v in values]  # pyright: ignore[reportArgumentType] (called on numbers)


def transfers(key: str) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in TRANSFER)


def refusal(key: str) -> str | None:
    """Why a key cannot be searched; None of a base hyperparameter."""
    if transfers(key):
        return None
    prefixes = [name for name in _REASONS if key == name or key.startswith(f"{name}.")]
    reason = _REASONS[max(prefixes, key=len)] if prefixes else "it does not change what is learned"
    keys = ", ".join(f"{name}*" if name.endswith(".") else name for name in TRANSFER)
    return f"space.{key} does not transfer: {reason}. Keys that do: {keys}"


def parse_space(data: Any, integer_keys: Sequence[str]) -> tuple[tuple[Dimension, ...], list[str]]:
    """{key: {scale: values}} -> dimensions, and the problems, one line each."""
    if not isinstance(data, Mapping) or not data:
        return (), ["space must name at least one key, as in `space: {optim.lr: {log_uniform: [1e-4, 1e-2]}}`"]
    dimensions, problems = [], []
    for key, entry in data.items():
        if not isinstance(entry, Mapping) or len(entry) != 1:
            problems.append(f"space.{key} must be one of {', '.join(f'{{{s}: [...]}}' for s in SCALES)}, got {entry!r}")
            continue
        [(scale, values)] = entry.items()
        if scale not in SCALES:
            problems.append(f"space.{key}.{scale} is none of {', '.join(SCALES)}{nearest(str(scale), SCALES)}")
        elif problem := _wrong_values(scale, values):
            problems.append(f"space.{key}.{scale} {problem}, got {values!r}")
        else:
            stored = tuple(as_value(v) for v in values)
            dimensions.append(Dimension(str(key), scale, stored, str(key) in integer_keys))
    return tuple(dimensions), problems


def _wrong_values(scale: Scale, values: Any) -> str | None:
    if scale == "choices":
        if not isinstance(values, list) or not values:
            return "must be a list of values"
        return "names a value twice" if len({json.dumps(v) for v in values}) < len(values) else None
    kind = int if scale == "powers_of_two" else int | float
    numbers = isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
    if not numbers or len(values) != 2 or values[0] >= values[1]:
        what = "exponents [low, high], whole numbers" if scale == "powers_of_two" else "[low, high]"
        return f"must be {what} with low < high"
    if scale == "log_uniform" and values[0] <= 0:
        return "must be positive"
    return None


def as_value(value: Any) -> Value:
    """A config's value as a point holds it: a list as text that reads back as a list."""
    return json.dumps(value) if isinstance(value, list | tuple) else value


def as_overrides(point: Mapping[str, Value]) -> list[str]:
    """`key=value` for the config; lists are stored as text that reads back as lists."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in point.items()]


def grid_size(space: Sequence[Dimension]) -> int:
    return math.prod(len(d.choices or ()) for d in space)


def point(space: Sequence[Dimension], sampler: Sampler, seed: int, number: int) -> Point | None:
    """The hyperparameters of a trial: a function of (seed, number) alone, so that nothing need be remembered.

    None under an adaptive sampler, which looks at the trials before.
    """
    match sampler:
        case "random":  # each key has its own stream: another key in the space leaves its values alone
            return {d.key: d.at(uniform(f"{seed}/{number}/{d.key}")) for d in space}
        case "qmc":
            sobol = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=seed)
            [u] = sobol.fast_forward(number).draw(1, dtype=torch.float64).tolist()
            return {d.key: d.at(min(x, 1 - 2.0**-53)) for d, x in zip(space, u, strict=True)}
        case "grid":
            values: Point = {}
            for d in reversed(space):  # the last key changes fastest
                assert d.choices is not None, "checked: a grid has choices"
                number, index = divmod(number, len(d.choices))
                values[d.key] = d.choices[index]
            return {d.key: values[d.key] for d in space}
        case "tpe" | "trust_region":
            return None


def uniform(text: str) -> float:
    """A number in [0, 1) from a text."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


def check_grid(space: Sequence[Dimension]) -> None:
    ranges = [d.key for d in space if d.choices is None]
    if ranges:
        raise ConfigError(f"sampler grid needs choices or powers_of_two: {', '.join(ranges)} is a range")
