"""The composition root of training: config -> everything that a run needs, one function for each phase."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data.debug import ensure_debug_assets
from data.errors import DataError
from models.attention import kernel_in_use

from ..checkpoint.compatible import check_usable, lasting
from ..checkpoint.find import find_checkpoint, set_aside, weights_of
from ..checkpoint.meta import read_meta
from ..checkpoint.resume import Resumed, engine_identity, find_resumed
from ..checkpoint.write import Checkpointer, clear_leftovers
from ..collectives import first_on_rank_0, from_rank_0, on_rank_0
from ..config.keys import plain
from ..config.load import to_yaml
from ..config.resolve import Resolved, resolve
from ..config.schema import TrainConfig
from ..ema import EMA
from ..errors import ConfigError
from ..evaluate.evaluation import prepare
from ..evaluate.generate import save_grid
from ..evaluate.metrics import MetricError
from ..evaluate.suite import load_suite
from ..evaluate.val_loss import validation
from ..files import Lock, lock_folder, write_atomically
from ..forecast.track import Track, bank_of
from ..input.encoding import Encoders
from ..input.stream import follow, prefetch
from ..input.training_data import TrainingData, is_debug, validation_bank
from ..lr_schedule import lr_factor
from ..monitor.metrics import Metrics, peak_flops
from ..monitor.mup_health import Health, WatchedParameter
from ..monitor.step_timer import StepTimer
from ..mup.table import MuTable
from ..parallel.cuda_graph import Recorder
from ..parallel.engine import Engine
from ..parallel.mesh import World
from ..parallel.precision import multiplies, precision_of, without_fp8
from ..provenance import commit
from ..recovery.skipped_ranges import read_skipped_ranges
from ..run import Intervals, Plan, Run
from ..state import TrainState
from ..step import MicroBatch
from .attention import attention_choice, describe
from .engine import base_rates, build_alignment, build_engine, build_mup_table, build_objective, units_of
from .float8 import check_fp8_is_compiled
from .flops import image_flops
from .inference import image_generator, sample_images
from .passes import build_passes, graph_recorder

_PACKAGES = ("torch", "transformers", "diffusers", "numpy")


def build_run(
    config: TrainConfig,
    world: World,
    hold: Callable[[Path], None] = lambda folder: None,
    fitting: float | None = None,
) -> Run:
    """Everything for the loop. User's mistakes raise ConfigError, DataError or CheckpointError before the run folder is
    written. hold: is called on rank 0 with the folder once no other run can have it. fitting: see resolve."""

    def lock_run(folder: Path) -> Lock:
        lock = lock_folder(folder)
        hold(folder)
        return lock

    _set_determinism(config)
    recorder = graph_recorder(config, world)
    check_fp8_is_compiled(config, world)
    inputs = _open_inputs(config, resolve(config, world.size, fitting), world)
    on_rank_0(world, lambda: _check_is_run_folder(inputs.folder))
    # An existing folder is held before it is read; a new one is made only when nothing can be wrong any more.
    lock = on_rank_0(world, lambda: lock_run(inputs.folder) if inputs.folder.is_dir() else None)
    track = from_rank_0(world, lambda: Track.of(config))
    start = _find_start(inputs)
    trained = _build_trained(inputs, start)
    notes = [*_describe(inputs, start), *describe(attention_choice(config, world))]
    notes += [*_slow_precision(config, world.device), *inputs.data.notes]
    if track is not None:
        bank = bank_of({"validation": inputs.data.validation_fingerprint})
        notes += track.notes({**inputs.fingerprints, **bank})
    side_jobs = _build_side_jobs(inputs, trained, notes)
    lock = on_rank_0(world, lambda: lock or lock_run(inputs.folder))
    metrics = _open_folder(inputs, start, trained.state.step, notes)
    if track is not None:
        side_jobs = side_jobs._replace(validate=_followed(track, side_jobs.validate, trained.state, metrics))
    return _assemble(inputs, trained, side_jobs, metrics, lock, recorder)


@dataclass(frozen=True)
class _Inputs:
    """What a run reads, and what follows from its config."""

    config: TrainConfig
    resolved: Resolved
    world: World
    folder: Path
    data: TrainingData
    encoders: Encoders
    table: MuTable

    @property
    def fingerprints(self) -> dict[str, str]:
        """Identities of data and encoders, which a resumed run must find again."""
        return {**self.data.fingerprints, **self.encoders.fingerprints()}


class _Start(NamedTuple):
    """Where the run begins: at a checkpoint of its own, at another run's weights, or at step 0 where both are None."""

    resumed: Resumed | None
    initial: Path | None


