"""What a coordinate check trains: a config at one width, built as training builds it."""

from collections.abc import Sequence

from torch import Tensor

from ..build.engine import (
    build_alignment,
    build_engine,
    build_mup_table,
    build_objective,
    build_route,
    units_of,
)
from ..config.load import load_config
from ..config.resolve import compiles, resolve
from ..config.schema import TrainConfig
from ..input.encoding import Encoders
from ..input.training_data import TrainingData
from ..mup.table import MuTable
from ..parallel.mesh import World
from ..step import micro_batch_losses
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
    """The config of one run of the check, in fp32 and not compiled unless the overrides say otherwise: bf16 would round
    small changes away, and layers inside of compiled blocks cannot be followed. lr: of AdamW; Muon's is as many times
    the overrides' own."""
    asked = load_config(name, overrides).optim
    forced = [
        "data.shards=synthetic",
        "train.micro_batch_size=null",
        f"train.global_batch_size={batch}",
        f"train.seed={seed}",
        f"model.width={width}",
        f"optim.lr={lr}",
        *([f"optim.muon.lr={asked.muon.lr * lr / asked.lr}"] if asked.kind == "muon" else []),
        *([f"mup.parametrization={parametrization}"] if parametrization else []),
    ]
    return load_config(name, ["parallel.precision=fp32", "parallel.compile=false", *overrides, *forced])


def without_repa(name: str, overrides: Sequence[str]) -> list[str]:
    """The overrides, and one that leaves the alignment out unless they set its weight: the cosine in its loss makes the
    size of the steps depend on the features, here noise, and the slopes are no longer those of the rules."""
    asked = any(text.startswith("objective.repa_weight=") for text in overrides)
    if asked or not load_config(name, overrides).objective.repa_weight:
        return list(overrides)
    print("without REPA (give objective.repa_weight=... to check it as well)", flush=True)
    return [*overrides, "objective.repa_weight=0"]


def build_subject(config: TrainConfig, world: World, table: MuTable | None = None) -> Subject:
    """Model, optimizer and the fixed batch, as training builds them. table: used in place of the config's own."""
    resolved = resolve(config, world.size)
    table = build_mup_table(config) if table is None else table
    engine = build_engine(config, table, world)
    objective = build_objective(config, resolved)
    _, (batch,) = next(iter(TrainingData(config, resolved, world).batches(0)))
    encoders = Encoders(config, world)
    encoded, alignment, route = encoders.encode(batch), build_alignment(config, encoders), build_route(config)
    features = alignment and alignment.features(batch)

    def loss() -> Tensor:
        losses = micro_batch_losses(engine.model, objective, alignment, encoded, features, route)
        return losses.total / config.train.global_batch_size

    def update(value: Tensor) -> None:
        engine.backward(value, last=True)
        engine.step(config.optim.lr)

    observed = observe(engine.model, units_of(engine), compiles(config, on_gpu=world.device.type == "cuda"))
    return Subject(engine.model, table, observed, loss, update, engine.full)
