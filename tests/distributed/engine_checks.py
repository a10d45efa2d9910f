"""What a sharded engine must keep, checked on every rank; run by test_engine.py under torchrun, JSON on stdout.

A check returns a number or a flag for its test to judge; each is a function of (world) and runs on all ranks.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor

from data.synthetic import SyntheticReader
from models.backbone import build_model
from models.layers import TextCondition, time_sinusoids
from trainer.build.engine import build_alignment, build_engine, build_mup_table, build_objective
from trainer.checkpoint.write import Checkpointer
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.ema import EMA
from trainer.input.encoding import Encoders
from trainer.mup.apply import apply_multipliers, init_parameters
from trainer.parallel.engine import Engine, Watch
from trainer.parallel.fsdp import FSDP2Engine
from trainer.parallel.mesh import World, init_world
from trainer.step import micro_batch_losses

OVERRIDES = (
    "data.shards=synthetic", "text_encoder.width=16", "text_encoder.max_length=6", "train.sample_every=0",
    "model.adaln_init=fan_in", "optim.weight_decay=0.1", "optim.lr=1e-3",
    "objective.repa_weight=0.5", "objective.repa_layer=1", "objective.repa_width=16", "objective.repa_hidden=24",
)  # fmt: skip
# For wrong_update: with decay and epsilon large enough to be seen in one step.
UPDATE = ("optim.weight_decay=2", "optim.eps=1e-3", "optim.clip_norm=null")


def configured(*more: str) -> TrainConfig:
    return load_config("mmdit_debug_mup.yaml", [*OVERRIDES, *more])


def plain_model(config: TrainConfig) -> Any:
    return build_model(config.model, config.autoencoder.channels, config.text_encoder.width, config.projector)


def made(config: TrainConfig, world: World) -> FSDP2Engine:
    engine = build_engine(config, build_mup_table(config), world)
    assert isinstance(engine, FSDP2Engine)
    return engine


def run_steps(
    config: TrainConfig,
    engine: Engine,
    world: World,
    steps: int,
    spoil: int | None = None,
    max_norm: Tensor | None = None,
    watch: Watch | None = None,
    losses: list[float] | None = None,
) -> Any:
    """Train; at step `spoil` the last rank's batch holds a NaN. Returns the last step's result; losses: is given this
    rank's loss of each micro-batch."""
    encoders, resolved = Encoders(config, world), resolve(config, world.size)
    objective, alignment = build_objective(config, resolved), build_alignment(config, encoders)
    assert alignment is not None
    reader = SyntheticReader(
        config.data, config.text_encoder, config.autoencoder, 0, config.train.global_batch_size,
        world.rank, world.size, resolved.micro_batch_rows,
    )  # fmt: skip
    result = None
    for step, batches in reader.batches(0):
        if step == steps:
            return result
        for number, batch in enumerate(batches):
            if step == spoil and world.rank == world.size - 1:
                assert batch.latents is not None
                batch.latents[0, 0, 0, 0] = float("nan")
            encoded, features = encoders.encode(batch), alignment.features(batch)
            loss = micro_batch_losses(engine.model, objective, alignment, encoded, features).total
            if losses is not None:
                losses.append(float(loss.detach()))
            engine.backward(world.size / config.train.global_batch_size * loss, number == len(batches) - 1)
        result = engine.step(config.optim.lr, watch, max_norm)
    return result


def whole(engine: Engine) -> dict[str, Tensor]:
    return {name: engine.full(name).clone() for name in engine.master_shards()}


