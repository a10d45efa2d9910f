"""The composition root of training: config -> everything that a run needs, one function for each phase."""

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from models.attention import kernel_in_use

from ..checkpoint.compatible import check_usable, lasting
from ..checkpoint.find import (
    Newest,
    complete_checkpoints,
    find_checkpoint,
    newest_good,
    set_aside,
    step_of,
    weights_of,
)
from ..checkpoint.meta import read_meta
from ..checkpoint.resume import Resumed, engine_identity, find_resumed
from ..checkpoint.write import Checkpointer, clear_leftovers
from ..collectives import from_rank_0, on_rank_0
from ..config.keys import plain
from ..config.load import to_yaml
from ..config.resolve import resolve
from ..config.schema import OptimConfig, TrainConfig
from ..config.stages import Stage, as_trained, changes, stage_at, stages_of
from ..ema import EMA
from ..errors import ConfigError
from ..files import Lock, lock_folder, write_atomically
from ..forecast.track import Track, bank_of
from ..input.stream import follow, prefetch
from ..input.training_data import check_later_stage
from ..lr_schedule import base_lr
from ..monitor.metrics import Metrics, peak_flops
from ..monitor.mup_health import Health, WatchedParameter
from ..monitor.step_timer import StepTimer
from ..monitor.tracking.tracker import Tracked
from ..monitor.tracking.trackers import check_installed
from ..parallel.cuda_graph import Recorder
from ..parallel.engine import Engine
from ..parallel.mesh import World
from ..parallel.precision import multiplies, precision_of
from ..provenance import commit
from ..recovery.skipped_ranges import read_skipped_ranges
from ..run import Intervals, Plan, Run
from ..state import TrainState
from ..step import MicroBatch
from .attention import attention_choice, describe
from .engine import base_rates, build_alignment, build_engine, build_objective, build_route, units_of
from .float8 import check_fp8_is_compiled
from .flops import image_flops
from .inputs import Inputs, open_inputs
from .passes import build_passes, graph_recorder
from .side_jobs import SideJobs, build_side_jobs

_PACKAGES = ("torch", "transformers", "diffusers", "numpy")


def build_run(
    config: TrainConfig,
    world: World,
    hold: Callable[[Path], None] = lambda folder: None,
    fitting: Sequence[float | None] = (),
) -> Run:
    """Everything for the loop, of the stage that the run folder has come to. User's mistakes raise ConfigError,
    DataError or CheckpointError before the run folder is written.

    hold: is called on rank 0 with the folder once no other run can have it. fitting: of each stage, see resolve; empty:
    none of them has one.
    """

    def lock_run(folder: Path) -> Lock:
        lock = lock_folder(folder)
        hold(folder)
        return lock

    _set_determinism(config)
    folder = config.run.folder
    on_rank_0(world, lambda: _check_is_run_folder(folder))
    on_rank_0(world, lambda: check_installed(config.tracked[0]))
    # An existing folder is held before it is read; a new one is made only when nothing can be wrong any more.
    lock = on_rank_0(world, lambda: lock_run(folder) if folder.is_dir() else None)
    newest = newest_good(folder, world.control)
    stage = stage_at(config, step_of(newest[0]) if newest[0] else 0)
    recorder = graph_recorder(stage.config, world)
    check_fp8_is_compiled(stage.config, world)
    later = stages_of(config)[stage.number + 1 :]
    on_rank_0(world, lambda: [check_later_stage(s.config, resolve(s.config, world.size), s.aligned) for s in later])
    own_fitting = fitting[stage.number] if fitting else None
    inputs = open_inputs(config, stage, world, own_fitting, read_skipped_ranges(folder))
    track = from_rank_0(world, lambda: Track.of(config))
    start = _find_start(inputs, newest)
    trained = _build_trained(inputs, start)
    notes = [*_describe(inputs, start), *describe(attention_choice(inputs.config, world))]
    notes += [*_slow_precision(inputs.config, world.device), *inputs.data.notes]
    if track is not None:
        bank = bank_of({"validation": inputs.data.validation_fingerprint})
        notes += track.notes({**inputs.fingerprints, **bank})
    with_averages = trained.with_averages(inputs.config.ema.decays[0])
    side_jobs = build_side_jobs(inputs, trained.engine, with_averages, notes)
    lock = on_rank_0(world, lambda: lock or lock_run(folder))
    metrics = _open_folder(inputs, start, trained.state.step, notes)
    if track is not None:
        side_jobs = side_jobs._replace(validate=_followed(track, side_jobs.validate, trained.state, metrics))
    return _assemble(inputs, trained, side_jobs, metrics, lock, recorder)


