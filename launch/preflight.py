"""Look for the slow node before a job does: rates of every process and pair of nodes, clocks, versions.

srun --nodes 32 --ntasks-per-node 8 --gpus-per-node 8 python launch/preflight.py --config mmdit_18b_mup.yaml
torchrun --nproc-per-node 2 launch/preflight.py --config mmdit_debug_mup.yaml

Every node reduces with two others, so that a bad link and a bad node can be told apart. Exits 1 and names the node
where a rate is below --least of the median, a clock is more than --clock-s off, or versions differ.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.cuda import nccl

from data.config import DataConfig
from data.storage import Remote, RetryPolicy, Shard, file_version, open_shards, read_remote
from launch.common import run
from trainer.config.load import load_config
from trainer.parallel.mesh import World, init_world

READ_BYTES, CHUNK_BYTES = 64 * 2**20, 2**22


class Found(NamedTuple):
    """What one process measured. Rates: TFLOP/s, MB/s, GB/s by the peer node; clock_s: ahead of process 0."""

    node: str
    matmul: float
    read: float | None
    reduce: dict[str, float]
    clock_s: float
    versions: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name under configs/: whose shards are read")
    parser.add_argument("--least", type=float, default=0.8, help="least share of the median rate")
    parser.add_argument("--clock-s", type=float, default=1.0, help="the most that two clocks may differ")
    parser.add_argument("--process-nodes", action="store_true", help="take every process for a node (one machine)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    under_srun()
    world = init_world(1)
    try:
        found = measure(world, config.data, arguments.process_nodes)
        problems = judge(found, arguments.least, arguments.clock_s)
        if world.rank == 0:
            written = {"passed": not problems, "problems": problems, "processes": [each._asdict() for each in found]}
            print(json.dumps(written, indent=1) if arguments.json else describe(found, problems), flush=True)
        dist.barrier(group=world.control)  # a launcher ends all processes as soon as one exits with 1
    finally:
        dist.destroy_process_group()
    return 1 if problems else 0


def under_srun() -> None:
    """srun starts a process as torchrun does, but names rank and world otherwise."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ:
        return
    nodes = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    head = subprocess.run(nodes, capture_output=True, text=True, check=True).stdout.split()[0]
    one = os.environ["SLURM_NNODES"] == "1"
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "MASTER_ADDR": "localhost" if one else head,
        "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000),
    }


def measure(world: World, data: DataConfig, process_nodes: bool) -> list[Found]:
    """The findings of all processes, in their order."""
    node = f"process {world.rank}" if process_nodes else socket.gethostname()
    nodes: list[Any] = [None] * world.size
    dist.all_gather_object(nodes, node, group=world.control)
    mine = Found(
        node,
        matmul_rate(world.device),
        None if data.synthetic else read_rate(open_shards(data.all_sources()[0].shards), world.rank),
        reduce_rates(world, nodes),
        clock(world),
        versions(world.device),
    )
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, mine, group=world.control)
    return everyone


def matmul_rate(device: torch.device, seconds: float = 1.0) -> float:
    """TFLOP/s of square products: bf16 on a GPU, fp32 on a CPU."""
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


def read_rate(shards: Sequence[Shard], rank: int) -> float:
    """MB/s from a shard that no other process reads, if there are enough."""
    shard, retry = shards[rank % len(shards)], RetryPolicy()
    size = min(file_version(shard, retry)[0], READ_BYTES)
    if isinstance(shard, Path) and hasattr(os, "posix_fadvise"):
        with open(shard, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from this node's memory
    began = time.perf_counter()
    for start in range(0, size, CHUNK_BYTES):
        count = min(CHUNK_BYTES, size - start)
        if isinstance(shard, Remote):
            read_remote(shard.url, start, start + count, retry, start)
        else:
            with open(shard, "rb", buffering=0) as file:
                os.pread(file.fileno(), count, start)
    return size / (time.perf_counter() - began) / 1e6


def reduce_rates(world: World, nodes: Sequence[str], repeats: int = 5) -> dict[str, float]:
    """GB/s by which a GPU of this node reduces with each of two neighbours in the ring of nodes (bus bandwidth)."""
    names = list(dict.fromkeys(nodes))
    ring = list(zip(names, names[1:] + names[:1], strict=True)) if len(names) > 2 else [tuple(names)] * (len(names) > 1)
    buffer = torch.zeros(2**24 if world.device.type == "cuda" else 2**20, device=world.device)
    rates: dict[str, float] = {}
    # Pairs that share no node reduce at the same time, as in training.
    for turn in (ring[::2], ring[1::2]):
        for pair in turn:
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


def clock(world: World) -> float:
    """Seconds that this clock is ahead of process 0's, up to the time of a barrier."""
    dist.barrier(group=world.control)
    times: list[Any] = [None] * world.size
    dist.all_gather_object(times, time.time(), group=world.control)
    return times[world.rank] - times[0]


def versions(device: torch.device) -> str:
    gpu = "no GPU"
    if device.type == "cuda":
        gpu = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, NCCL {nccl.version()}"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {gpu}"


def judge(found: Sequence[Found], least: float, clock_s: float) -> list[str]:
    """One line for each thing that falls short, with the node."""
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


def describe(found: Sequence[Found], problems: Sequence[str]) -> str:
    lines = [f"{'node':<24}{'matmul TFLOP/s':>16}{'read MB/s':>12}{'clock s':>10}  all-reduce GB/s"]
    for each in found:
        read = "-" if each.read is None else f"{each.read:.0f}"
        reduce = ", ".join(f"{rate:.2f} with {peer}" for peer, rate in each.reduce.items())
        lines.append(f"{each.node:<24}{each.matmul:16.3g}{read:>12}{each.clock_s:+10.3f}  {reduce}")
    return "\n".join([*lines, "", *(problems or ["all alike"])])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    run(main)