def worst(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def init_does_not_depend_on_sharding(world: World) -> float:
    config = configured()
    table = build_mup_table(config)
    plain = plain_model(config)
    apply_multipliers(plain, table)
    init_parameters(plain, table, config.train.seed)
    return worst(whole(made(config, world)), dict(plain.named_parameters()))


def optimizer_settings_are_the_tables(world: World) -> list[str]:
    config = configured()
    table, engine = build_mup_table(config), made(config, world)
    settings = engine.optimizer_settings()
    assert settings.keys() == table.rows.keys()
    return [
        name
        for name, row in table.rows.items()
        if settings[name] != (config.optim.lr * row.lr, config.optim.weight_decay * row.weight_decay, config.optim.eps)
    ]


class Moves:
    """A Watch: how far a step ends, in units of lr, from where AdamW would end by the table's (lr, decay, epsilon), and
    from where it would with another lr, decay or epsilon; by this rank's own weights, moments and gradients."""

    def __init__(self, config: TrainConfig, engine: Engine) -> None:
        self._optim, self._rows, self._engine = config.optim, build_mup_table(config).rows, engine
        self._ends: dict[str, list[Tensor]] = {}
        self._off: dict[str, list[float]] = {}

    def before(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        state, optim = self._engine.state(), self._optim
        for name, weight in weights.items():
            row = self._rows[name]
            lr, decay, eps = optim.lr * row.lr, optim.weight_decay * row.weight_decay, optim.eps * row.eps
            ways = ((lr, decay, eps), (2 * lr, decay, eps), (lr, decay + optim.weight_decay, eps), (lr, decay, 2 * eps))
            step = float(state[name].get("step", 0)) + 1
            moments = []
            for beta, key, power in zip(optim.betas, ("exp_avg", "exp_avg_sq"), (1, 2), strict=True):
                old = state[name].get(key, torch.zeros_like(weight)).double()
                new = beta * old + (1 - beta) * gradients[name].double() ** power
                moments.append(new / (1 - beta**step))
            mean, square = moments
            start = weight.double()
            self._ends[name] = [start - a * (w * start + mean / (square.sqrt() + e)) for a, w, e in ways]

    def after(self, weights: Mapping[str, Tensor]) -> None:
        for name, ends in self._ends.items():
            lr, end = self._optim.lr * self._rows[name].lr, weights[name]
            self._off[name] = [float((end - one).abs().max()) / lr if end.numel() else 0.0 for one in ends]

    def wrong(self) -> list[str]:
        """Parameters that did not end where they should, or where one could not tell; the same on all ranks."""
        off = torch.tensor(list(self._off.values()))
        dist.all_reduce(off, dist.ReduceOp.MAX)
        seen = zip(self._off, off.tolist(), strict=True)
        return [name for name, (own, *others) in seen if own > 1e-3 or min(others) < 1e-2]


def wrong_update(config: TrainConfig, engine: Engine, world: World) -> list[str]:
    """Parameters that one step does not move as the table says; from weights of which none is zero."""
    generator, moves = torch.Generator().manual_seed(world.rank), Moves(config, engine)
    shards = engine.master_shards().items()
    with engine.swapped({name: shard + 0.1 * torch.randn(shard.shape, generator=generator) for name, shard in shards}):
        run_steps(config, engine, world, 1, watch=moves)
    return moves.wrong()


def one_step_moves_as_the_table_says(world: World) -> dict[str, list[str]]:
    """Measured, not asked; from the start, and resumed from a run with other settings."""
    found = {}
    for precision in ("fp32", "bf16"):
        config = configured(f"parallel.precision={precision}", *UPDATE)
        found[precision] = wrong_update(config, made(config, world), world)
        old = configured(f"parallel.precision={precision}", "optim.lr=3e-3", "optim.weight_decay=0.5", "optim.eps=1e-6")
        engine, resumed, folder = made(old, world), made(config, world), shared_folder(world)
        run_steps(old, engine, world, 2)
        engine.save(folder, {}).result()
        resumed.load(folder, {})
        found[f"{precision}, resumed"] = wrong_update(config, resumed, world)
    return found


def another_setting_is_seen(world: World) -> dict[str, int]:
    """Parameters that wrong_update finds where a group of the optimizer has another setting."""
    config, found = configured("parallel.precision=fp32", *UPDATE), {}
    for key in ("lr_scale", "weight_decay", "eps"):
        engine = made(config, world)
        group = max(engine._update._optimizer.param_groups, key=lambda group: group["weight_decay"])
        group[key] *= 2
        found[key] = len(wrong_update(config, engine, world)) - len(group["params"])
    return found


def shared_folder(world: World) -> Path:
    folder = [tempfile.mkdtemp() if world.rank == 0 else ""]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def non_finite_step_changes_nothing(world: World, *more: str) -> dict[str, float]:
    config = configured(*more)
    engine = made(config, world)
    ema = EMA(engine.master_shards(), (0.5,), warmup=False)
    run_steps(config, engine, world, 2)
    state = {name: tensor.clone() for name, tensor in local_state(engine).items()}
    averages = {name: tensor.clone() for name, tensor in ema.tensors().items()}
    result = run_steps(config, engine, world, 1, spoil=0)
    ema.update(2, result.skipped)
    return {
        "skipped": float(result.skipped),
        "moved": max(float((state[name] - tensor).abs().max()) for name, tensor in local_state(engine).items()),
        "average_moved": max(float((averages[n] - t).abs().max()) for n, t in ema.tensors().items() if t.numel()),
        "next_is_finite": float(run_steps(config, engine, world, 1).grad_norm.isfinite()),
    }


def norm_over_the_limit_changes_nothing(world: World) -> list[float]:
    """[skipped, largest change of weights and optimizer state] at a limit over the norm, and at one under it."""
    config = configured()
    engine, found = made(config, world), []
    norm = run_steps(config, engine, world, 1).grad_norm
    for limit in (2 * norm, norm / 100):
        state = {name: tensor.clone() for name, tensor in local_state(engine).items()}
        result = run_steps(config, engine, world, 1, max_norm=limit.double())
        found += [float(result.skipped), max(float((state[n] - t).abs().max()) for n, t in local_state(engine).items())]
    return found


def local_state(engine: FSDP2Engine) -> dict[str, Tensor]:
    """Weights, moments and step counts of this rank, empty shards left out."""
    tensors = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in engine._tensors({}).items()}
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


def swapped_weights_are_used_and_given_back(world: World, *more: str) -> dict[str, float]:
    """Outputs within `swapped` equal those of an unsharded model with the averages; also after a training step,
    when a gathered copy of the live weights could be stale."""
    config = configured(*more, "parallel.precision=fp32")
    engine = made(config, world)
    ema = EMA(engine.master_shards(), (0.9,), warmup=False)
    result = run_steps(config, engine, world, 2)
    ema.update(1, result.skipped)
    live = whole(engine)
    generator = torch.Generator().manual_seed(0)
    x, states = (torch.randn(shape, generator=generator) for shape in ((2, 3, 32, 32), (2, 6, 16)))
    inputs = (x, torch.tensor([0.3, 0.8]), TextCondition(states, torch.ones(2, 6, dtype=torch.bool)))
    with torch.no_grad():
        engine.model(*inputs)
        with engine.swapped(ema.shards[0.9]):
            averaged, weights = engine.model(*inputs)[0], whole(engine)
        back = engine.model(*inputs)[0]
    table = build_mup_table(config)
    plain = plain_model(config)
    apply_multipliers(plain, table)
    with torch.no_grad():
        plain.load_state_dict(weights)
        expected = plain(*inputs)[0]
        plain.load_state_dict(live)
        return {
            "averaged": float((averaged - expected).abs().max()),
            "differs": float((averaged - back).abs().max()),
            "given_back": float((plain(*inputs)[0] - back).abs().max()),
            "weights_given_back": worst(live, whole(engine)),
        }


def replicas_agree(world: World) -> float:
    """HSDP: every rank a shard group of its own (shard 1) trains as full sharding does."""
    config = configured("parallel.precision=fp64")
    sharded = made(config, world)
    run_steps(config, sharded, world, 3)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world.size, 1), mesh_dim_names=("replicate", "shard"))
    copies_world = dataclasses.replace(world, mesh=mesh)
    copies = made(config, copies_world)
    run_steps(config, copies, copies_world, 3)
    return worst(whole(sharded), whole(copies))


