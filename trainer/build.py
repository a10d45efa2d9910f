"""The composition root: config -> everything that a run needs. The only module that imports across the rooms."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data.config import Cell, DataError
from data.dataset import check_images
from data.debug import ensure_debug_assets
from models.configs import ModelConfig
from models.flops import forward_flops
from models.registry import build_model, declarations

from .cells import image_tokens
from .checkpoint import (
    Checkpointer,
    CheckpointError,
    check_same_model,
    check_weights_readable,
    find_checkpoint,
    lasting,
    lock_folder,
    read_meta,
    set_aside,
    verify,
    weights_of,
    write_atomically,
)
from .config import Resolved, TrainConfig, plain, resolve, to_yaml
from .diffusion.ddpm import DDPM
from .diffusion.ddpm_sampling import DDPMSampler
from .diffusion.flow import RectifiedFlow
from .diffusion.repa import Alignment
from .diffusion.sampling import Euler, Sampler
from .ema import EMA
from .evaluate.evaluation import prepare
from .evaluate.generate import Generator, images_from_prompts, save_grid
from .evaluate.metrics import MetricError
from .evaluate.suite import load_suite
from .evaluate.val_loss import validation
from .frozen import FrozenParts, precision_of
from .health import Health, Watched
from .jumps import jumps_of
from .loop import restore
from .metrics import Metrics, peak_flops
from .mup.apply import apply_multipliers, build_table, init_parameters, initial_value, param_groups
from .mup.rules import ROLES, Settings
from .mup.table import MuTable
from .optim import lr_factor
from .pace import Pace
from .parallel.engine import Engine
from .parallel.fsdp import FSDP2Engine, Sharding
from .parallel.memory import checkpoint_activations, compile_units
from .parallel.mesh import World
from .parallel.zero import ZeroEngine
from .resume import engine_identity, find_resumed
from .source import Source, first_on_rank_0, is_debug, on_rank_0, validation_bank
from .state import Plan, Run, TrainState

_PACKAGES = ("torch", "transformers", "diffusers", "numpy")


def build_mup_table(config: TrainConfig) -> MuTable:
    """The muP table of a config, from three models on the meta device; no weights are made."""
    model = config.model

    def factory(width: int) -> torch.nn.Module:
        shape: ModelConfig = dataclasses.replace(model, width=width)
        return build_model(shape, config.autoencoder.channels, config.text_encoder.width, config.projector)

    mup = config.mup
    settings = Settings(
        mup.parametrization,
        mup.wd_rule,
        mup.eps_rule,
        config.optim.decay,
        branch_scale=1.0 if mup.base_depth is None else mup.base_depth / model.depth,
        output_multiplier=mup.output_multiplier,
        role_lr={role: factor for role in ROLES if (factor := getattr(mup.role_lr, role)) != 1.0},
    )
    return build_table(
        factory, mup.base_width, model.width, mup.base_width, declarations(model, config.projector), settings
    )


def build_engine(config: TrainConfig, table: MuTable, world: World) -> FSDP2Engine | ZeroEngine:
    """Model and optimizer, sharded, initialised by name; every parameter's settings are checked against the table."""
    optim, parallel = config.optim, config.parallel
    if precision_of(config, world) != "bf16":
        torch.backends.cuda.enable_flash_sdp(True)  # on a CPU off since init_world, for the sake of bf16
    with torch.device("meta"):
        model = build_model(config.model, config.autoencoder.channels, config.text_encoder.width, config.projector)
    apply_multipliers(model, table)
    units: list[torch.nn.Module] = model.shard_units()  # pyright: ignore[reportCallIssue] (every backbone has it)
    checkpoint_activations(units, parallel.activation_checkpointing)
    if parallel.compile:
        compile_units(units)

    def initialise(materialised: torch.nn.Module) -> None:
        materialised.fill_buffers()  # pyright: ignore[reportCallIssue] (every backbone has it)
        init_parameters(materialised, table, config.train.seed)

    common: dict[str, Any] = {
        "world": world,
        "precision": precision_of(config, world),
        "groups": lambda named: param_groups(named.items(), table, optim.lr, optim.weight_decay, optim.eps),
        "betas": optim.betas,
        "clip_norm": optim.clip_norm,
    }
    if parallel.engine == "zero":
        fill_buffers: Any = model.fill_buffers
        initial = partial(initial_value, table, seed=config.train.seed, device=world.device)
        engine = ZeroEngine(model, stage=parallel.zero_stage, fill_buffers=fill_buffers, initial=initial, **common)
    else:
        sharding = Sharding(parallel.reshard_after_forward, parallel.prefetch, parallel.cpu_offload)
        engine = FSDP2Engine(model, units=units, sharding=sharding, initialise=initialise, **common)
    for name, settings in engine.optimizer_settings().items():
        row = table.rows[name]
        expected = (optim.lr * row.lr, optim.weight_decay * row.weight_decay, optim.eps * row.eps)
        assert settings == expected, f"{name}: the optimizer has (lr, wd, eps) {settings}, the table {expected}"
    return engine


