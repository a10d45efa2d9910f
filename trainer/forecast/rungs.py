"""The rungs of a forecast: narrow models with the target's hyperparameters, each trained for several durations.

Every width and seed is one trunk, with a branch for each duration (trainer/search/trunks.py).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..build.engine import build_mup_table
from ..config.load import load_config
from ..config.schema import TrainConfig
from ..errors import ConfigError
from ..monitor.records import read_metrics
from ..search.trunk_worker import has_diverged, open_folder, recorded_steps
from ..search.trunks import OBJECTIVE, Trunks

_TRUNK = re.compile(r"width_(?P<width>\d+)_seed_(?P<seed>\d+)")


@dataclass(frozen=True)
class Trunk:
    """A run at a constant rate: the k-th seed of a width."""

    width: int
    seed: int

    @property
    def name(self) -> str:
        return f"width_{self.width:05d}_seed_{self.seed}"


@dataclass(frozen=True)
class Rungs(Trunks[Trunk]):
    """What is trained: the target's config with its overrides, at each width, for each number of steps, so many
    seeds."""

    RECORD = "rungs.json"
    OTHERS = ("the rungs of another target", "Use another run.name.")
    config: str
    overrides: tuple[str, ...]
    widths: tuple[int, ...]
    steps: tuple[int, ...]
    seeds: int

    @classmethod
    def of(cls, config: str, overrides: Sequence[str], widths: str, steps: str, seeds: int) -> "Rungs":
        """From what a person types. Raises ConfigError for what no forecast can be fitted to."""
        rungs = cls(config, tuple(overrides), _numbers("--widths", widths), _numbers("--steps", steps), seeds)
        target = rungs.target
        if seeds < 1:
            raise ConfigError(f"--seeds must be at least 1, got {seeds}")
        if len(rungs.widths) < 3 or len(rungs.steps) < 2 or len(rungs.widths) * len(rungs.steps) < 7:
            raise ConfigError(
                f"a law of five coefficients needs at least three widths, two durations and seven points, got widths "
                f"{widths} and steps {steps}"
            )
        if not target.train.validate_every:
            raise ConfigError("a forecast is of the validation loss: the config needs train.validate_every")
        rungs.check(f"--steps {rungs.steps[0]}")
        for trunk in rungs.trunks():
            rungs.trunk_config(trunk, rungs.steps[0])  # refuses a wrong width before anything runs
        return rungs

    @classmethod
    def found(cls, config: str, overrides: Sequence[str]) -> "Rungs":
        """All that lie in the target's folder. Raises ConfigError where there are none, or they are of another
        target."""
        folder = forecast_folder(load_config(config, overrides))
        matches = [_TRUNK.fullmatch(path.name) for path in folder.glob("width_*")]
        trunks = {(int(match["width"]), int(match["seed"])) for match in matches if match}
        steps = recorded_steps(folder / cls.RECORD) if trunks else ()
        if not steps:
            raise ConfigError(f"{folder} holds no rungs: python launch/forecast.py run --config {config} ... first")
        widths, seeds = tuple(sorted({width for width, _ in trunks})), 1 + max(seed for _, seed in trunks)
        rungs = cls(config, tuple(overrides), widths, steps, seeds)
        open_folder(rungs)
        return rungs

    @property
    def target(self) -> TrainConfig:
        """The config of the run that is forecast. Raises ConfigError where it has stages."""
        target = load_config(self.config, self.overrides)
        if target.stages:
            raise ConfigError("a forecast is of a run of one stage, whose rungs differ in train.steps: add stages=[]")
        return target

    @property
    def folder(self) -> Path:
        return forecast_folder(self.target)

    def trunks(self) -> Iterator[Trunk]:
        """One whole set of widths after another: after the first seed there is something to fit."""
        for seed in range(self.seeds):
            for width in self.widths:
                yield Trunk(width, seed)

    def trunk_config(self, trunk: Trunk, steps: int) -> TrainConfig:
        """The trunk up to step `steps`. It measures as often as gives four values within the shortest run."""
        own = [
            *self.trunk_overrides(trunk, trunk.seed, steps), f"model.width={trunk.width}",
            f"train.validate_every={max(1, self.steps[0] // 4)}",
        ]  # fmt: skip
        set_here = {text.partition("=")[0] for text in own}
        return load_config(self.config, [*(t for t in self.overrides if t.partition("=")[0] not in set_here), *own])

    def identity(self) -> dict[str, Any]:
        """More widths and seeds may come, and the target's own width may change."""
        return self.identity_of(self.trunk_config(Trunk(self.widths[0], 0), self.steps[0]), ("model.width",))


def forecast_folder(target: TrainConfig) -> Path:
    """Where the rungs of a target lie."""
    return Path(target.run.dir) / f"{target.run.name}_forecast"


# -------------------------------------------------------------------------------------------------------- what came out


@dataclass(frozen=True)
class Point:
    """A rung: its size, its images, and the EMA weights' loss on the fixed bank, also by noise level. A run that has
    diverged has an infinite loss."""

    width: int
    steps: int
    seed: int
    parameters: int
    images: int
    loss: float
    by_level: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])


def parameters_of(config: TrainConfig) -> int:
    """Parameters of a config's model."""
    return sum(math.prod(row.shape) for row in build_mup_table(config).rows.values())


def read_points(rungs: Rungs) -> list[Point]:
    """The branches that are finished, or have diverged. Raises ConfigError where they were measured on different
    validation samples."""
    points, sets = [], set[str]()
    for trunk in rungs.trunks():
        config = rungs.trunk_config(trunk, rungs.steps[0])
        parameters, batch = parameters_of(config), config.train.global_batch_size
        for steps in rungs.steps:
            folder, of_trunk = rungs.branch_folder(trunk, steps), rungs.folder / trunk.name / "trunk"
            last = [each for each in _validations(folder) if each["step"] == steps]
            if has_diverged(folder) or (has_diverged(of_trunk) and not folder.is_dir()):
                points.append(Point(trunk.width, steps, trunk.seed, parameters, steps * batch, math.inf))
            elif last:
                sets.add(str(last[-1].get("val_set")))
                points.append(_point(trunk, parameters, batch, last[-1]))
    if len(sets) > 1:
        raise ConfigError(
            f"{rungs.folder}: its rungs were measured on {len(sets)} different sets of validation samples, whose "
            "losses do not compare: remove the older trunks and run them again"
        )
    return points


def read_stable_points(rungs: Rungs) -> list[Point]:
    """What the trunks measured while their rate was constant, from twice the warm-up on."""
    points = []
    for trunk in rungs.trunks():
        config = rungs.trunk_config(trunk, rungs.steps[0])
        parameters, batch = parameters_of(config), config.train.global_batch_size
        for record in _validations(rungs.folder / trunk.name / "trunk"):
            if record["step"] > 2 * rungs.warmup_steps:
                points.append(_point(trunk, parameters, batch, record))
    return points


def _validations(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(folder) if OBJECTIVE in record]


def _point(trunk: Trunk, parameters: int, batch: int, record: Mapping[str, Any]) -> Point:
    loss, steps = record[OBJECTIVE], record["step"]
    by_level = {k.removeprefix(f"{OBJECTIVE}_"): v for k, v in record.items() if k.startswith(f"{OBJECTIVE}_t")}
    finite = loss if math.isfinite(loss) else math.inf
    return Point(trunk.width, steps, trunk.seed, parameters, steps * batch, finite, by_level)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        numbers = ()
    if not numbers or numbers[0] < 1:
        raise ConfigError(f"{option} takes whole numbers with commas between, got {text!r}")
    return numbers