class _Trained(NamedTuple):
    """What is trained, and saved."""

    engine: Engine
    ema: EMA
    state: TrainState

    def with_averages(self, decay: float) -> Callable[[], AbstractContextManager[None]]:
        """A context in which the engine's model has the EMA weights."""
        return partial(self.engine.swapped, self.ema.shards[decay])


class _SideJobs(NamedTuple):
    """What a run does beside training; see Run."""

    validate: Callable[[], dict[str, float]]
    write_grid: Callable[[Path], None]
    evaluate: Callable[[], dict[str, Any]]


# --------------------------------------------------------------------------------------------------- what the run reads


def _set_determinism(config: TrainConfig) -> None:
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _open_inputs(config: TrainConfig, resolved: Resolved, world: World) -> _Inputs:
    if is_debug(config.text_encoder.path) or is_debug(config.objective.repa_encoder):
        first_on_rank_0(world, ensure_debug_assets)
    data = TrainingData(config, resolved, world)
    return _Inputs(
        config=config,
        resolved=resolved,
        world=world,
        folder=config.run.folder,
        data=data,
        encoders=Encoders(config, world, data.dataset, align=True),
        table=build_mup_table(config),
    )


def _check_is_run_folder(folder: Path) -> None:
    """Raise ConfigError where files that are not a run's would be written over."""
    if not (folder / "mup.json").exists() and not (folder / "checkpoints").exists():
        for name in ("config.yaml", "metrics.jsonl"):
            if (folder / name).exists():
                raise ConfigError(f"{folder} holds {name}, but no run: choose another run.name or run.dir")


def _find_start(inputs: _Inputs) -> _Start:
    config, table, world = inputs.config, inputs.table, inputs.world
    resumed = find_resumed(config, inputs.folder, table, inputs.fingerprints, world)
    if resumed is not None or config.run.init_from is None:
        return _Start(resumed, None)
    initial = find_checkpoint(Path(config.run.init_from), world.control)
    check_usable(read_meta(initial), table.to_json(), config.objective.predict, initial)
    return _Start(None, initial)


# -------------------------------------------------------------------------------------------------- what the run trains


def _build_trained(inputs: _Inputs, start: _Start) -> _Trained:
    """Weights, averages and state: new, or as `start` has them."""
    config, world = inputs.config, inputs.world
    skipped_ranges = read_skipped_ranges(inputs.folder)
    engine = build_engine(config, inputs.table, world)
    if start.initial is not None:
        engine.load_weights(start.initial, weights_of(read_meta(start.initial)), lasting(inputs.table.rows))
    ema = EMA(engine.master_shards(), config.ema.decays, config.ema.warmup)
    state = TrainState.start(world.device, config.optim.spike_threshold)
    state.skipped_ranges = skipped_ranges
    if start.resumed is not None:
        meta = start.resumed.meta
        kept = [decay for decay in ema.decays if decay in meta["config"]["ema"]["decays"]]
        engine.load(start.resumed.checkpoint, {**ema.tensors(kept), **state.tensors()})
        ema.reset([decay for decay in ema.decays if decay not in kept])  # ema.decays may change on resume
        state.restore(meta, world.rank)
    return _Trained(engine, ema, state)


