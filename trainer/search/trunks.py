"""Runs of several durations from one: a trunk, whose learning rate stays constant, and a branch for each duration.

A branch leaves the trunk where its decay begins (warm-up, stable, decay: arXiv 2405.18392). So many durations cost
little more than the longest.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from ..config.load import load_config
from ..config.schema import TrainConfig
from ..errors import ConfigError
from ..forecast.track import facts

OBJECTIVE = "val_loss_ema"
DECAY_SHARE = 0.2  # of a run's steps, where the target's schedule does not say
_SHORTEST_EMA = 10  # steps that an average spans at least


class Trunk(Protocol):
    """A run at a constant rate."""

    @property
    def name(self) -> str:
        """Of its folder."""
        ...


T = TypeVar("T", bound=Trunk)


class Trunks(ABC, Generic[T]):
    """Trunks in a folder, each with the same branches. steps: the durations, from the shortest on."""

    RECORD: ClassVar[str]
    """The file in the folder that says what the trunks are of."""
    OTHERS: ClassVar[tuple[str, str]]
    """What a folder holds where its trunks are others, and what to do then, for a person."""
    steps: tuple[int, ...]

    @property
    @abstractmethod
    def target(self) -> TrainConfig:
        """The config whose schedule, average and seed the trunks follow."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Of all trunks."""

    @abstractmethod
    def trunks(self) -> Iterator[T]:
        """In the order in which they are trained."""

    @abstractmethod
    def trunk_config(self, trunk: T, steps: int) -> TrainConfig:
        """The trunk up to step `steps`."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the trunks are of, as JSON data: `config`, by key, and more."""

    @property
    def warmup_steps(self) -> int:
        """The target's, but at most a quarter of the shortest run."""
        return min(self.target.optim.warmup_steps, self.steps[0] // 4)

    def branch_folder(self, trunk: T, steps: int) -> Path:
        return self.folder / trunk.name / f"steps_{steps:08d}"

    def branch_config(self, trunk: T, steps: int) -> TrainConfig:
        """The branch, as `branch` has written it."""
        return load_config(str(self.branch_folder(trunk, steps) / "config.yaml"))

    def branch_overrides(self, steps: int) -> list[str]:
        """What a branch changes of its trunk: it ends at `steps`, to which its rate falls to 0."""
        return [
            f"train.steps={steps}", "optim.schedule=wsd", f"optim.decay_steps={decay_steps(self.target, steps)}",
            f"train.validate_every={steps}", f"ema.decays=[{ema_decay(self.target, steps)}]",
        ]  # fmt: skip

    def trunk_overrides(self, trunk: T, seed: int, steps: int) -> list[str]:
        """What every trunk changes of the target. seed: added to the target's."""
        return [
            f"run.dir={self.folder / trunk.name}", "run.name=trunk", "run.resume=true", "run.keep_last=1",
            "run.keep_every=0", "run.allow_change=[train.steps]", f"train.seed={self.target.train.seed + seed}",
            f"train.steps={steps}", "train.checkpoint_every=0", "train.sample_every=0", "train.evaluate_every=0",
            "train.ema_snapshot_every=0", f"optim.warmup_steps={self.warmup_steps}", "optim.schedule=constant",
            "optim.decay_steps=0", f"ema.decays=[{','.join(map(str, self._ema_decays()))}]", "run.forecast=null",
        ]  # fmt: skip

    def _ema_decays(self) -> list[float]:
        """Of a trunk: the longest run's first, by which it is measured, and those with which its branches go on."""
        return list(dict.fromkeys(ema_decay(self.target, steps) for steps in reversed(self.steps)))

    def identity_of(self, config: TrainConfig, free: Collection[str]) -> dict[str, Any]:
        """config: of a trunk. free: keys of it that may differ, beside its steps and seed."""
        own = {key: value for key, value in facts(config).items() if key not in {"train.steps", "train.seed", *free}}
        share = decay_steps(self.target, self.target.train.steps) / self.target.train.steps
        durations = list(self.steps)  # a trunk has gone past where another one would begin its decay
        return {"config": own, "seed": self.target.train.seed, "decay_share": share, "durations": durations}

    def check(self, option: str) -> None:
        """Raise ConfigError where no run of the target has such branches. option: which gave the durations."""
        target, steps = self.target, self.steps[0]
        if target.parallel.engine != "fsdp2":
            raise ConfigError(f"branches leave a run, which parallel.engine={target.parallel.engine} cannot: fsdp2")
        if (first := steps - decay_steps(target, steps)) <= self.warmup_steps:
            raise ConfigError(f"{option}: the decay begins at {first}, within the warm-up of {self.warmup_steps}")


def decay_steps(target: TrainConfig, steps: int) -> int:
    """Steps of the decay of a run of `steps`: the target's share of them under wsd, else DECAY_SHARE."""
    optim = target.optim
    share = optim.decay_steps / target.train.steps if optim.schedule == "wsd" else DECAY_SHARE
    return max(1, round(share * steps))


def ema_decay(target: TrainConfig, steps: int) -> float:
    """An average that spans the same share of a run of `steps` as of the target's."""
    span = 1 / max(1e-9, 1 - target.ema.decays[0]) * steps / target.train.steps
    return round(1 - 1 / max(span, _SHORTEST_EMA), 9)
