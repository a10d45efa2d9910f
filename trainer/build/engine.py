"""From a config: the muP table, model and optimizer in an engine, objective, alignment and sampler."""

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import Kernel, use_kernel
from models.backbone import Backbone, build_model, declarations, kinds
from models.model_config import ModelConfig

from ..config.resolve import Resolved, compiles, keeps_gathered
from ..config.schema import TrainConfig
from ..diffusion.ddpm import DDPM
from ..diffusion.ddpm_sampling import DDPMSampler
from ..diffusion.flow import RectifiedFlow
from ..diffusion.repa import Alignment, spatially_normalised
from ..diffusion.route import Route
from ..diffusion.sampling import Euler, Sampler
from ..errors import ConfigError
from ..input.encoding import Encoders
from ..mup.apply import apply_multipliers, build_table, init_parameters, initial_value, param_groups
from ..mup.kinds import ChoiceError
from ..mup.rules import ROLES, Optimizer, Settings, depth_factors
from ..mup.table import BaseRates, MuTable
from ..parallel.activation_checkpointing import checkpoint_activations
from ..parallel.compile import compile_units
from ..parallel.engine import Engine
from ..parallel.fsdp import FSDP2Engine, Sharding
from ..parallel.mesh import World
from ..parallel.muon import MuonSettings
from ..parallel.precision import DTYPES, precision_of
from ..parallel.single import SingleEngine
from ..parallel.zero import ZeroEngine
from .attention import attention_choice
from .float8 import multiply_in_fp8


def build_mup_table(config: TrainConfig) -> MuTable:
    """The muP table of a config, from three models on the meta device: no weights are made. Raises ConfigError where
    the config names parameters that do not fit."""
    model, mup = config.model, config.mup

    def factory(width: int) -> nn.Module:
        shape: ModelConfig = dataclasses.replace(model, width=width)
        return _build(config, shape)

    branch_scale, branch_lr = depth_factors(model.depth, mup.base_depth, mup.depth_alpha)
    optim, own_head = config.optim, config.optim.kind == "muon" and config.optim.muon.by_head
    settings = Settings(
        mup.parametrization,
        mup.wd_rule,
        mup.eps_rule,
        optim.decay,
        branch_scale=branch_scale,
        branch_lr=branch_lr,
        output_multiplier=mup.output_multiplier,
        role_lr={role: factor for role in ROLES if (factor := getattr(mup.role_lr, role)) != 1.0},
        factors={key: {factor: value for factor, value in given if value != 1.0} for key, given in mup.factors.items()},
        optimizer=optim.kind,
        muon_include=optim.muon.include,
        muon_exclude=optim.muon.exclude,
        muon_head_dim=model.head_dim if own_head else None,
    )
    declared = declarations(model, config.projector)
    try:
        return build_table(factory, mup.base_width, model.width, mup.base_width, declared, settings, kinds(model))
    except ChoiceError as error:
        raise ConfigError(str(error)) from None


def _build(config: TrainConfig, model: ModelConfig) -> Backbone:
    """The backbone of a config in the shape `model`."""
    text = config.text_encoder
    return build_model(
        model, config.autoencoder.channels, text.total_width, config.projector, pooled_width=text.total_pooled
    )


def base_rates(config: TrainConfig) -> dict[Optimizer, BaseRates]:
    """What the factors of the muP table are of, for each optimizer that it has."""
    optim, muon = config.optim, config.optim.muon
    decay = optim.weight_decay if muon.weight_decay is None else muon.weight_decay
    rates: dict[Optimizer, BaseRates] = {"adamw": BaseRates(optim.lr, optim.weight_decay, optim.eps)}
    return rates if optim.kind == "adamw" else {**rates, "muon": BaseRates(muon.lr, decay, eps=0.0)}