def _describe(inputs: _Inputs, start: _Start) -> list[str]:
    """What the user is told about the start, once the run folder is there to hold it."""
    if start.resumed is not None:
        damaged = start.resumed.damaged.values()
        return [
            *(f"warning: {reason}; renamed to .corrupt and passed over" for reason in damaged),
            f"resuming {start.resumed.checkpoint}",
            *(f"changed: {change}" for change in start.resumed.changes),
            *_jumps(inputs, start.resumed.meta),
        ]
    billions = sum(float(np.prod(row.shape)) for row in inputs.table.rows.values()) / 1e9
    notes = [
        inputs.table.describe(base_rates(inputs.config)),
        f"{inputs.folder}: {billions:.3g} B parameters, {inputs.world.size} processes",
    ]
    if start.initial is not None:
        weights = weights_of(read_meta(start.initial))
        notes.append(f"weights from {start.initial} ({weights}), and nothing else: moments, EMA and data begin anew")
    return notes


def _slow_precision(config: TrainConfig, device: torch.device) -> list[str]:
    precision = precision_of(config.parallel.precision, device)
    if multiplies(precision, device):
        return []
    if precision == "fp8":
        return ["warning: a processor only emulates parallel.precision=fp8, for tests: bf16 and fp32 are faster here"]
    return [
        f"warning: this {'GPU' if device.type == 'cuda' else 'processor'} does not multiply {precision} itself: "
        "parallel.precision=fp32 is many times faster here"
    ]


def _jumps(inputs: _Inputs, meta: dict[str, Any]) -> Iterator[str]:
    """What breaks off at a resume although the config may change so."""
    step, (optim, train) = meta["step"], (meta["config"][section] for section in ("optim", "train"))
    if step:  # of a run that was at its end: its last rate
        at = min(step, train["steps"] - 1)
        before = optim["lr"] * lr_factor(
            at, optim["schedule"], optim["warmup_steps"], optim["decay_steps"], train["steps"]
        )
        now = _learning_rate(inputs.config, step)
        if not 0.9 * before <= now <= 1.1 * before:
            change = f"{now / before:.3g} times" if before else "from 0"
            yield f"warning: the learning rate jumps from {before:.3g} to {now:.3g} ({change}) at step {step}"
    validation = inputs.data.validation_fingerprint if inputs.config.train.validate_every else None
    if None not in (validation, meta["validation"]) and validation != meta["validation"]:
        yield (
            f"warning: other validation samples from step {step} on: losses before and after do not compare. val_set "
            "in metrics.jsonl tells them apart, and plots begin a new series"
        )


# ----------------------------------------------------------------------------------------- what it does beside training


def _build_side_jobs(inputs: _Inputs, trained: _Trained, notes: list[str]) -> _SideJobs:
    """Validation, sample grids and evaluation; what they need is read now."""
    config, encoders = inputs.config, inputs.encoders
    bank = []
    if config.train.validate_every:
        bank = validation_bank(inputs.data.validation(), encoders.encode, config.data, inputs.world, notes)
    with_averages = trained.with_averages(config.ema.decays[0])
    objective = build_objective(config, inputs.resolved)
    side_jobs = _SideJobs(
        validate=partial(validation, trained.engine.model, objective, bank, with_averages),
        write_grid=_grid_writer(inputs, trained.engine, with_averages),
        evaluate=_evaluator(inputs, trained.engine, with_averages),
    )
    if encoders.without_images and config.train.sample_every:
        notes.append(f"no sample grids: {encoders.without_images}")
    return side_jobs


