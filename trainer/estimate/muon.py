"""What Muon adds to a step: polar factors on the GPUs that own the matrices, and the way there and back. A model.

As trainer.parallel.owners shares them out: over the shard group and its copies, by the work.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from ..mup.table import MuTable
from ..parallel.polar import multiply_adds
from .arithmetic import STREAMED, Product
from .cluster import Card, Cluster, Group, replica_group, shard_group
from .network import Collective

_SENT = 2  # bytes a number on its way, in bf16
# Bytes of each number of a shard beside its polar factor: the mean of the gradient (20), Nesterov's step (12), the cast
# (6), the weight (10); where AdamW reads and writes 28.
UPDATE_BYTES = 48 - 28
# Of each number of an owned matrix: put together and stacked (8), its norm and the division by it (6), taken apart and
# put in the shard's place (8); and a step of the iteration, whose products read and write the rest.
_OWNED_BYTES = 22


class Matrices(NamedTuple):
    """So many matrices of one shape."""

    rows: int
    columns: int
    number: int

    @property
    def numbers(self) -> int:
        return self.rows * self.columns * self.number


def matrices_of(table: MuTable) -> list[Matrices]:
    """What Muon moves, each parameter's matrices for themselves; none under AdamW."""
    rows = [row for row in table.rows.values() if row.optimizer == "muon"]
    return [Matrices(row.shape[0] // row.matrices, row.shape[1], row.matrices) for row in rows]


def state_numbers(table: MuTable) -> int:
    """Numbers that the optimizers keep: two for each weight of AdamW's, one for each of Muon's."""
    return sum(math.prod(row.shape) * (1 if row.optimizer == "muon" else 2) for row in table.rows.values())


def polar_flops(matrices: Iterable[Matrices], steps: int) -> int:
    """Of all polar factors of a step, over all GPUs: each matrix is computed once."""
    return sum(2 * each.number * multiply_adds(each.rows, each.columns, steps) for each in matrices)


def polar_seconds(matrices: Iterable[Matrices], steps: int, gpus: int, card: Card) -> float:
    """On the GPU with the most work: its share of all, or one of the largest matrices."""
    total = largest = 0.0
    for rows, columns, number in matrices:
        short, long = sorted((rows, columns))
        products = (Product(short, short, long), Product(short, short, short), Product(short, long, short))
        seconds = steps * sum(product.seconds(card) for product in products)
        seconds += _OWNED_BYTES * rows * columns / (STREAMED * card.memory_gb_s * 1e9)
        total += number * seconds
        largest = max(largest, seconds)
    return max(total / gpus, largest)


def exchanges(matrices: Iterable[Matrices], cluster: Cluster, shard: int) -> dict[str, Collective]:
    """What a rank receives: rows of the matrices that it owns, then its rows of all results, within the shard group;
    and from the other copies (HSDP) the results that are theirs. As one exchange: buckets are large."""
    numbers = sum(each.numbers for each in matrices)
    shards, copies = shard_group(cluster, shard), replica_group(cluster, shard)
    found: dict[str, Collective] = {}
    if numbers and shards.size > 1:
        one_way = _SENT * numbers / cluster.gpus * (shards.size - 1) / shards.size
        found["all_to_all"] = Collective(2, 2 * one_way, 2 * _all_to_all_seconds(cluster.card, shards, one_way))
    if numbers and copies.size > 1:
        received = _SENT * numbers / shards.size * (copies.size - 1) / copies.size
        rate = cluster.card.nvlink_gb_s if copies.nodes == 1 else cluster.card.nic_gb_s
        found["broadcast"] = Collective(copies.size, received, received / (rate * 1e9))
    return found


def _all_to_all_seconds(card: Card, group: Group, received: float) -> float:
    """What comes from other nodes is limited by the GPU's network card, the rest by NVLink; both at once."""
    others = group.size - group.per_node
    between = received * others / (group.size - 1)
    return max(between / (card.nic_gb_s * 1e9), (received - between) / (card.nvlink_gb_s * 1e9))
