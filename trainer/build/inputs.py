"""What a run reads: its data, its encoders, its muP table, and the stage that it is in."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.debug import ensure_debug_assets

from ..collectives import first_on_rank_0
from ..config.resolve import Resolved, resolve
from ..config.schema import TrainConfig
from ..config.stages import Stage
from ..input.begin import begin_of
from ..input.encoding import Encoders
from ..input.training_data import TrainingData, is_debug
from ..mup.table import MuTable
from ..parallel.mesh import World
from ..recovery.skipped_ranges import SkippedRange, skipped_before
from .engine import build_mup_table


@dataclass(frozen=True)
class Inputs:
    """What a run reads, and what follows from its config."""

    whole: TrainConfig
    """The run's config, with all its stages; a checkpoint and config.yaml hold it."""
    stage: Stage
    resolved: Resolved
    world: World
    data: TrainingData
    encoders: Encoders
    table: MuTable
    skipped_ranges: tuple[SkippedRange, ...]

    @property
    def config(self) -> TrainConfig:
        """What this stage is trained with."""
        return self.stage.config

    @property
    def folder(self) -> Path:
        return self.whole.run.folder

    @property
    def fingerprints(self) -> dict[str, str]:
        """Identities of data and encoders, which a resumed run must find again."""
        return {**self.data.fingerprints, **self.encoders.fingerprints()}


def open_inputs(
    whole: TrainConfig,
    stage: Stage,
    world: World,
    fitting: float | None,
    skipped_ranges: tuple[SkippedRange, ...],
) -> Inputs:
    """fitting: see resolve. Raises ConfigError and DataError."""
    config = stage.config
    if is_debug(config.text_encoder.path) or is_debug(config.objective.repa_encoder):
        first_on_rank_0(world, ensure_debug_assets)
    resolved = resolve(config, world.size, fitting)
    data = TrainingData(
        config, resolved, world, begin_of(whole, stage.number, partial(skipped_before, skipped_ranges)), stage.aligned
    )
    return Inputs(
        whole=whole,
        stage=stage,
        resolved=resolved,
        world=world,
        data=data,
        encoders=Encoders(config, world, data.dataset, align=stage.aligned),
        table=build_mup_table(config),
        skipped_ranges=skipped_ranges,
    )
