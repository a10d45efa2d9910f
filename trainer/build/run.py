"""The composition root: config -> everything that a run needs. The only module that imports across the rooms."""

import json
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.config import Bucket
from data.debug import ensure_debug_assets
from data.errors import DataError
from models.flops import forward_flops

from ..checkpoint.compatible import check_same_model, check_weights_readable, lasting
from ..checkpoint.find import find_checkpoint, read_meta, set_aside, verify, weights_of
from ..checkpoint.resume import engine_identity, find_resumed
from ..checkpoint.write import Checkpointer
from ..collectives import first_on_rank_0, on_rank_0
from ..config.keys import plain
from ..config.load import to_yaml
from ..config.resolve import Resolved, image_tokens, resolve
from ..config.schema import TrainConfig
from ..ema import EMA
from ..evaluate.evaluation import prepare
from ..evaluate.generate import save_grid
from ..evaluate.metrics import MetricError
from ..evaluate.suite import load_suite
from ..evaluate.val_loss import validation
from ..files import lock_folder, write_atomically
from ..input.encoding import Encoders
from ..input.training_data import TrainingData, is_debug, validation_bank
from ..loop import restore
from ..lr_schedule import lr_factor
from ..monitor.metrics import Metrics, peak_flops
from ..monitor.mup_health import Health, WatchedParameter
from ..monitor.step_timer import StepTimer
from ..mup.table import MuTable
from ..parallel.engine import Engine
from ..parallel.mesh import World
from ..parallel.precision import precision_of
from ..provenance import commit
from ..recovery.skipped_ranges import read_skipped_ranges
from ..run import Plan, Run
from ..state import TrainState
from .engine import build_alignment, build_engine, build_mup_table, build_objective
from .inference import image_generator, sample_images

_PACKAGES = ("torch", "transformers", "diffusers", "numpy")


def build_run(config: TrainConfig, world: World) -> Run:
    """Everything for the loop. User's mistakes raise ConfigError, DataError or CheckpointError before the run
    folder is written."""
    resolved = resolve(config, world.size)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if is_debug(config.text_encoder.path) or is_debug(config.objective.repa_encoder):
        first_on_rank_0(world, ensure_debug_assets)
    source = TrainingData(config, resolved, world)
    frozen = Encoders(config, world, partial(on_rank_0, world), source.dataset, align=True)
    table = build_mup_table(config)
    fingerprints = {"data": source.fingerprint, **frozen.fingerprints()}
    assert config.run.name is not None
    folder = Path(config.run.dir) / config.run.name

    # An existing folder is held before it is read; a new one is made only when nothing can be wrong any more.
    lock = on_rank_0(world, lambda: lock_folder(folder) if folder.is_dir() else None)
    resumed = find_resumed(config, folder, table, fingerprints, world)
    skipped_ranges = read_skipped_ranges(folder)
    initial = None
    if resumed is None and config.run.init_from is not None:
        initial = find_checkpoint(Path(config.run.init_from))
        verify(initial, world.control)
        check_same_model(read_meta(initial), table.to_json(), initial, rules=False)
        check_weights_readable(read_meta(initial), initial)

    engine = build_engine(config, table, world)
    state = TrainState.start(world.device, config.optim.spike_threshold)
    state.skipped_ranges = skipped_ranges
    initial_weights = "model" if initial is None else weights_of(read_meta(initial))
    if initial is not None:
        engine.load_weights(initial, initial_weights, lasting(table.rows))
    ema = EMA(engine.master_shards(), config.ema.decays, config.ema.warmup)
    notes = [table.describe(), f"{folder}: {_count(table):.3g} B parameters, {world.size} processes"]
    if resumed is not None:
        checkpoint, meta, changes, damaged = resumed
        kept = [decay for decay in ema.decays if decay in meta["config"]["ema"]["decays"]]
        engine.load(checkpoint, {**ema.tensors(kept), **state.tensors()})
        ema.reset([decay for decay in ema.decays if decay not in kept])  # ema.decays may change on resume
        restore(state, meta, world.rank)
        notes = [
            *(f"warning: {reason}; renamed to .corrupt and passed over" for reason in damaged.values()),
            f"resuming {checkpoint}",
        ]
        notes += [f"changed: {change}" for change in changes]
    elif initial is not None:
        notes.append(f"weights from {initial} ({initial_weights})")

    bank = []
    if config.train.validate_every:
        bank = validation_bank(source.validation(), frozen.encode, config.data, world, notes)
    objective = build_objective(config, resolved)
    average = ema.shards[config.ema.decays[0]]

    def swapped() -> Any:
        return engine.swapped(average)

    write_grid = _grid_writer(config, source, frozen, engine, swapped, resolved, world)
    evaluate = _evaluator(config, frozen, engine, swapped, resolved, world)

    lock = on_rank_0(world, lambda: lock or lock_folder(folder))
    if world.rank == 0:
        write_atomically(folder / "config.yaml", to_yaml(config))
        write_atomically(folder / "mup.json", json.dumps(table.to_json(), indent=1))
        for checkpoint in resumed.damaged if resumed is not None else ():
            set_aside(checkpoint)
    metrics = Metrics(folder, world.rank == 0, config.train.steps, state.step)
    if config.wandb.project is not None:
        metrics.start_wandb(config.wandb.project, config.wandb.mode, config.run.name, plain(config))
    for note in notes:
        metrics.say(note)

    def sample(path: Path) -> None:
        with metrics.without_room(path):
            write_grid(path)

    def warn(text: str) -> None:
        metrics.say(text)
        metrics.status("running", state.step, text)

    return Run(
        plan=_plan(config, frozen.without_images, source.steps, world, metrics),
        world=world,
        folder=folder,
        engine=engine,
        ema=ema,
        health=Health(
            {name: WatchedParameter(row.role, config.optim.eps * row.eps) for name, row in table.rows.items()},
            replicas=world.size // resolved.shard,
        ),
        timer=StepTimer(engine.model.shard_units(), world),  # pyright: ignore[reportCallIssue, reportArgumentType]
        objective=objective,
        alignment=build_alignment(config, frozen),
        lr=lambda step: config.optim.lr * _lr_factor(config, step),
        batches=frozen.ahead(source.batches),
        encode=frozen.encode,
        validate=lambda: validation(engine.model, objective, bank, swapped),
        sample=sample,
        evaluate=evaluate,
        metrics=metrics,
        checkpointer=Checkpointer(
            folder,
            engine,
            world.checkpoint,
            config.run.keep_last,
            config.run.keep_every,
            config.train.checkpoint_async,
            warn,
        ),
        meta={
            "config": plain(config),
            "engine": engine_identity(config, world),
            "mup": table.to_json(),
            "fingerprints": fingerprints,
            "validation": source.validation_fingerprint if config.train.validate_every else None,
            "versions": {name: version(name) for name in _PACKAGES},
            "commit": commit(),
        },
        state=state,
        lock=lock,
    )


