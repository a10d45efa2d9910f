"""What trainer.estimate says of a benchmark before it runs: the rows that fit, and the time of a step. A MODEL."""

from typing import Any

from trainer.build.engine import build_mup_table
from trainer.config.schema import TrainConfig
from trainer.estimate.cluster import CARDS, Cluster
from trainer.estimate.memory import Memory
from trainer.estimate.report import timed
from trainer.estimate.simulation import profile
from trainer.estimate.step_time import Work, step_time


def card_named(device_name: str) -> str | None:
    """The card of trainer.estimate.cluster that a device is, by a part of its name; None where it is none."""
    return next((name for name in CARDS if name in device_name.lower()), None)


def rows_that_fit(config: TrainConfig, usable: int, models: int) -> int:
    """The most rows of a micro-batch for which `usable` bytes of a GPU do, while so many models are on it, of which one
    takes a step: a multiple of 8 from 8 on, 0 where not even one row fits.

    Makes a process group of its own, so there must be none yet.
    """
    memory = Memory(profile(config, 1), build_mup_table(config), 0, config.parallel)
    parts = memory.parts(1, 1, False)
    state = parts["parameters"] + parts["optimizer"] + parts["ema"]
    rows = memory.largest_rows(1, usable - (models - 1) * state, False)
    return rows if rows < 8 else rows // 8 * 8


def modelled_step(config: TrainConfig, card: str) -> dict[str, Any]:
    """A step of the config on one GPU, its latents and text states cached."""
    cluster = Cluster(1, CARDS[card])
    step = timed(config, cluster, step_time(config, cluster, Work(config)))
    return {"card": card, "step_time_s": step["step_s"], "images_per_s": step["images_per_s"], "mfu": step["mfu"]}
