"""Which checkpoint a run goes on from, and whether its config may."""

from pathlib import Path
from typing import Any, NamedTuple

from ..config.resume import check_resume, has_new_data
from ..config.schema import TrainConfig
from ..config.stages import Stage
from ..errors import CheckpointError, ConfigError
from ..mup.table import MuTable
from ..parallel.mesh import World
from .compatible import OF_DATA, check_pickles, check_same_contents, check_same_engine, check_same_model
from .find import Newest
from .meta import read_meta


def engine_identity(config: TrainConfig, world: World) -> dict[str, Any]:
    """What a checkpoint of this run can be resumed by: fsdp2 by any world size, zero by the same one and stage."""
    parallel = config.parallel
    if parallel.engine == "zero":
        return {"name": "zero", "stage": parallel.zero_stage, "world_size": world.size}
    return {"name": parallel.engine}


class Resumed(NamedTuple):
    """changes: of the config, as text. damaged: newer checkpoints that were passed over, and why."""

    checkpoint: Path
    meta: dict[str, Any]
    changes: list[str]
    damaged: dict[Path, str]


def find_resumed(
    config: TrainConfig,
    stage: Stage,
    newest: Newest,
    table: MuTable,
    fingerprints: dict[str, str],
    world: World,
) -> Resumed | None:
    """The newest undamaged checkpoint of the run folder, if there is one and this config may continue it. config: of
    the run. stage: the one that goes on from there."""
    checkpoint, damaged = newest
    first = config.data.first_step
    if checkpoint is None:
        if first:
            raise ConfigError(f"data.first_step is {first}, and a new run begins at step 0: leave it out")
        return None
    if not config.run.resume:
        folder = config.run.folder
        raise ConfigError(f"run.resume is false, but {folder} has checkpoints: use another run.name or remove them")
    meta = read_meta(checkpoint)
    check_same_engine(meta, engine_identity(config, world), checkpoint)
    check_pickles(meta, checkpoint, config.run.trust_pickles, "run.trust_pickles=true")
    if meta["step"] < first:
        raise CheckpointError(f"{checkpoint} is before step {first}, at which the data of data.first_step begin")
    changes = check_resume(meta["config"], config, meta["step"])
    check_same_model(meta, table.to_json(), checkpoint, rules=True)
    if has_new_data(config, meta["step"]) or stage.begins_with_other_data(meta["step"]):  # it has read none of them
        fingerprints = {part: value for part, value in fingerprints.items() if part not in OF_DATA}
    if meta["step"] == stage.first_step:  # the checkpoint is of the stage before
        fingerprints = {part: value for part, value in fingerprints.items() if part != "begin"}
    check_same_contents(meta, fingerprints, checkpoint)
    return Resumed(checkpoint, meta, changes, damaged)
