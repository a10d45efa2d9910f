"""A coordinate check from its settings to its verdict: a sweep over the width, beside the same sweep under SP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..config.load import load_config
from ..config.schema import TrainConfig
from ..parallel.mesh import open_world
from .slopes import FigureSlope, Judgement, Measured, judge, measure, shows_faults, strongest_control
from .subject import build_subject, check_config

MOST_LR = 2.0**-5


@dataclass(frozen=True)
class Settings:
    """What is checked, and how. lr: optim.lr of all runs; None: the config's, doubled until a fault would show."""

    config: str
    overrides: Sequence[str]
    widths: Sequence[int]
    steps: int
    seeds: int
    batch_size: int
    lr: float | None = None


class Checked(NamedTuple):
    """control: the strongest row of the SP control. lr: the one that was used."""

    report: Judgement
    control: FigureSlope | None
    parametrization: str
    lr: float


def check(asked: Settings) -> Checked:
    """Train at every width and judge the slopes. Raises ConfigError where a width does not fit the config."""

    def config_at(width: int, seed: int, lr: float, parametrization: str | None = None) -> TrainConfig:
        return check_config(asked.config, asked.overrides, width, seed, lr, asked.batch_size, parametrization)

    lr = load_config(asked.config, asked.overrides).optim.lr if asked.lr is None else asked.lr
    # Refuses a bad width before anything is trained.
    (parametrization,) = {config_at(width, 0, lr).mup.parametrization for width in asked.widths}
    with open_world(1) as world:

        def sweep(lr: float, parametrization: str | None) -> Measured:
            return measure(
                lambda w, s: build_subject(config_at(w, s, lr, parametrization), world),
                asked.widths,
                asked.seeds,
                asked.steps,
            )

        # At a rate so small that SP looks well a fault would be hidden. One much larger than it takes is beyond what
        # the rules speak of, which is the first order in what a step changes. How large that is depends on base width
        # and backbone.
        control = sweep(lr, "sp")
        while asked.lr is None and not shows_faults(control) and lr < MOST_LR:
            lr *= 2
            control = sweep(lr, "sp")
        measured = control if parametrization == "sp" else sweep(lr, None)
    return Checked(judge(measured, control), strongest_control(control), parametrization, lr)
