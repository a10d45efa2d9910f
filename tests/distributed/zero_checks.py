"""What the zero engine must keep, in every stage, on every rank; run by test_zero.py under torchrun, JSON on stdout.

A check returns a number, a flag or a list for its test to judge; each is a function of (world) and runs on all ranks.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor

from data.synthetic import SyntheticReader
from trainer.build.engine import build_engine, build_mup_table, build_objective
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.ema import EMA
from trainer.input.encoding import Encoders
from trainer.parallel import zero
from trainer.parallel.mesh import World, init_world
from trainer.parallel.zero import ZeroEngine

from .engine_checks import (
    UPDATE,
    configured,
    dataclasses_seed,
    made,
    one_step_moves_as_the_table_says,
    run_steps,
    shared_folder,
    tell,
    whole,
    worst,
    wrong_update,
)

STAGES, PRECISIONS = (1, 2, 3), ("fp32", "bf16")
KINDS = [(stage, precision) for stage in STAGES for precision in PRECISIONS]
# Each stage, each precision, each of DeepSpeed's three optimizers: for what takes several engines.
SOME = [(1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]
# Two rows a micro-batch at 32 pixels: 2 micro-batches a step on 2 ranks.
ACCUMULATED = "train.micro_batch_size=0.03125"


def zero_config(stage: int, precision: str, *more: str) -> TrainConfig:
    return configured("parallel.engine=zero", f"parallel.zero_stage={stage}", f"parallel.precision={precision}", *more)


def made_zero(config: TrainConfig, world: World) -> ZeroEngine:
    AcceleratorState._reset_state(True)  # of the engine before
    engine = build_engine(config, build_mup_table(config), world)
    assert isinstance(engine, ZeroEngine)
    return engine


def each(check: Callable[[int, str, World], Any], world: World, kinds: Any = KINDS) -> dict[str, Any]:
    kinds = kinds if world.size == 2 else SOME  # more processes than cores
    return {f"{stage} {precision}": check(stage, precision, world) for stage, precision in kinds}


def local_state(engine: ZeroEngine) -> dict[str, Tensor]:
    """Weights, moments and step counts of this rank."""
    return {f"{key}/{n}": t for n, state in engine.state().items() for key, t in state.items() if t.numel()}


def moved(before: dict[str, Tensor], engine: ZeroEngine) -> float:
    """The largest difference; NaN if there is one."""
    return float(torch.stack([(before[n] - t).abs().max() for n, t in local_state(engine).items()]).max())


def starts_as_the_table_says(world: World) -> dict[str, Any]:
    """Difference of the initial values from fsdp2's, parameters that no rank's shard or more than one has, parameters
    whose (lr, weight decay, epsilon) in the sharded groups is not the table's."""
    expected = whole(made(configured(), world))

    def check(stage: int, precision: str, world: World) -> list[Any]:
        config = zero_config(stage, precision)
        engine = made_zero(config, world)
        covered = {name: engine.whole(name, torch.ones_like(shard)) for name, shard in engine.master_shards().items()}
        torn = [name for name, count in covered.items() if not bool((count == 1).all())]
        # Disjoint as well: as many numbers as there are.
        numbers = torch.tensor(sum(shard.numel() for shard in engine.master_shards().values()))
        dist.all_reduce(numbers)
        twice = int(numbers) - sum(tensor.numel() for tensor in expected.values())
        return [worst(expected, whole(engine)), torn, twice, wrong_settings(config, engine)]

    return each(check, world)


def wrong_settings(config: TrainConfig, engine: ZeroEngine) -> list[str]:
    table, optim = build_mup_table(config), config.optim
    settings = engine.optimizer_settings()
    assert settings.keys() == table.rows.keys()
    return [
        name
        for name, row in table.rows.items()
        if settings[name] != (optim.lr * row.lr, optim.weight_decay * row.weight_decay, optim.eps * row.eps)
    ]