def build_run(config: TrainConfig, world: World) -> Run:
    """Everything for the loop. User's mistakes raise ConfigError, DataError or CheckpointError before the run
    folder is written."""
    resolved = resolve(config, world.size)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if is_debug(config.text_encoder.path) or is_debug(config.objective.repa_encoder):
        first_on_rank_0(world, ensure_debug_assets)
    source = Source(config, resolved, world)
    frozen = FrozenParts(config, world, partial(on_rank_0, world), source.dataset, align=True)
    table = build_mup_table(config)
    fingerprints = {"data": source.fingerprint, **frozen.fingerprints()}
    assert config.run.name is not None
    folder = Path(config.run.dir) / config.run.name

    # An existing folder is held before it is read; a new one is made only when nothing can be wrong any more.
    lock = on_rank_0(world, lambda: lock_folder(folder) if folder.is_dir() else None)
    resumed = find_resumed(config, folder, table, fingerprints, world)
    jumps = jumps_of(folder)
    initial = None
    if resumed is None and config.run.init_from is not None:
        initial = find_checkpoint(Path(config.run.init_from))
        verify(initial, world.control)
        check_same_model(read_meta(initial), table.to_json(), initial, rules=False)
        check_weights_readable(read_meta(initial), initial)

    engine = build_engine(config, table, world)
    state = TrainState.start(world.device, config.optim.spike_threshold)
    state.jumps = jumps
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
            {name: Watched(row.role, config.optim.eps * row.eps) for name, row in table.rows.items()},
            replicas=world.size // resolved.shard,
        ),
        pace=Pace(engine.model.shard_units(), world),  # pyright: ignore[reportCallIssue, reportArgumentType]
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
    source: Source,
    frozen: FrozenParts,
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
    frozen: FrozenParts,
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
    suite = suite.model_copy(update={"vae": None, "precision": precision_of(config, world)})
    generate = image_generator(suite.applied(config), engine, frozen, resolved)
    evaluation = prepare(suite, config.data.resolution, config.label_classes, world.device, world.control)

    def evaluate() -> dict[str, Any]:
        try:
            with swapped():
                images = {batch: evaluation.make(generate, batch) for batch, _ in evaluation.turns()}
            figures = evaluation.measure(lambda batch: evaluation.as_kept(images[batch]))
            return {f"val_{key}": score.value for key, score in figures.items()}
        except MetricError as error:  # constant images early, NaN after a divergence: no reason to stop
            return {"evaluation_error": str(error)} if world.rank == 0 else {}

    return evaluate


def sample_images(
    config: TrainConfig,
    engine: Engine,
    frozen: FrozenParts,
    resolved: Resolved,
    world: World,
    prompts: Sequence[str],
    seed: int = 0,
) -> np.ndarray:
    """uint8 [len(prompts), H, W, 3] from the weights that the engine's model has now, on every rank."""
    return images_from_prompts(
        engine.model,
        frozen.encode_prompts,
        frozen.decode,
        prompts,
        (config.autoencoder.channels, config.latent_size, config.latent_size),
        build_sampler(config, resolved),
        seed=seed,
        guidance=config.sample.guidance,
        guidance_channels=config.sample.guidance_channels,
        device=world.device,
        group=world.control,
    )


def image_generator(config: TrainConfig, engine: Engine, frozen: FrozenParts, resolved: Resolved) -> Generator:
    """Images by the weights that the engine's model has when it is called."""
    return Generator(
        engine.model,
        frozen.encode_prompts,
        frozen.decode,
        (config.autoencoder.channels, config.latent_size, config.latent_size),
        build_sampler(config, resolved),
        config.sample.guidance,
        config.sample.guidance_channels,
        frozen.device,
    )


