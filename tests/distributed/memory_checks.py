"""What the ways of saving memory must keep, on every rank; run by test_memory.py under torchrun, JSON on stdout."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import trainer.build.engine
from trainer.parallel.compile import compile_units
from trainer.parallel.mesh import World, init_world

from .engine_checks import (
    configured,
    made,
    non_finite_step_changes_nothing,
    run_steps,
    save_and_load,
    swapped_weights_are_used_and_given_back,
    tell,
    whole,
    worst,
)

# Two micro-batches a step on each of two ranks, three blocks.
SETTINGS = ("parallel.precision=fp64", "train.micro_batch_size=0.03125", "model.depth=3")
FREE = "parallel.reshard_after_forward=true"
PLAIN = ("parallel.prefetch=0",)
KEEP = ("parallel.reshard_after_forward=false",)
SHIPPED = "as_shipped"  # a small model keeps its gathered weights
WAYS: dict[str, tuple[str, ...]] = {
    SHIPPED: (),
    "keep_gathered": KEEP,
    "prefetch_1": ("parallel.prefetch=1",),
    "prefetch_2": ("parallel.prefetch=2",),
    "cpu_offload": ("parallel.cpu_offload=true",),
    "selective": ("parallel.activation_checkpointing=selective",),
    "full": ("parallel.activation_checkpointing=full",),
    "full_replicas": ("parallel.activation_checkpointing=full", "parallel.shard=1"),
    "keep_gathered_replicas": (*KEEP, "parallel.shard=1"),
    "compile_selective": ("parallel.compile=true", "parallel.activation_checkpointing=selective"),
    "all": (*KEEP, "parallel.prefetch=2", "parallel.cpu_offload=true", "parallel.activation_checkpointing=full"),
}


def with_mesh(world: World, ways: tuple[str, ...]) -> World:
    """The world as parallel.shard=1 asks for it: every rank holds a whole copy."""
    if "parallel.shard=1" not in ways:
        return world
    mesh = init_device_mesh("cpu", (world.size, 1), mesh_dim_names=("replicate", "shard"))
    return dataclasses.replace(world, mesh=mesh)


def freeing(ways: tuple[str, ...]) -> tuple[str, ...]:
    """The settings, with gathered weights freed unless they keep them."""
    return ways if KEEP[0] in ways else (*ways, FREE)


def trained(world: World, *ways: str) -> dict[str, Tensor]:
    """Weights after three steps, and the last step's gradient norm."""
    config, world = configured(*SETTINGS, *ways), with_mesh(world, ways)
    engine = made(config, world)
    result = run_steps(config, engine, world, 3)
    return {**whole(engine), "grad_norm": result.grad_norm}


def trains_alike(world: World) -> dict[str, float]:
    """Largest difference that each way makes to the weights and the gradient norm, and what three steps do ("moved").

    Compiled without code generation: that is tests/unit/trainer/parallel/test_compile.py's."""
    trainer.build.engine.compile_units = partial(compile_units, backend="eager")
    plain = trained(world, *freeing(PLAIN))
    start = whole(made(configured(*SETTINGS), world))
    differences = {
        name: worst(plain, trained(world, *(ways if name == SHIPPED else freeing(ways)))) for name, ways in WAYS.items()
    }
    return {**differences, "moved": min(float((plain[name] - start[name]).abs().max()) for name in start)}


class Collectives(TorchDispatchMode):
    """Counts gathers of weights and reductions of gradients; other sums are of scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.") and not (name.startswith("c10d.allreduce") and args[0][0].numel() == 1):
            self.counts[name.split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


def collectives(world: World) -> dict[str, dict[str, int]]:
    """Collectives of the second step, whose three blocks and root are four groups, in two micro-batches."""
    counts: dict[str, dict[str, int]] = {}
    ways = {
        "free": (*PLAIN, FREE),
        "prefetch": ("parallel.prefetch=2", FREE),
        "keep": KEEP,
        "shipped": (),
        "keep_offload": (*KEEP, *WAYS["cpu_offload"]),
    }
    ways |= {"replicas": ("parallel.shard=1", FREE)}
    for name, way in ways.items():
        config, mesh = configured(*SETTINGS, *way), with_mesh(world, way)
        engine = made(config, mesh)
        run_steps(config, engine, mesh, 1)
        with Collectives() as counter:
            run_steps(config, engine, mesh, 1)
        counts[name] = dict(counter.counts)
    return counts


CHECKS: dict[str, Callable[[World], Any]] = {
    "trains_alike": trains_alike,
    "collectives": collectives,
    "swapped_keep_gathered": lambda world: swapped_weights_are_used_and_given_back(world, *KEEP),
    "non_finite_cpu_offload": lambda world: non_finite_step_changes_nothing(world, *WAYS["cpu_offload"]),
    "save_and_load_cpu_offload": lambda world: save_and_load(world, *WAYS["cpu_offload"]),
}


def main() -> None:
    torch.set_num_threads(1)
    world = init_world(2)
    results = {name: check(world) for name, check in CHECKS.items()}
    tell(world, results)


if __name__ == "__main__":
    main()