def one_step_of_zero_moves_as_the_table_says(world: World) -> dict[str, Any]:
    def check(stage: int, precision: str, world: World) -> list[str]:
        config = zero_config(stage, precision, *UPDATE)
        return wrong_update(config, made_zero(config, world), world)

    return each(check, world)


def one_step_after_a_resume(world: World) -> dict[str, Any]:
    """The groups that come with a checkpoint are not the config's: lr, decay and epsilon have been changed since."""

    def check(stage: int, precision: str, world: World) -> list[str]:
        changed = ("optim.lr=3e-3", "optim.weight_decay=0.5", "optim.eps=1e-6", "optim.clip_norm=1e-3")
        old, new = zero_config(stage, precision, *changed), zero_config(stage, precision, *UPDATE)
        engine, folder = made_zero(old, world), shared_folder(world)
        run_steps(old, engine, world, 2)
        engine.save(folder, {}).result()
        resumed = made_zero(new, world)
        resumed.load(folder, {})
        return [*wrong_settings(new, resumed), *wrong_update(new, resumed, world)]

    return each(check, world, SOME)


def losses_differ_by(world: World) -> dict[str, Any]:
    """From fsdp2's, relative, over 10 steps of 2 micro-batches that are all clipped."""
    settings = (ACCUMULATED, "optim.clip_norm=0.05")
    config = configured("parallel.precision=fp32", *settings)
    expected: list[float] = []
    run_steps(config, made(config, world), world, 10, losses=expected)

    def check(stage: int, precision: str, world: World) -> list[float]:
        config, found = zero_config(stage, precision, *settings), []
        run_steps(config, made_zero(config, world), world, 10, losses=found)
        return [len(found), max(abs(a - b) / a for a, b in zip(expected, found, strict=True))]

    return each(check, world, [(stage, "fp32") for stage in STAGES])


def non_finite_step_changes(world: World) -> dict[str, Any]:
    def check(stage: int, precision: str, world: World) -> dict[str, float]:
        config = zero_config(stage, precision)
        engine = made_zero(config, world)
        ema = EMA(engine.master_shards(), (0.5,), warmup=False)
        run_steps(config, engine, world, 2)
        state = {name: tensor.clone() for name, tensor in local_state(engine).items()}
        result = run_steps(config, engine, world, 1, spoil=0)
        ema.update(2, result.skipped)
        return {
            "skipped": float(result.skipped),
            "moved": moved(state, engine),
            "average_finite": float(all(bool(t.isfinite().all()) for t in ema.tensors().values())),
            "next_moves": float(run_steps(config, engine, world, 1).skipped == 0 and moved(state, engine) > 0),
        }

    return each(check, world)


def swapped_weights(world: World) -> dict[str, Any]:
    """Within `swapped` the model computes with the averages, after it exactly as before."""

    def check(stage: int, precision: str, world: World) -> dict[str, float]:
        config = zero_config(stage, precision)
        engine = made_zero(config, world)
        half = {name: shard.clone() * 0.5 for name, shard in engine.master_shards().items()}
        run_steps(config, engine, world, 2)
        batch = next(iter_inputs(config, world))
        live = whole(engine)
        with torch.no_grad():
            before = engine.model(*batch)[0]
            with engine.swapped(half):
                within, weights = engine.model(*batch)[0], whole(engine)
            after = engine.model(*batch)[0]
            fsdp = made(configured(f"parallel.precision={precision}"), world)
            for name, shard in fsdp.master_shards().items():
                shard.copy_(fsdp.cut(name, weights[name]))
            expected = fsdp.model(*batch)[0]
        return {
            "off": float((within - expected).abs().max()),
            "differs": float((within - before).abs().max()),
            "given_back": float((after - before).abs().max()),
            "weights_given_back": worst(live, whole(engine)),
        }

    return each(check, world, SOME)