def _grid_writer(
    config: TrainConfig,
    source: TrainingData,
    frozen: Encoders,
    engine: Engine,
    swapped: Callable[[], Any],
    resolved: Resolved,
    world: World,
) -> Callable[[Path], None]:
    prompts = list(config.sample.prompts[: config.sample.count])
    if not prompts and config.train.sample_every and not frozen.without_images:
        prompts = source.validation_prompts(config.sample.count)
        if not prompts:
            raise DataError("no validation sample has a prompt for the sample grids: give sample.prompts")

    def write(path: Path) -> None:
        with swapped():
            images = sample_images(config, engine, frozen, resolved, world, prompts)
        if world.rank == 0:
            save_grid(images, path)
            write_atomically(path.parent / "prompts.txt", "".join(f"{prompt}\n" for prompt in prompts))

    return write


def _evaluator(
    config: TrainConfig,
    frozen: Encoders,
    engine: Engine,
    swapped: Callable[[], Any],
    resolved: Resolved,
    world: World,
) -> Callable[[], dict[str, Any]]:
    """Figures of train.evaluate_suite as metrics names them. What the suite needs is read now."""
    if not config.train.evaluate_every:
        return dict
    if frozen.without_images:
        raise DataError(f"train.evaluate_every needs images: {frozen.without_images}")
    _, suite = load_suite(config.train.evaluate_suite)
    suite = suite.model_copy(update={"vae": None, "precision": precision_of(config.parallel.precision, world.device)})
    generate = image_generator(suite.applied(config), engine, frozen, resolved)
    evaluation = prepare(suite, config.data.resolution, config.label_classes, world.device, world.control)

    def evaluate() -> dict[str, Any]:
        try:
            with swapped():
                images = {batch: evaluation.make(generate, batch) for batch, _ in evaluation.own_batches()}
            figures = evaluation.measure(lambda batch: evaluation.as_kept(images[batch]))
            return {f"val_{key}": score.value for key, score in figures.items()}
        except MetricError as error:  # constant images early, NaN after a divergence: no reason to stop
            return {"evaluation_error": str(error)} if world.rank == 0 else {}

    return evaluate


def _plan(
    config: TrainConfig, without_images: str | None, data_steps: int | None, world: World, metrics: Metrics
) -> Plan:
    train = config.train
    if without_images and train.sample_every:
        metrics.say(f"no sample grids: {without_images}")

    def image_flops(text_tokens: float, bucket: Bucket | None = None) -> float:
        forward = forward_flops(
            config.model,
            config.autoencoder.channels,
            config.text_encoder.width,
            image_tokens(config, bucket) if bucket else config.image_tokens,
            round(text_tokens),
            config.projector,
        )
        return 3.0 * forward

    peak = peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    return Plan(
        steps=train.steps,
        global_batch_size=train.global_batch_size,
        log_every=train.log_every,
        validate_every=train.validate_every,
        checkpoint_every=train.checkpoint_every,
        snapshot_every=train.ema_snapshot_every,
        sample_every=0 if without_images else train.sample_every,
        evaluate_every=train.evaluate_every,
        max_bad_share=config.data.max_bad_share,
        rollback_after=train.rollback_after,
        data_steps=data_steps,
        watchdog_factor=train.watchdog_factor,
        watchdog_min_s=train.watchdog_min_s,
        image_flops=image_flops,
        peak_flops=None if peak is None else peak * world.size,
    )


def _lr_factor(config: TrainConfig, step: int) -> float:
    optim = config.optim
    return lr_factor(step, optim.schedule, optim.warmup_steps, optim.decay_steps, config.train.steps)


def _count(table: MuTable) -> float:
    return sum(float(np.prod(row.shape)) for row in table.rows.values()) / 1e9
