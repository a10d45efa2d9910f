"""What a coordinate check trains: a config at one width, built as training builds it."""

from collections.abc import Sequence

from torch import Tensor

from ..build.engine import build_alignment, build_engine, build_mup_table, build_objective
from ..config.load import load_config
from ..config.resolve import resolve
from ..config.schema import TrainConfig
from ..input.encoding import Encoders
from ..input.training_data import TrainingData
from ..mup.table import MuTable
from ..parallel.mesh import World
from .slopes import Subject, observe


def check_config(
    name: str,
    overrides: Sequence[str],
    width: int,
    seed: int,
    lr: float,
    batch: int,
    parametrization: str | None = None,
) -> TrainConfig:
    """The config of one run of the check. fp32 unless asked otherwise: bf16 would round small changes away."""
    forced = [
        "data.shards=synthetic",
        "train.micro_batch_size=null",
        f"train.global_batch_size={batch}",
        f"train.seed={seed}",
        f"model.width={width}",
        f"optim.lr={lr}",
        *([f"mup.parametrization={parametrization}"] if parametrization else []),
    ]
    return load_config(name, ["parallel.precision=fp32", *overrides, *forced])


def without_repa(name: str, overrides: Sequence[str]) -> list[str]:
    """Overrides that leave the alignment out unless they set its weight: the cosine in its loss makes the steps' size
    depend on what is aligned with, here noise, and the check's slopes are no longer those of the rules."""
    asked = any(text.startswith("objective.repa_weight=") for text in overrides)
    if asked or not load_config(name, overrides).objective.repa_weight:
        return list(overrides)
    print("without REPA (give objective.repa_weight=... to check it as well)", flush=True)
    return [*overrides, "objective.repa_weight=0"]


def build_subject(config: TrainConfig, world: World, table: MuTable | None = None) -> Subject:
    """Model, optimizer and the fixed batch, as training would build them. table: another one than the config's."""
    resolved = resolve(config, world.size)
    table = build_mup_table(config) if table is None else table
    engine = build_engine(config, table, world)
    objective = build_objective(config, resolved)
    _, (batch,) = next(iter(TrainingData(config, resolved, world).batches(0)))
    frozen = Encoders(config, world)
    encoded, align = frozen.encode(batch), build_alignment(config, frozen)
    draw = objective.draw(encoded.x0, encoded.keys)

    def loss() -> Tensor:
        features_at = None if align is None else align.features_at
        prediction, projected = engine.model(draw.x_t, draw.t, encoded.condition, features_at=features_at)
        losses = objective.loss(prediction, draw)
        if align is not None:
            losses = losses + align.weight * align.losses(projected, batch)
        return (encoded.weight * losses).sum() / config.train.global_batch_size

    def update(value: Tensor) -> None:
        engine.backward(value, last=True)
        engine.step(config.optim.lr)

    units = engine.model.shard_units()
    observed = observe(engine.model, units, config.parallel.compile)
    return Subject(engine.model, table, observed, loss, update, engine.full)