def iter_inputs(config: TrainConfig, world: World) -> Any:
    encoders, resolved = Encoders(config, world), resolve(config, world.size)
    objective = build_objective(config, resolved)
    reader = SyntheticReader(config.data, config.text_encoder, config.autoencoder, 0, 8, world.rank, world.size, 4)
    for _, batches in reader.batches(0):
        encoded = encoders.encode(batches[0])
        draw = objective.draw(encoded.x0, encoded.keys)
        yield draw.x_t, draw.t, encoded.condition


def save_and_load(world: World) -> dict[str, Any]:
    """A fresh engine that loads a checkpoint holds every number of it, and its next step is the same bit for bit."""

    def check(stage: int, precision: str, world: World) -> dict[str, float]:
        config = zero_config(stage, precision)
        one = made_zero(config, world)
        run_steps(config, one, world, 3)
        folder = shared_folder(world)
        average = {name: shard.clone() for name, shard in one.master_shards().items()}
        one.save(folder, {"totals": torch.arange(3.0), **{f"ema_0.5/{n}": t for n, t in average.items()}}).result()
        two = made_zero(dataclasses_seed(config), world)
        differed = moved(local_state(one), two)
        extra = {"totals": torch.zeros(3), **{f"ema_0.5/{n}": torch.zeros_like(t) for n, t in average.items()}}
        two.load(folder, extra)
        same = moved(local_state(one), two)
        run_steps(config, one, world, 1)
        run_steps(config, two, world, 1)
        return {
            "differed": differed,
            "same": same,
            "extra": max(float((extra[f"ema_0.5/{n}"] - t).abs().max()) for n, t in average.items() if t.numel()),
            "totals": float(extra["totals"].sum()),
            "next": moved(local_state(one), two),
        }

    return each(check, world, SOME)


def weights_of_fsdp2(world: World) -> dict[str, Any]:
    """run.init_from: difference of the weights from those of an fsdp2 checkpoint, before and after they are read."""
    config = configured()
    fsdp = made(dataclasses_seed(config), world)
    folder = shared_folder(world)
    fsdp.save(folder, {}).result()

    def check(stage: int, precision: str, world: World) -> list[float]:
        engine = made_zero(zero_config(stage, precision), world)
        before = worst(whole(fsdp), whole(engine))
        engine.load_weights(folder)
        return [before, worst(whole(fsdp), whole(engine))]

    return each(check, world, [(2, "bf16"), (3, "fp32")])


def planted_faults(world: World) -> dict[str, Any]:
    """What the checks above find where an engine is spoilt: none of them is blind."""
    config = zero_config(2, "fp32", *UPDATE)
    spoilt, scaled = made_zero(config, world), made_zero(config, world)
    spoilt._adam.param_groups[0]["lr"] *= 2
    scaled._adam.param_groups[0]["lr_scale"] *= 2
    settings = zero._settings

    def unset(*arguments: Any) -> dict[str, Any]:
        return {key: value for key, value in settings(*arguments).items() if key != "gradient_clipping"}

    zero._settings = unset
    try:
        made_zero(config, world)
        clipping = ""
    except AssertionError as error:
        clipping = str(error)
    finally:
        zero._settings = settings
    return {
        "lr": len(wrong_settings(config, spoilt)),
        "lr_scale": len(wrong_update(config, scaled, world)),
        "clipping": clipping,
    }


CHECKS = {
    check.__name__: check
    for check in (
        starts_as_the_table_says,
        one_step_of_zero_moves_as_the_table_says,
        one_step_after_a_resume,
        losses_differ_by,
        non_finite_step_changes,
        swapped_weights,
        save_and_load,
        weights_of_fsdp2,
        planted_faults,
    )
}


def main() -> None:
    torch.set_num_threads(1)
    world = init_world(int(sys.argv[1]))
    checks = {**CHECKS, one_step_moves_as_the_table_says.__name__: one_step_moves_as_the_table_says}
    results = {name: checks[name](world) for name in sys.argv[2:] or CHECKS}
    tell(world, results)


if __name__ == "__main__":
    main()
