"""Trust-region random search: points in a box about the best trial, which shrinks where nothing better is found.

For many keys at once, such as a factor for each kind of module (Complete(d)P, arXiv 2512.22382): the first trial is a
good point already, a better one lies near it, and beyond some values training diverges without a warning in the losses
before. A model of the losses would have to bend over that cliff; a box needs no model. The sizes below are ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from ..config.yaml_files import nearest
from .space import FACTORS, Dimension, Point, Value, as_value, uniform

FIRST_SIDE = 0.5
"""Of the box, as a share of each range."""
LEAST_SIDE = 1 / 16
"""Below it the noise of a loss would choose the best trial."""
GROWTH = 1.5
"""Of the side, after a trial that is better than all before."""
MISSES = 5
"""So many trials in a row without a better one halve the side."""
CLIFF = 2
"""So many misses a diverged trial counts as: it is farther off than one that is merely no better."""
ATTRIBUTE = "trust_region"
"""Of a trial: the box that it was drawn from."""


@dataclass(frozen=True)
class Box:
    """Where the next point is drawn."""

    centre: int | None = None
    """Number of the best trial; None while none is complete, when the centre is the start."""
    side: float = FIRST_SIDE
    """As a share of each range: of its logarithm where that is what is uniform."""


def box_after(trials: Sequence[FrozenTrial]) -> Box:
    """The box that finished trials leave, taken in the order of their numbers, whoever ran them and when they ended.

    While none is complete it stays as it is: nothing is known to be a good centre.
    """
    box, best, misses = Box(), math.inf, 0
    for trial in sorted(trials, key=lambda t: t.number):
        complete = trial.state == TrialState.COMPLETE  # a pruned one has a value, too: its last loss
        if complete and trial.value is not None and trial.value < best:
            side = box.side if box.centre is None else min(1.0, box.side * GROWTH)
            box, best, misses = Box(trial.number, side), trial.value, 0
        elif box.centre is not None:
            diverged = trial.state == TrialState.FAIL or trial.user_attrs.get("outcome") == "diverged"
            misses += CLIFF if diverged else 1
            if misses >= MISSES:
                box, misses = Box(box.centre, max(LEAST_SIDE, box.side / 2)), 0
    return box


def draw(space: Sequence[Dimension], centre: Point, side: float, seed: int, number: int) -> Point:
    """A point that is uniform in the part of the box about `centre` that lies within the ranges."""
    return {d.key: _near(d, centre[d.key], side, uniform(f"{seed}/{number}/{d.key}")) for d in space}


def _near(dimension: Dimension, value: Value, side: float, u: float) -> Value:
    """The value at u in [0, 1) of an interval about `value`; of choices, which have no neighbours, it is kept unless u
    is below `side`, and else one of them."""
    if dimension.scale == "choices":
        return dimension.at(u / side) if u < side else value
    centre, half = dimension.place(value), max(side / 2, dimension.step)  # the next whole number is within reach
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return dimension.at(low + (high - low) * u)


class TrustRegionSampler(optuna.samplers.BaseSampler):
    """Trial 0 is `start`, every other one is drawn from the box that the trials which had finished leave.

    What it draws follows from (seed, number of the trial, finished trials) alone. The box is stored with the trial, so
    that one whose worker died while it took it is drawn from the same again.
    """

    def __init__(self, space: Sequence[Dimension], start: Point, seed: int) -> None:
        self._space, self._start, self._seed = space, start, seed

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {d.key: d.distribution() for d in self._space}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if trial.number == 0:
            return self._start
        trials = study.get_trials(deepcopy=False)
        if (stored := trial.user_attrs.get(ATTRIBUTE)) is None:
            box = box_after([t for t in trials if t.state.is_finished()])
            study._storage.set_trial_user_attr(trial._trial_id, ATTRIBUTE, asdict(box))
        else:
            box = Box(**stored)
        centre = self._start if box.centre is None else trials[box.centre].params
        return draw(self._space, centre, box.side, self._seed, trial.number)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise ValueError(f"{param_name} of trial {trial.number} was drawn outside its range")


def parse_start(
    given: Mapping[Any, Any], space: Sequence[Dimension], own: Mapping[str, Any]
) -> tuple[Point, list[str]]:
    """The first point: the values that are given, else the proxy's own, by key; and the problems, one line each."""
    keys = [d.key for d in space]
    own = {key: 1.0 for key in keys if key.startswith(FACTORS)} | dict(own)  # of a factor that no config gives
    problems = [
        f"start.{key}: no key of the space{nearest(str(key), keys)}; what is not searched belongs to overrides"
        for key in given
        if key not in keys
    ]
    start: Point = {}
    for d in space:
        if d.key not in given and d.key not in own:
            continue  # no config has this key, which the config's own check says
        value = as_value(given.get(d.key, own.get(d.key)))
        if (held := _held(d, value)) is None:
            origin = "" if d.key in given else " (the proxy's own value)"
            problems.append(
                f"start.{d.key} {value}{origin} is not in space.{d.key}.{d.scale} {list(d.values)}: give "
                f"start: {{{d.key}: ...}} or another range"
            )
        else:
            start[d.key] = held[0]
    return start, problems


def _held(dimension: Dimension, value: Value) -> tuple[Value] | None:
    """The value as the dimension has it, which may be null; None where it does not."""
    if dimension.choices is not None:
        equal = [v for v in dimension.choices if v == value and isinstance(v, bool) == isinstance(value, bool)]
        return (equal[0],) if equal else None
    low, high = dimension.values
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    whole = not dimension.integer or value == int(value)
    return (value,) if whole and low <= value <= high else None  # pyright: ignore[reportOperatorIssue] (numbers)
