"""Work that ranks share, and errors that all ranks hear of."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from data.errors import DataError

from .errors import CheckpointError, ConfigError
from .parallel.mesh import World

T = TypeVar("T")


def together(action: Callable[[], T], group: dist.ProcessGroup) -> list[T]:
    """action() on every rank; the results by rank. Where it fails on any rank, CheckpointError is raised on all: none
    waits for one that has given up."""
    mine: tuple[Any, str | None]
    try:
        mine = action(), None
    except CheckpointError as error:
        mine = None, str(error)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        mine = None, f"{type(error).__name__}: {error}"
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for _, error in everyone:
        if error is not None:
            raise CheckpointError(error)
    return [result for result, _ in everyone]


def on_rank_0(world: World, make: Callable[[], T]) -> T | None:
    """make() on rank 0 alone, None elsewhere; a user's mistake that rank 0 finds, or a full disk, is raised on all."""
    result: T | None = None
    error: list[Any] = [None]
    if world.rank == 0:
        try:
            result = make()
        except (ConfigError, DataError, CheckpointError, OSError) as caught:
            error[0] = caught
    dist.broadcast_object_list(error, src=0, group=world.control)
    if error[0] is not None:
        raise error[0]
    return result


def from_rank_0(world: World, make: Callable[[], T]) -> T:
    """What make() returns on rank 0, on all ranks; its errors as in on_rank_0."""
    result: list[Any] = [on_rank_0(world, make)]
    dist.broadcast_object_list(result, src=0, group=world.control)
    return result[0]


def first_on_rank_0(world: World, make: Callable[[], T]) -> T:
    """make() on rank 0, then on the others, so that files are built once."""
    result = on_rank_0(world, make)
    return make() if result is None else result
