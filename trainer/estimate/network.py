"""The collectives of a step: how many, how many bytes a GPU receives by them, and how long they take."""

from collections.abc import Mapping
from typing import NamedTuple

from ..config.resolve import Resolved, keeps_gathered
from ..config.schema import TrainConfig
from .cluster import Cluster, all_reduce_seconds, gather_seconds, replica_group, shard_group


class Collective(NamedTuple):
    """All collectives of one kind in a step. bytes: those that a rank receives."""

    calls: int
    bytes: float
    seconds: float


class Network(NamedTuple):
    """The collectives of a step by name. exposed_s: of the seconds, those that no arithmetic can hide: before the first
    block's weights are there, and after the last gradient."""

    collectives: dict[str, Collective]
    exposed_s: float

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.collectives.values())

    def after_gradients(self, more: Mapping[str, Collective]) -> "Network":
        """With collectives of the update, for which the norm of all gradients must be known."""
        return Network({**self.collectives, **more}, self.exposed_s + sum(each.seconds for each in more.values()))


def network(
    config: TrainConfig, cluster: Cluster, resolved: Resolved, units: list[int], rest: int, micro_batches: int
) -> Network:
    """What FSDP2 sends in a step, as trainer.parallel.fsdp has set it up.

    units: parameters of each block, which is gathered for the forward pass and, where it was freed, for the backward
    pass; what activation checkpointing computes again finds it gathered. rest: the parameters outside the blocks,
    gathered once. Gradients are reduced within the shard group in every micro-batch, or, where weights stay gathered,
    in the last; between replicas in the last, each rank its shard.
    """
    card, parallel = cluster.card, config.parallel
    weight, gradient = (2, 4) if parallel.precision in ("bf16", "fp8", None) else (4, 4)
    sizes = [*units, rest]
    shards, replicas = shard_group(cluster, resolved.shard), replica_group(cluster, resolved.shard)
    freed = not keeps_gathered(config, sum(sizes))
    rounds = micro_batches if freed else 1
    kept = (shards.size - 1) / shards.size  # of what is gathered, this comes from the other ranks

    def gathers(sizes: list[int], width: int, rounds: int) -> Collective:
        seconds = sum(gather_seconds(card, shards, width * size) for size in sizes)
        return Collective(rounds * len(sizes), rounds * width * sum(sizes) * kept, rounds * seconds)

    found = {}
    if shards.size > 1:
        found["allgather"] = gathers([*sizes, *(units if freed else [])], weight, rounds)
        found["reduce_scatter"] = gathers(sizes, gradient, rounds)
    if replicas.size > 1:
        parts = [gradient * size / resolved.shard for size in sizes]
        received = 2 * sum(parts) * (replicas.size - 1) / replicas.size
        seconds = sum(all_reduce_seconds(card, replicas, part) for part in parts)
        found["allreduce"] = Collective(len(parts), received, seconds)
    first, last = units[0] if units else 0, rest
    exposed = sum(gather_seconds(card, shards, weight * size) for size in (rest, first))
    exposed += gather_seconds(card, shards, gradient * last)
    exposed += all_reduce_seconds(card, replicas, gradient * last / resolved.shard)
    return Network(found, exposed)
