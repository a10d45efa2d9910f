"""Is a run on track? Its validation losses beside what was forecast before it began."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from data.files import parse_json

from ..config.keys import flatten, key_class, plain
from ..config.schema import TrainConfig
from ..errors import ConfigError

FORECAST = "forecast.json"
OUTSIDE = 3
"""So many validations in a row outside the interval are told as a warning."""
_CAUSES = (
    "Likely causes: steps that were skipped or samples that could not be read (skipped_steps and bad_share in "
    "metrics.jsonl); data or encoders other than the rungs'; a width at which muP does not hold (launch/coord_check.py "
    "and launch/ladder.py at this width); or a law that bends beyond its largest rung"
)


class Expected(NamedTuple):
    """What is forecast of a step: the loss, and the ends of its 90 % interval."""

    step: int
    loss: float
    low: float
    high: float


def facts(config: TrainConfig) -> dict[str, Any]:
    """The keys that say what is learned, from what, and how: of class identity and schedule."""
    flat = flatten(plain(config))
    return {key: value for key, value in flat.items() if key_class(key) != "runtime" and not key.startswith("run.")}


def bank_of(meta: Mapping[str, Any]) -> dict[str, str]:
    """Identity of the validation samples of a run, by what its checkpoints carry."""
    return {"validation samples": str(meta["validation"])}


class Track:
    """The course that a forecast gives to a run."""

    def __init__(
        self,
        course: Sequence[Expected],
        source: Path,
        optimum: tuple[float, float] | None = None,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        """source: its forecast.json. optimum: parameters and images that are best for the run's compute, where
        that is known. fingerprints: identities of the rungs' data, encoders and validation samples."""
        self.course, self.source, self.optimum = course, source, optimum
        self._fingerprints = fingerprints or {}
        self._outside = 0

    @classmethod
    def of(cls, config: TrainConfig) -> "Track | None":
        """As run.forecast or the run folder names it. Raises ConfigError where it is damaged, was refused, or is of
        another config than this."""
        path = Path(config.run.forecast) if config.run.forecast is not None else config.run.folder / FORECAST
        if config.run.forecast is None and not path.is_file():
            return None
        found = read_forecast(path)
        remedy = "remove the file" if config.run.forecast is None else "set run.forecast=null"
        if config.stages:
            raise ConfigError(f"{path} forecasts a run of one stage, and this one has {len(config.stages)}: {remedy}")
        if found["refused"]:
            raise ConfigError(f"{path} was refused when it was made ({'; '.join(found['reasons'])}): {remedy}")
        now, then = facts(config), found["target"]
        differ = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
        if differ := [key for key in differ if key != "train.seed"]:
            lines = [f"  {key}: {then.get(key)} in the forecast, {now.get(key)} now" for key in differ]
            raise ConfigError(
                "\n".join([f"{path} is the forecast of another run:", *lines])
                + f"\nFit it anew for this config (launch/forecast.py fit), or {remedy}."
            )
        optimum = found["optimal_parameters"], found["optimal_images"]
        return cls(found["course"], path, None if None in optimum else optimum, found["fingerprints"])

    def notes(self, fingerprints: Mapping[str, str]) -> list[str]:
        """Warnings where a run reads or measures other data, or with other encoders, than the rungs did."""
        pairs = {key: (value, fingerprints.get(key)) for key, value in self._fingerprints.items()}
        other = [f"{key}: {then} there, {now} now" for key, (then, now) in pairs.items() if then != now]
        told = f"warning: other data, encoders or validation samples than those of the rungs of {self.source}: "
        return [told + "; ".join(other)] if other else []

    def at(self, step: int) -> Expected | None:
        """What is forecast of a step, between two of the course by their logarithms; None where it says nothing, as of
        the decay, which leads from the last but one to the last."""
        for before, after in pairwise(self.course[:-1]):
            if before.step < step < after.step:
                share = math.log(step / before.step) / math.log(after.step / before.step)
                between = (math.exp((1 - share) * math.log(a) + share * math.log(b)) for a, b in _ends(before, after))
                return Expected(step, *between)
        return next((each for each in self.course if each.step == step), None)

    def resume(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Count on from what the run has logged before."""
        self._outside = 0
        for record in records:
            if "forecast/loss" in record:
                self._count(record["forecast/low"] <= record["val_loss_ema"] <= record["forecast/high"])

    def follow(self, step: int, loss: float, tell: Callable[[str], None]) -> dict[str, float]:
        """Tell how a validation loss lies, and warn where OUTSIDE in a row lie outside. Returns what metrics.jsonl has
        of it, {} where nothing is forecast."""
        expected = self.at(step) if step else None
        if expected is None:
            return {}
        inside = expected.low <= loss <= expected.high
        where = "inside" if inside else "below" if loss < expected.low else "above"
        text = f"forecast {expected.loss:.4g} [{expected.low:.4g}, {expected.high:.4g}], now {loss:.4g}: {where}"
        self._count(inside)
        if self._outside == OUTSIDE:
            text += f"\nwarning: {OUTSIDE} validations in a row lie outside the forecast of {self.source}. {_CAUSES}"
        tell(text)
        return {"forecast/loss": expected.loss, "forecast/low": expected.low, "forecast/high": expected.high}

    def _count(self, inside: bool) -> None:
        self._outside = 0 if inside else self._outside + 1


def read_forecast(path: Path) -> dict[str, Any]:
    """forecast.json as plain data. Raises ConfigError where it is not there, or is none."""
    try:
        found = parse_json(path.read_bytes())
        course = [Expected(int(step), *map(float, rest)) for step, *rest in found["course"]]
        if not all(0 < each.low <= each.loss <= each.high < math.inf for each in course):
            raise ValueError("an interval is none")
        if type(found["refused"]) is not bool or not isinstance(found["target"], dict):
            raise ValueError("refused and target are not what a forecast has")
        for key in ("optimal_parameters", "optimal_images"):
            found[key] = None if found[key] is None else float(found[key])
        found["fingerprints"] = {str(key): str(value) for key, value in found["fingerprints"].items()}
        return {**found, "course": sorted(course), "reasons": [str(reason) for reason in found["reasons"]]}
    except OSError as error:
        raise ConfigError(f"run.forecast: {path} cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path} is no forecast of launch/forecast.py fit ({error}): make it again") from None


def _ends(before: Expected, after: Expected) -> list[tuple[float, float]]:
    return list(zip(before[1:], after[1:], strict=True))
