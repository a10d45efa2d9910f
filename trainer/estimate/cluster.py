"""GPUs and their networks: what a collective of a step takes on a cluster of nodes.

Every rate is published, and the constants' comments say where; nothing here was measured by this project.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

GIB = 2**30
RESERVED_GIB = 3.0  # CUDA context, NCCL's buffers, fragmentation
# Seconds of a step of NCCL's ring with its protocol for large messages, over NVLink and over the network, and of a
# call: nccl, src/graph/tuning.cc, baseLatencies and hwLatencies (8.4, 3.4 and 14 us).
CALL_S, NVLINK_HOP_S, NETWORK_HOP_S = 8.4e-6, 3.4e-6, 14e-6


@dataclass(frozen=True)
class Card:
    """A GPU. Rates are those of one GPU in one direction, in 1e12 FLOP/s or 1e9 bytes/s.

    peak_tflops: bf16 of the data sheet, not sparse. matmul_tflops: the most that a matrix product was seen to reach.
    memory_gb: as sold, 1e9 bytes each. memory_gb_s: of the data sheet. nvlink_gb_s: NCCL's "bus" rate within a node.
    nic_gb_s: what the network card that each GPU has of its own was seen to carry. attention_tflops: by kernel, of its
    forward and its backward pass with 64 features a head; a kernel that is not there counts as "flash". fp8_tflops: as
    matmul_tflops, in fp8; None where parallel.precision fp8 is refused.
    """

    peak_tflops: float
    matmul_tflops: float
    memory_gb: float
    memory_gb_s: float
    multiprocessors: int
    nvlink_gb_s: float
    nic_gb_s: float
    attention_tflops: Mapping[str, tuple[float, float]]
    fp8_tflops: float | None = None


# Peak, memory and multiprocessors: data sheets of H100 SXM5, H200 SXM, DGX B200, A100 SXM 80 GB, MI300X.
# matmul_tflops: stas00/ml-engineering, "Maximum Achievable Matmul FLOPS": 794.5 (H100 and H200), 1745, 267.9, 781.9.
# fp8_tflops: its table for float8_e4m3fn (commit 744d01e): 1402.6 (H100), 1453.4 (H200), 3432.5 (B200).
# nvlink_gb_s: nccl, src/graph/topo.h: 18 links of 20.6 (Hopper: 370, NVIDIA/nccl-tests#212), 18 of 40.1 (Blackwell), 12
# of 20 (Ampere: 240, NVIDIA/nccl#1712). MI300X: seven links of 64, at the 0.82 that NCCL's protocol leaves of NVLink's.
# nic_gb_s: 46 to 48 of a 400 Gbit/s card (NVIDIA/nccl-tests#290), half of it for A100's 200 Gbit/s.
# attention_tflops: H100's are FlashAttention-2, -3 and cuDNN in the charts of arXiv 2407.08608 (512 tokens); A100's
# flash that of arXiv 2307.08691. "efficient" (CUTLASS, instructions of sm80) is ASSUMED, and so are MI300X and
# Blackwell, which runs both kernels without its own instructions.
_HOPPER_ATTENTION = {
    "flash": (282.0, 198.0),
    "flash3": (333.0, 272.0),
    "cudnn": (335.0, 266.0),
    "efficient": (180.0, 100.0),
}
CARDS = {
    "h100": Card(989, 794.5, 80, 3350, 132, 370, 47, _HOPPER_ATTENTION, 1402.6),
    "h200": Card(989, 794.5, 141, 4800, 132, 370, 47, _HOPPER_ATTENTION, 1453.4),
    "b200": Card(2250, 1745, 180, 8000, 148, 722, 47, {"flash": (400.0, 280.0), "efficient": (250.0, 140.0)}, 3432.5),
    "a100": Card(312, 267.9, 80, 2039, 108, 240, 23.5, {"flash": (170.0, 130.0), "efficient": (110.0, 70.0)}),
    "mi300x": Card(1307, 781.9, 192, 5300, 304, 367, 47, {"flash": (300.0, 190.0), "efficient": (300.0, 190.0)}),
}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs. mfu: model FLOP/s over the peak where they are known, in place of the arithmetic that
    is worked out. price: of a GPU-hour, in dollars."""

    gpus: int
    card: Card = CARDS["h100"]
    gpus_per_node: int = 8
    mfu: float | None = None
    price: float = 2.5

    @property
    def usable(self) -> int:
        """Bytes of a GPU that tensors may take."""
        return usable_bytes(self.card.memory_gb)


def usable_bytes(memory_gb: float) -> int:
    """Bytes that tensors may take of a GPU of memory_gb."""
    return round(memory_gb * 1e9 - RESERVED_GIB * GIB)


class Group(NamedTuple):
    """The ranks of a collective: on `nodes` nodes, `per_node` GPUs of each."""

    nodes: int
    per_node: int

    @property
    def size(self) -> int:
        return self.nodes * self.per_node


def shard_group(cluster: Cluster, shard: int) -> Group:
    """`shard` ranks that follow each other, as trainer.parallel.mesh places them."""
    per_node = min(shard, cluster.gpus_per_node)
    return Group(math.ceil(shard / per_node), per_node)


def replica_group(cluster: Cluster, shard: int) -> Group:
    """The ranks that hold the same shard, one in every `shard`."""
    replicas = cluster.gpus // shard
    per_node = min(replicas, max(1, cluster.gpus_per_node // shard))
    return Group(math.ceil(replicas / per_node), per_node)


def gather_seconds(card: Card, group: Group, size: float) -> float:
    """An all-gather to `size` bytes on every rank, or a reduce-scatter of as many: the faster of two ways.

    In a ring over all GPUs each node's network cards carry what its GPUs receive once, so that the rate is the slower
    of NVLink and of the cards together; it takes as many hops as there are ranks. The hierarchical way goes over the
    network between GPUs of one number and then over NVLink, with a hop for each node and each GPU of a node.
    """
    if group.size == 1:
        return 0.0
    ring = CALL_S + size * (group.size - 1) / group.size / (bus_gb_s(card, group) * 1e9)
    ring += (group.nodes - 1) * NETWORK_HOP_S + (group.size - group.nodes) * NVLINK_HOP_S
    between = size / group.per_node * (group.nodes - 1) / group.nodes / (card.nic_gb_s * 1e9)
    within = size * (group.per_node - 1) / group.per_node / (card.nvlink_gb_s * 1e9)
    hops = (group.nodes - 1) * NETWORK_HOP_S + (group.per_node - 1) * NVLINK_HOP_S
    return min(ring, 2 * CALL_S + between + within + hops)


def all_reduce_seconds(card: Card, group: Group, size: float) -> float:
    """An all-reduce of `size` bytes: a reduce-scatter and an all-gather, or up and down a tree of the nodes, whichever
    is faster."""
    if group.size == 1:
        return 0.0
    levels = math.ceil(math.log2(group.nodes)) * NETWORK_HOP_S + (group.per_node - 1) * NVLINK_HOP_S
    tree = CALL_S + 2 * size / (bus_gb_s(card, group) * 1e9) + 2 * levels
    return min(2 * gather_seconds(card, group, size), tree)


def bus_gb_s(card: Card, group: Group) -> float:
    """1e9 bytes/s at which each GPU of a ring receives."""
    return card.nvlink_gb_s if group.nodes == 1 else min(card.nvlink_gb_s, group.per_node * card.nic_gb_s)
