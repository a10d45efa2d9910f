"""Keys that are fine alone and wrong together, of the engines."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TrainConfig


def zero_conflicts(c: "TrainConfig") -> Iterator[str]:
    """What parallel.engine zero does not do."""
    parallel = c.parallel
    if parallel.engine != "zero":
        return
    if parallel.precision == "fp64":
        yield "parallel.precision fp64 needs parallel.engine fsdp2: zero has fp32 and bf16"
    if parallel.shard != 0:
        yield "parallel.shard must be 0 under parallel.engine zero, which shards over all ranks; fsdp2 has replicas"
    if not parallel.reshard_after_forward:
        yield "parallel.reshard_after_forward false is of parallel.engine fsdp2: under zero use parallel.zero_stage 2"
    if parallel.cpu_offload:
        yield "parallel.cpu_offload needs parallel.engine fsdp2"
    if parallel.compile and parallel.zero_stage == 3:
        yield "parallel.compile does not go with parallel.zero_stage 3: use stage 2, or parallel.engine fsdp2"
    if c.optim.spike_threshold is not None:
        yield "optim.spike_threshold needs parallel.engine fsdp2: leave it null under zero"
    if c.train.rollback_after > 0:
        yield "train.rollback_after needs parallel.engine fsdp2: leave it 0 under zero"
    if c.train.ema_snapshot_every > 0:
        yield "train.ema_snapshot_every needs parallel.engine fsdp2: leave it 0 under zero"