def build_engine(config: TrainConfig, table: MuTable, world: World, attention: Kernel | None = None) -> Engine:
    """Model and optimizer, sharded, initialised by name; every parameter's settings are checked against the table.

    attention: the kernel that this process's models take from now on; None takes the one for this config and device.
    """
    optim, parallel = config.optim, config.parallel
    precision = precision_of(parallel.precision, world.device)
    if DTYPES[precision] is not torch.bfloat16:
        torch.backends.cuda.enable_flash_sdp(True)  # on a CPU off since init_world, for the sake of bf16
    use_kernel(attention or attention_choice(config, world).kernel)
    with torch.device("meta"):
        model = _build(config, config.model)
    apply_multipliers(model, table)
    if precision == "fp8":
        multiply_in_fp8(model, table, world)
    units = model.shard_units()
    checkpoint_activations(units, parallel.activation_checkpointing)
    if compiles(config, on_gpu=world.device.type == "cuda"):
        compile_units(units, warn=partial(_warn, world))

    def groups(named_parameters: dict[str, Tensor]) -> list[dict[str, Any]]:
        return param_groups(named_parameters.items(), table, base_rates(config))

    def initialise(materialised: nn.Module) -> None:
        model.fill_buffers()
        init_parameters(materialised, table, config.train.seed)

    common: dict[str, Any] = {
        "world": world,
        "precision": precision,
        "groups": groups,
        "betas": optim.betas,
        "clip_norm": optim.clip_norm,
    }
    if parallel.engine == "zero":
        initial = partial(initial_value, table, seed=config.train.seed, device=world.device)
        engine: Engine = ZeroEngine(
            model, stage=parallel.zero_stage, fill_buffers=model.fill_buffers, initial=initial, **common
        )
    else:
        muon = optim.muon
        common["muon"] = MuonSettings(muon.momentum, muon.nesterov, muon.steps) if optim.kind == "muon" else None
        engine = native_engine(config, model=model, units=units, initialise=initialise, **common)
    _check_settings(engine, table, base_rates(config))
    return engine


def _warn(world: World, text: str) -> None:
    """Tell a person at once; on the error output, because this rank may be the only one that knows."""
    print(text if world.size == 1 else f"rank {world.rank}: {text}", file=sys.stderr, flush=True)


def native_engine(config: TrainConfig, world: World, **given: Any) -> FSDP2Engine | SingleEngine:
    """The engine that is named fsdp2: on one process FSDP2 is left out, but for its offload to the host."""
    parallel = config.parallel
    if world.size == 1 and not parallel.cpu_offload:
        return SingleEngine(world=world, fixed_gradients=parallel.cuda_graph, **given)
    parameters = sum(parameter.numel() for parameter in given["model"].parameters())
    sharding = Sharding(not keeps_gathered(config, parameters), parallel.prefetch, parallel.cpu_offload)
    return FSDP2Engine(world=world, sharding=sharding, **given)


def _check_settings(engine: Engine, table: MuTable, base: Mapping[Optimizer, BaseRates]) -> None:
    """The proof, after sharding, that every parameter is trained with what the table says."""
    for name, settings in engine.optimizer_settings().items():
        row = table.rows[name]
        rates = base[row.optimizer]
        expected = (rates.lr * row.lr, rates.weight_decay * row.weight_decay, rates.eps * row.eps)
        assert settings == expected, f"{name}: the optimizer has (lr, wd, eps) {settings}, the table {expected}"
    if "muon" in base:
        kept = {name for name, state in engine.state().items() if "momentum" in state}
        wrong = sorted(kept ^ {name for name, row in table.rows.items() if row.optimizer == "muon"})
        assert not wrong, f"{wrong[0]}: the table has {table.rows[wrong[0]].optimizer} for it, the engine the other one"


def units_of(engine: Engine) -> list[nn.Module]:
    """The model's blocks, which are gathered, and compiled, one at a time."""
    model: Any = engine.model  # a backbone, or DeepSpeed's wrapper of one, which passes its attributes on
    return model.shard_units()


def build_objective(config: TrainConfig, resolved: Resolved) -> RectifiedFlow | DDPM:
    """What is trained: rectified flow or DDPM."""
    if config.objective.kind == "ddpm":
        return DDPM(config.objective.beta_schedule, config.model.learn_sigma)
    o = config.objective
    return RectifiedFlow(
        o.timestep_mean,
        o.timestep_std,
        resolved.time_shift,
        area=config.latent_size**2,
        predict=o.predict,
        x_clamp=o.x_clamp,
        uniform_share=o.uniform_share,
        contrastive_weight=o.contrastive_weight,
    )


def build_alignment(config: TrainConfig, encoders: Encoders) -> Alignment | None:
    """REPA, where the config has it. objective.repa_layer counts blocks from 1."""
    objective = config.objective
    if not objective.repa_weight:
        return None

    def features(batch: Any) -> Tensor:
        found, share = encoders.features(batch), objective.repa_spatial_norm
        return found if share is None else spatially_normalised(found, share)

    return Alignment(objective.repa_weight, objective.repa_layer - 1, features, objective.repa_until)


def build_route(config: TrainConfig) -> Route | None:
    """The route of the image tokens, where the model has one: in training, and to guide samples by."""
    route = config.model.route
    return None if route is None else Route(config.model.patch_size, route.kept, route.blocks)


def build_sampler(config: TrainConfig, resolved: Resolved) -> Sampler:
    """From noise to latents, by the config's sampler and number of steps."""
    if config.sampler == "euler":
        return Euler(config.sample.steps, resolved.time_shift, config.objective.predict)
    ddpm = DDPM(config.objective.beta_schedule, config.model.learn_sigma)
    return DDPMSampler(ddpm, config.sampler, config.sample.steps)