def _grid_writer(
    inputs: _Inputs, engine: Engine, with_averages: Callable[[], AbstractContextManager[None]]
) -> Callable[[Path], None]:
    config, world = inputs.config, inputs.world
    generate = image_generator(config, engine, inputs.encoders, inputs.resolved)
    prompts = list(config.sample.prompts[: config.sample.count])
    if not prompts and config.train.sample_every and not inputs.encoders.without_images:
        prompts = inputs.data.validation_prompts(config.sample.count)
        if not prompts:
            raise DataError("no validation sample has a prompt for the sample grids: give sample.prompts")

    def write_grid(path: Path) -> None:
        with with_averages():
            images = sample_images(generate, world, prompts)
        if world.rank == 0:
            save_grid(images, path)
            write_atomically(path.parent / "prompts.txt", "".join(f"{prompt}\n" for prompt in prompts))

    return write_grid


def _evaluator(
    inputs: _Inputs, engine: Engine, with_averages: Callable[[], AbstractContextManager[None]]
) -> Callable[[], dict[str, Any]]:
    """Figures of train.evaluate_suite as metrics names them."""
    config, world, encoders = inputs.config, inputs.world, inputs.encoders
    if not config.train.evaluate_every:
        return dict
    if encoders.without_images:
        raise DataError(f"train.evaluate_every needs images: {encoders.without_images}")
    _, suite = load_suite(config.train.evaluate_suite)
    precision = without_fp8(precision_of(config.parallel.precision, world.device))
    suite = suite.model_copy(update={"vae": None, "precision": precision})
    generate = image_generator(suite.applied(config), engine, encoders, inputs.resolved)
    evaluation = prepare(suite, config.data.resolution, config.label_classes, world.device, world.control)

    def evaluate() -> dict[str, Any]:
        try:
            with with_averages():
                images = {batch: evaluation.make(generate, batch) for batch, _ in evaluation.own_batches()}
            figures = evaluation.measure(lambda batch: evaluation.as_kept(images[batch]))
            return {f"val_{key}": score.value for key, score in figures.items()}
        except MetricError as error:  # constant images early, NaN after a divergence: no reason to stop
            return {"evaluation_error": str(error)} if world.rank == 0 else {}

    return evaluate


# ---------------------------------------------------------------------------------------------- what the loop is handed


def _open_folder(inputs: _Inputs, start: _Start, step: int, notes: list[str]) -> Metrics:
    """Write the run folder, from which damaged checkpoints are set aside, and tell the notes."""
    config, folder = inputs.config, inputs.folder

    table = inputs.table.to_json() | {"in_use": inputs.table.in_use(base_rates(config))}

    def write() -> None:
        clear_leftovers(folder)
        for name, text in (
            ("mup.json", json.dumps(table, indent=1)),  # first: by it a run folder is known
            ("config.yaml", to_yaml(config)),
        ):
            if not (folder / name).is_file() or (folder / name).read_bytes() != text.encode():  # no room is needed then
                write_atomically(folder / name, text)
        for checkpoint, damage in start.resumed.damaged.items() if start.resumed is not None else ():
            set_aside(checkpoint, damage)

    on_rank_0(inputs.world, write)
    metrics = Metrics(folder, inputs.world.rank == 0, config.train.steps, step)
    if config.wandb.project is not None:
        metrics.start_wandb(config.wandb.project, config.wandb.mode, str(config.run.name), plain(config))
    for note in notes:
        metrics.say(note)
    return metrics


def _followed(
    track: Track, validate: Callable[[], dict[str, float]], state: TrainState, metrics: Metrics
) -> Callable[[], dict[str, float]]:
    """Validation that tells how its loss lies to the forecast."""
    track.resume(metrics.records())
    metrics.band = track.course

    def tell(text: str) -> None:
        metrics.say(text)
        metrics.status("running", state.step, text)

    def follow() -> dict[str, float]:
        figures = validate()
        return figures | track.follow(state.step, figures["val_loss_ema"], tell)

    return follow