def shares_of_copies(world: World) -> dict[str, int]:
    """HSDP: how often a sharded tensor is staged for a checkpoint over all copies, least and most; all must be once."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world.size, 1), mesh_dim_names=("replicate", "shard"))
    engine = made(configured(), dataclasses.replace(world, mesh=mesh))
    assert isinstance(engine, FSDP2Engine)
    everything = engine._tensors({})
    staged = [name for name, tensor in engine._share(everything).items() if isinstance(tensor, DTensor)]
    lists: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(lists, staged, group=world.control)
    counts = Counter(name for names in lists for name in names)
    wanted = [name for name, tensor in everything.items() if isinstance(tensor, DTensor)]
    return {"least": min(counts[name] for name in wanted), "most": max(counts.values()), "own": len(staged),
            "all": len(wanted)}  # fmt: skip


def save_and_load(world: World, *more: str) -> dict[str, float]:
    """A fresh engine that loads a checkpoint holds every tensor of it, and its next step is the same, bit for bit."""
    config = configured(*more)
    one = made(config, world)
    run_steps(config, one, world, 3)
    folder = shared_folder(world)
    one.save(folder, {"totals": torch.arange(3.0)}).result()
    two = made(dataclasses_seed(config), world)
    totals = torch.zeros(3)
    differed = worst(whole(one), whole(two))
    two.load(folder, {"totals": totals})
    same = worst_local(one, two)
    run_steps(config, one, world, 1)
    run_steps(config, two, world, 1)
    return {"differed": differed, "same": same, "totals": float(totals.sum()), "next": worst_local(one, two)}


def a_failing_rank_fails_all(world: World) -> dict[str, Any]:
    """The last rank alone cannot write, then cannot read back: both ranks are told, and neither waits for ever."""
    folder = shared_folder(world)
    told: list[str] = []
    saves = Checkpointer(folder, made(configured(), world), world.checkpoint, 3, 0, True, told.append)

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    failing = world.rank == world.size - 1
    for step, (owner, name) in enumerate(((FileSystemWriter, "write_data"), (hashlib, "file_digest"), (None, ""))):
        with mock.patch.object(owner, name, full) if owner and failing else contextlib.nullcontext():
            saves.save(step, {}, {"step": step})
            saves.wait()
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {"told": told[:2], "left": left}


def dataclasses_seed(config: TrainConfig) -> TrainConfig:
    """Another init, so that loading has something to do."""
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": 1})})


def worst_local(one: FSDP2Engine, two: FSDP2Engine) -> float:
    ours, theirs = local_state(one), local_state(two)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def bf16_keeps_fp32_masters(world: World) -> dict[str, Any]:
    """Master weights, moments and the reduction of gradients are fp32 under bf16, and t reaches the model uncast."""
    config = configured("parallel.precision=bf16")
    engine = made(config, world)
    engine.master_shards()["final.weight"].fill_(0.02)  # zero: nothing behind it would have a gradient
    seen: list[Tensor] = []
    time_embed = engine.model.get_submodule("time_embed")
    hook = time_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.zeros(2, 3, 32, 32)
    condition = TextCondition(torch.zeros(2, 6, 16), torch.ones(2, 6, dtype=torch.bool))
    t = torch.tensor([0.9001, 0.9012])
    prediction, _ = engine.model(x + world.rank, t, condition)
    hook.remove()
    engine.backward(prediction.float().square().sum(), last=True)
    reduced = [p.grad for p in engine.model.parameters()]
    gradients = torch.cat([g.to_local().flatten() for g in reduced if isinstance(g, DTensor)])
    gradients = gradients[gradients != 0]
    run_steps(config, engine, world, 1)
    return {
        # A mean of two bf16 numbers mostly needs more bits than bf16 has.
        "gradients_beyond_bf16": float((gradients != gradients.bfloat16().float()).float().mean()),
        "sinusoids_off_by": float((seen[0] - time_sinusoids(t).bfloat16()).abs().max()),
        "dtypes": sorted({str(t.dtype) for t in local_state(engine).values()}),
        "computed_in": str(prediction.dtype),
        "sinusoids_differ_by": float((seen[0][0].float() - seen[0][1].float()).abs().max()),
    }


def state_bytes(world: World) -> list[int]:
    """What this rank holds for weights, optimizer and EMA, by their storages."""
    engine = made(configured(), world)
    ema = EMA(engine.master_shards(), (0.9999,), warmup=True)
    tensors = engine._tensors({})
    optimizer = [t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items() if n[:6] != "model/"]
    groups = (engine.master_shards().values(), optimizer, ema.tensors().values())
    return [sum(tensor.untyped_storage().nbytes() for tensor in group) for group in groups]


CHECKS: tuple[Callable[[World], Any], ...] = (
    init_does_not_depend_on_sharding,
    optimizer_settings_are_the_tables,
    one_step_moves_as_the_table_says,
    another_setting_is_seen,
    non_finite_step_changes_nothing,
    norm_over_the_limit_changes_nothing,
    swapped_weights_are_used_and_given_back,
    replicas_agree,
    shares_of_copies,
    save_and_load,
    a_failing_rank_fails_all,
    bf16_keeps_fp32_masters,
    state_bytes,
)


def tell(world: World, results: dict[str, Any]) -> None:
    """What each rank found, as the line that the test reads; ends the process group."""
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, results)
    if world.rank == 0:
        print("RESULTS " + json.dumps(everyone))
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    world = init_world(int(sys.argv[1]))
    results = {check.__name__: check(world) for check in CHECKS}
    tell(world, results)


if __name__ == "__main__":
    main()