@dataclasses.dataclass(frozen=True)
class Inference:
    """The EMA (or live) weights of a checkpoint, ready to compute with."""

    config: TrainConfig
    table: MuTable
    model: torch.nn.Module
    objective: RectifiedFlow | DDPM
    frozen: FrozenParts
    images: Callable[[Sequence[str], int], np.ndarray]
    """(prompts, seed) -> uint8 [n, H, W, 3]."""
    generate: Generator
    """One batch of this rank; all ranks call it equally often."""


def build_inference(
    config: TrainConfig, checkpoint: Path, world: World, weights: Literal["ema", "live"] = "ema"
) -> Inference:
    """Load the weights of a checkpoint that was trained with `config`."""
    if config.data.synthetic:
        raise CheckpointError(f"{checkpoint} was trained on synthetic data: there is no text encoder to prompt")
    check_images(config.autoencoder, config.text_encoder, config.label_classes)
    resolved = resolve(config, world.size)
    table = build_mup_table(config)
    verify(checkpoint, world.control)
    check_same_model(read_meta(checkpoint), table.to_json(), checkpoint, rules=False)
    check_weights_readable(read_meta(checkpoint), checkpoint)
    frozen = FrozenParts(config, world, partial(on_rank_0, world))
    _check_text_encoder(frozen, checkpoint, config.text_encoder.path)
    engine = build_engine(config, table, world)
    if weights == "live" and read_meta(checkpoint).get("averages_only"):
        raise CheckpointError(f"{checkpoint} is a snapshot, which holds EMA weights alone: there are no live ones")
    group = f"ema_{config.ema.decays[0]}" if weights == "ema" else "model"
    engine.load_weights(checkpoint, group, lasting(table.rows))
    return Inference(
        config=config,
        table=table,
        model=engine.model,
        objective=build_objective(config, resolved),
        frozen=frozen,
        images=lambda prompts, seed: sample_images(config, engine, frozen, resolved, world, prompts, seed),
        generate=image_generator(config, engine, frozen, resolved),
    )


def _check_text_encoder(frozen: FrozenParts, checkpoint: Path, path: str) -> None:
    trained, present = (
        held.get("text_encoder") for held in (read_meta(checkpoint)["fingerprints"], frozen.fingerprints())
    )
    if trained is not None and present not in (None, trained):
        raise CheckpointError(
            f"text_encoder.path {path} holds another text encoder than {checkpoint} was trained with: name that one"
        )


def build_objective(config: TrainConfig, resolved: Resolved) -> RectifiedFlow | DDPM:
    if config.objective.kind == "ddpm":
        return DDPM(config.objective.beta_schedule, config.model.learn_sigma)
    mean, std = config.objective.timestep_mean, config.objective.timestep_std
    return RectifiedFlow(mean, std, resolved.time_shift, area=config.latent_size**2)


def build_alignment(config: TrainConfig, frozen: FrozenParts) -> Alignment | None:
    o = config.objective
    return Alignment(o.repa_weight, o.repa_layer - 1, frozen.features) if o.repa_weight else None


def build_sampler(config: TrainConfig, resolved: Resolved) -> Sampler:
    if config.sampler == "euler":
        return Euler(config.sample.steps, resolved.time_shift)
    ddpm = DDPM(config.objective.beta_schedule, config.model.learn_sigma)
    return DDPMSampler(ddpm, config.sampler, config.sample.steps)


def _plan(
    config: TrainConfig, without_images: str | None, data_steps: int | None, world: World, metrics: Metrics
) -> Plan:
    train = config.train
    if without_images and train.sample_every:
        metrics.say(f"no sample grids: {without_images}")

    def image_flops(text_tokens: float, cell: Cell | None = None) -> float:
        forward = forward_flops(
            config.model,
            config.autoencoder.channels,
            config.text_encoder.width,
            image_tokens(config, cell) if cell else config.image_tokens,
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


def commit() -> str:
    """Commit of the code, also of a frozen copy (launch/submit.py); "" elsewhere outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if (frozen := root / "COMMIT").is_file():
        return frozen.read_text().strip()
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip()
