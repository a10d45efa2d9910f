"""Rates, clocks and versions of all processes of a job, and which of them fall short: how a slow node is found.

Every node reduces with two others, so that a bad link and a bad node can be told apart.
"""

import platform
import socket
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.cuda import nccl

from .mesh import World


class Measurement(NamedTuple):
    """What one process measured.

    matmul: TFLOP/s of matrix products. read: MB/s of a shard, None without shards. reduce: {other node: GB/s of an
    all-reduce with it}. clock_s: seconds by which its clock is ahead of that of process 0.
    """

    node: str
    matmul: float
    read: float | None
    reduce: dict[str, float]
    clock_s: float
    versions: str


def measure(world: World, read_rate: float | None, process_nodes: bool) -> list[Measurement]:
    """The measurements of all processes, by rank; every process must call it.

    read_rate: MB/s at which this process reads shards. process_nodes: take every process for a node of its own.
    """
    node = f"process {world.rank}" if process_nodes else socket.gethostname()
    nodes: list[Any] = [None] * world.size
    dist.all_gather_object(nodes, node, group=world.control)
    mine = Measurement(
        node,
        matmul_rate(world.device),
        read_rate,
        reduce_rates(world, nodes),
        clock_offset(world),
        versions(world.device),
    )
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, mine, group=world.control)
    return everyone


def matmul_rate(device: torch.device, seconds: float = 1.0) -> float:
    """TFLOP/s of products of square matrices: in bf16 on a GPU, in fp32 on a CPU. seconds: how long it measures."""
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    a = torch.ones(n, n, dtype=dtype, device=device)
    torch.mm(a, a)
    count, began = 0, _now(device)
    while (passed := _now(device) - began) < seconds:
        for _ in range(10):
            torch.mm(a, a)
        count += 10
    return 2 * n**3 * count / passed / 1e12


def reduce_rates(world: World, nodes: Sequence[str], repeats: int = 5) -> dict[str, float]:
    """{other node: GB/s} of an all-reduce over this node and each of its two neighbours in the ring of all nodes.

    nodes: the node of each rank. GB/s is the bus bandwidth: 2 (n - 1) / n times the buffer per second, for n processes.
    """
    names = list(dict.fromkeys(nodes))
    ring = list(zip(names, names[1:] + names[:1], strict=True)) if len(names) > 2 else [tuple(names)] * (len(names) > 1)
    buffer = torch.zeros(2**24 if world.device.type == "cuda" else 2**20, device=world.device)
    rates: dict[str, float] = {}
    # In each half of the ring the pairs share no node and reduce at the same time, as in training.
    for half in (ring[::2], ring[1::2]):
        for pair in half:
            ranks = [rank for rank, node in enumerate(nodes) if node in pair]
            group = dist.new_group(ranks)  # every process makes every group
            if world.rank in ranks:
                dist.all_reduce(buffer, group=group)
                began = _now(world.device)
                for _ in range(repeats):
                    dist.all_reduce(buffer, group=group)
                seconds = (_now(world.device) - began) / repeats
                peer = pair[1] if nodes[world.rank] == pair[0] else pair[0]
                rates[peer] = 2 * (len(ranks) - 1) / len(ranks) * buffer.nbytes / seconds / 1e9
        dist.barrier(group=world.control)
    return rates


def clock_offset(world: World) -> float:
    """Seconds by which this process's clock is ahead of that of process 0, to within the time that a barrier takes."""
    dist.barrier(group=world.control)
    times: list[Any] = [None] * world.size
    dist.all_gather_object(times, time.time(), group=world.control)
    return times[world.rank] - times[0]


def versions(device: torch.device) -> str:
    """Python, torch, and on a GPU its name, CUDA and NCCL."""
    gpu = "no GPU"
    if device.type == "cuda":
        gpu = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, NCCL {nccl.version()}"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {gpu}"


def judge(found: Sequence[Measurement], least: float, clock_s: float) -> list[str]:
    """One line per thing that falls short, which names the node.

    least: the least share of the median that a rate may have. clock_s: the most seconds that two clocks may differ.
    """
    problems = []

    def compare(rates: Sequence[tuple[str, float]], what: str, unit: str) -> None:
        if rates:
            median = statistics.median(rate for _, rate in rates)
            problems.extend(
                f"{who}: {what} {rate:.3g} {unit}, {rate / median:.0%} of the median {median:.3g}"
                for who, rate in rates
                if rate < least * median
            )

    named = [(f"{each.node} (process {rank})", each) for rank, each in enumerate(found)]
    compare([(who, each.matmul) for who, each in named], "matmul", "TFLOP/s")
    compare([(who, each.read) for who, each in named if each.read is not None], "shard read", "MB/s")
    # A node is slow where even its better pair is; a pair alone is a link.
    best: dict[str, float] = {}
    for each in found:
        if each.reduce:
            best[each.node] = max(best.get(each.node, 0.0), *each.reduce.values())
    compare(list(best.items()), "all-reduce with any node", "GB/s")
    common = Counter(each.versions for each in found).most_common(1)[0][0]
    for who, each in named:
        if each.versions != common:
            problems.append(f"{who}: {each.versions}; the others have {common}")
        if abs(each.clock_s) > clock_s:
            problems.append(f"{who}: its clock is {each.clock_s:+.1f} s off that of process 0")
    return problems


def describe(found: Sequence[Measurement], problems: Sequence[str]) -> str:
    """A table with a line per process, and the problems below it."""
    lines = [f"{'node':<24}{'matmul TFLOP/s':>16}{'read MB/s':>12}{'clock s':>10}  all-reduce GB/s"]
    for each in found:
        read = "-" if each.read is None else f"{each.read:.0f}"
        reduce = ", ".join(f"{rate:.2f} with {peer}" for peer, rate in each.reduce.items())
        lines.append(f"{each.node:<24}{each.matmul:16.3g}{read:>12}{each.clock_s:+10.3f}  {reduce}")
    return "\n".join([*lines, "", *(problems or ["all alike"])])


def _now(device: torch.device) -> float:
    """Seconds of a clock that only rises, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