def stage_of(config: TrainConfig) -> Stage:
    """The stage that the run folder has come to, by the name of its newest checkpoint."""
    saved = complete_checkpoints(config.run.folder / "checkpoints")
    return stage_at(config, step_of(saved[-1]) if saved else 0)


def release_memory() -> None:
    """Give back what a stage that is over has left: a sharded model holds itself in cycles, and with it its memory, and
    its graphs would count against the recompile limit."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


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


# --------------------------------------------------------------------------------------------------- what the run reads


def _set_determinism(config: TrainConfig) -> None:
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _check_is_run_folder(folder: Path) -> None:
    """Raise ConfigError where files that are not a run's would be written over."""
    if not (folder / "mup.json").exists() and not (folder / "checkpoints").exists():
        for name in ("config.yaml", "metrics.jsonl"):
            if (folder / name).exists():
                raise ConfigError(f"{folder} holds {name}, but no run: choose another run.name or run.dir")


def _find_start(inputs: Inputs, newest: Newest) -> _Start:
    config, table, world = inputs.config, inputs.table, inputs.world
    resumed = find_resumed(inputs.whole, inputs.stage, newest, table, inputs.fingerprints, world)
    if resumed is not None or config.run.init_from is None:
        return _Start(resumed, None)
    initial = find_checkpoint(Path(config.run.init_from), world.control)
    check_usable(read_meta(initial), table.to_json(), config.objective.predict, initial)
    return _Start(None, initial)


# -------------------------------------------------------------------------------------------------- what the run trains


def _build_trained(inputs: Inputs, start: _Start) -> _Trained:
    """Weights, averages and state: new, or as `start` has them."""
    config, world = inputs.config, inputs.world
    engine = build_engine(config, inputs.table, world)
    if start.initial is not None:
        engine.load_weights(start.initial, _weights_of(start.initial), lasting(inputs.table.rows))
    ema = EMA(engine.master_shards(), config.ema.decays, config.ema.warmup)
    state = TrainState.start(world.device, config.optim.spike_threshold)
    state.skipped_ranges = inputs.skipped_ranges
    if start.resumed is not None:
        meta = start.resumed.meta
        kept = [decay for decay in ema.decays if decay in as_trained(meta["config"], meta["step"])["ema"]["decays"]]
        engine.load(start.resumed.checkpoint, {**ema.tensors(kept), **state.tensors()})
        ema.reset([decay for decay in ema.decays if decay not in kept])  # ema.decays may change on resume
        state.restore(meta, world.rank)
        if state.step == inputs.stage.first_step:
            state.spikes.forget()
    return _Trained(engine, ema, state)


def _weights_of(checkpoint: Path) -> str:
    """See checkpoint.find.weights_of."""
    meta = read_meta(checkpoint)
    return weights_of({**meta, "config": as_trained(meta["config"], meta["step"])})


def _describe(inputs: Inputs, start: _Start) -> list[str]:
    """What the user is told about the start, once the run folder is there to hold it."""
    if start.resumed is not None:
        damaged = start.resumed.damaged.values()
        return [
            *(f"warning: {reason}; renamed to .corrupt and passed over" for reason in damaged),
            f"resuming {start.resumed.checkpoint}",
            *_stage_notes(inputs, start.resumed.meta["step"]),
            *(f"changed: {change}" for change in start.resumed.changes),
            *_jumps(inputs, start.resumed.meta),
        ]
    billions = sum(float(np.prod(row.shape)) for row in inputs.table.rows.values()) / 1e9
    notes = [
        inputs.table.describe(base_rates(inputs.config)),
        f"{inputs.folder}: {billions:.3g} B parameters, {inputs.world.size} processes",
    ]
    notes += _stage_notes(inputs, 0)
    if start.initial is not None:
        weights = _weights_of(start.initial)
        notes.append(f"weights from {start.initial} ({weights}), and nothing else: moments, EMA and data begin anew")
    return notes


def _stage_notes(inputs: Inputs, step: int) -> list[str]:
    """The stage of a run that has several, and what changes where it begins."""
    stage = inputs.stage
    if stage.of == 1:
        return []
    changed = changes(stage, stages_of(inputs.whole)[stage.number - 1]) if stage.number else []
    begins = changed and step == stage.first_step
    return [
        f"{stage.name}: steps {stage.first_step} to {stage.last_step}",
        *(f"from here on: {change}" for change in changed if begins),
    ]


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