def _assemble(
    inputs: _Inputs,
    trained: _Trained,
    side_jobs: _SideJobs,
    metrics: Metrics,
    lock: Lock | None,
    recorder: Recorder | None,
) -> Run:
    config, world, (engine, ema, state) = inputs.config, inputs.world, trained
    timer = StepTimer(units_of(engine) if recorder is None else [], world)
    objective, alignment = build_objective(config, inputs.resolved), build_alignment(config, inputs.encoders)
    # The engine averages gradients over the W ranks, while the loss is a mean over the B samples of the global batch:
    # mean over ranks of W / B x (a rank's sum) = 1 / B x (sum over all samples).
    scale = world.size / config.train.global_batch_size
    watched = {name: WatchedParameter(row.role, config.optim.eps * row.eps) for name, row in inputs.table.rows.items()}

    def sample(path: Path) -> None:
        with metrics.without_room(path):
            side_jobs.write_grid(path)

    def warn(text: str) -> None:
        metrics.say(text)
        metrics.status("running", state.step, text)

    return Run(
        plan=_plan(inputs),
        world=world,
        folder=inputs.folder,
        engine=engine,
        ema=ema,
        health=Health(watched, replicas=world.size // inputs.resolved.shard),
        timer=timer,
        passes=build_passes(engine, objective, alignment, scale, recorder),
        alignment=alignment,
        lr=partial(_learning_rate, config),
        batches=partial(_batches, inputs, state, timer),
        validate=side_jobs.validate,
        sample=sample,
        evaluate=side_jobs.evaluate,
        metrics=metrics,
        checkpointer=Checkpointer(
            inputs.folder,
            engine,
            world.checkpoint,
            config.run.keep_last,
            config.run.keep_every,
            config.train.checkpoint_async,
            warn,
        ),
        meta=_checkpoint_meta(inputs),
        state=state,
        lock=lock,
    )


def _batches(inputs: _Inputs, state: TrainState, timer: StepTimer) -> Iterator[list[MicroBatch]]:
    """The chain of batches: reader -> encoding of the next step -> skipped ranges -> timer.

    Skipped ranges come after the encoding: where they seek, the stream before them is closed and begun again, so that
    nothing is being encoded while reader processes are forked, and no step is encoded that nobody wants.
    """
    prefetched = prefetch(inputs.data.batches, inputs.encoders.begin, inputs.encoders.steps_ahead)
    return timer.timed(follow(prefetched, lambda: state.data_step))


def _plan(inputs: _Inputs) -> Plan:
    config, world = inputs.config, inputs.world
    train = config.train
    peak = peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    return Plan(
        steps=train.steps,
        global_batch_size=train.global_batch_size,
        every=Intervals(
            log=train.log_every,
            validate=train.validate_every,
            checkpoint=train.checkpoint_every,
            snapshot=train.ema_snapshot_every,
            sample=0 if inputs.encoders.without_images else train.sample_every,
            evaluate=train.evaluate_every,
        ),
        max_bad_share=config.data.max_bad_share,
        rollback_after=train.rollback_after,
        max_skipped_steps=train.max_skipped_steps,
        data_steps=inputs.data.steps,
        watchdog_factor=train.watchdog_factor,
        watchdog_min_s=train.watchdog_min_s,
        image_flops=partial(image_flops, config),
        peak_flops=None if peak is None else peak * world.size,
    )


def _learning_rate(config: TrainConfig, step: int) -> float:
    """Base learning rate of update `step` (from 0); each parameter's is this times its factor in the muP table."""
    optim = config.optim
    return optim.lr * lr_factor(step, optim.schedule, optim.warmup_steps, optim.decay_steps, config.train.steps)


def _checkpoint_meta(inputs: _Inputs) -> dict[str, Any]:
    config, data = inputs.config, inputs.data
    return {
        "config": plain(config),
        "engine": engine_identity(config, inputs.world),
        "attention": kernel_in_use(),
        "mup": inputs.table.to_json(),
        "fingerprints": inputs.fingerprints,
        "validation": data.validation_fingerprint if config.train.validate_every else None,
        "versions": {name: version(name) for name in _PACKAGES},
        "commit": commit(),
    }