def _jumps(inputs: Inputs, meta: dict[str, Any]) -> Iterator[str]:
    """What breaks off at a resume although the config may change so, other than by a new stage."""
    step, stage = meta["step"], inputs.stage
    if step == stage.first_step:
        return
    if step:
        optim = OptimConfig.model_construct(**as_trained(meta["config"], step)["optim"])
        first, last = stage.schedule
        if last == inputs.whole.train.steps:
            last = meta["config"]["train"]["steps"]
        at = min(step, last - 1)  # of a run that was at its end: its last rate
        before = base_lr(optim, first, last, at)
        now = base_lr(stage.config.optim, *stage.schedule, step)
        if not 0.9 * before <= now <= 1.1 * before:
            change = f"{now / before:.3g} times" if before else "from 0"
            yield f"warning: the learning rate jumps from {before:.3g} to {now:.3g} ({change}) at step {step}"
    validation = inputs.data.validation_fingerprint if inputs.config.train.validate_every else None
    if None not in (validation, meta["validation"]) and validation != meta["validation"]:
        yield (
            f"warning: other validation samples from step {step} on: losses before and after do not compare. val_set "
            "in metrics.jsonl tells them apart, and plots begin a new series"
        )


# ---------------------------------------------------------------------------------------------- what the loop is handed


def _open_folder(inputs: Inputs, start: _Start, step: int, notes: list[str]) -> Metrics:
    """Write the run folder, from which damaged checkpoints are set aside, and tell the notes."""
    config, folder = inputs.config, inputs.folder

    table = inputs.table.to_json() | {"in_use": inputs.table.in_use(base_rates(config))}

    def write() -> None:
        clear_leftovers(folder)
        for name, text in (
            ("mup.json", json.dumps(table, indent=1)),  # first: by it a run folder is known
            ("config.yaml", to_yaml(inputs.whole)),
        ):
            if not (folder / name).is_file() or (folder / name).read_bytes() != text.encode():  # no room is needed then
                write_atomically(folder / name, text)
        for checkpoint, damage in start.resumed.damaged.items() if start.resumed is not None else ():
            set_aside(checkpoint, damage)

    on_rank_0(inputs.world, write)
    metrics = Metrics(folder, inputs.world.rank == 0, config.train.steps, step)
    kinds, project, mode = config.tracked
    metrics.start_trackers(kinds, Tracked(folder, project, str(config.run.name), mode, plain(inputs.whole)))
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
    inputs: Inputs,
    trained: _Trained,
    side_jobs: SideJobs,
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
            metrics.picture(state.step, "samples", path)

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
        passes=build_passes(engine, objective, alignment, build_route(config), scale, recorder),
        alignment=alignment,
        lr=partial(base_lr, inputs.stage.config.optim, *inputs.stage.schedule),
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


def _batches(inputs: Inputs, state: TrainState, timer: StepTimer) -> Iterator[list[MicroBatch]]:
    """The chain of batches: reader -> encoding of the next step -> skipped ranges -> timer.

    Skipped ranges come after the encoding: where they seek, the stream before them is closed and begun again, so that
    nothing is being encoded while reader processes are forked, and no step is encoded that nobody wants.
    """
    prefetched = prefetch(inputs.data.batches, inputs.encoders.begin, inputs.encoders.steps_ahead)
    return timer.timed(follow(prefetched, lambda: state.data_step))


def _plan(inputs: Inputs) -> Plan:
    config, world, stage = inputs.config, inputs.world, inputs.stage
    train = config.train
    peak = peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    return Plan(
        stage=stage.name if stage.of > 1 else None,
        first_step=stage.first_step,
        steps=stage.last_step,
        is_last=stage.last_step == inputs.whole.train.steps,
        images=stage.images,
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


def _checkpoint_meta(inputs: Inputs) -> dict[str, Any]:
    config, data = inputs.config, inputs.data
    return {
        "config": plain(inputs.whole),
        "engine": engine_identity(config, inputs.world),
        "attention": kernel_in_use(),
        "mup": inputs.table.to_json(),
        "fingerprints": inputs.fingerprints,
        "validation": data.validation_fingerprint if config.train.validate_every else None,
        "versions": {name: version(name) for name in _PACKAGES},
        "commit": commit(),
    }
