"""The world of a run: ranks, device, device mesh, and the two process groups beside it."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import ConfigError
from .rendezvous import open_store


@dataclass(frozen=True)
class Ranks:
    """The processes of a job. `control` and `checkpoint` are gloo groups of their own: an asynchronous save on the
    default group deadlocks with training, and control messages must not queue behind gradients."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    checkpoint: dist.ProcessGroup

    def world(self, shard: int) -> "World":
        """The same with their mesh. shard: ranks that share a copy of the weights."""
        mesh = init_device_mesh(self.device.type, (self.size // shard, shard), mesh_dim_names=("replicate", "shard"))
        return World(self.rank, self.size, self.device, self.control, self.checkpoint, mesh)


@dataclass(frozen=True)
class World(Ranks):
    """Ranks that share a model. mesh axes: replicate x shard."""

    mesh: DeviceMesh


def world_size() -> int:
    """Processes of this job, as torchrun (or launch.ranks, under srun) tells; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, as torchrun tells; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def init_world(shard: int) -> World:
    """Join the process group (of one process without torchrun). shard: ranks that share a copy of the weights."""
    return _join().world(shard)


def _join() -> Ranks:
    size = world_size()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", _local_gpu()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        # cuDNN's attention, the default on H100 and later, gives NaN gradients with a mask at lengths of 64 more than
        # a multiple of 128 (pytorch issue 196678, 2.11 to 2.13), and plans anew for each shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        # In bf16 the CPU's flash attention has a slow backward pass: a step of the demo takes twice as long with it.
        torch.backends.cuda.enable_flash_sdp(False)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, store=open_store(rank(), size), rank=rank(), world_size=size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(dist.get_rank(), size, device, control=_gloo_group(), checkpoint=_gloo_group())


@contextmanager
def open_ranks() -> Iterator[Ranks]:
    """The ranks of this job for a block of code, at whose end their process groups end: for commands that must talk
    before they know how the weights are shared."""
    ranks = _join()
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def open_world(shard: int) -> Iterator[World]:
    """init_world for a block of code; its process groups end with the block."""
    with open_ranks() as ranks:
        yield ranks.world(shard)


def open_board(world: World) -> dist.Store:
    """Keys that all ranks share, over a connection of its own to the rendezvous store: a thread can use it while
    another one waits in a collective. The same call on all ranks; empty at first, also after an elastic restart."""
    store = dist.distributed_c10d._get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
    name = [secrets.token_hex(8)]
    dist.broadcast_object_list(name, src=0, group=world.control)
    return dist.PrefixStore(name[0], store)


def _local_gpu() -> int:
    """Number of this process's GPU. Raises ConfigError where a node has more processes than GPUs."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(f"LOCAL_RANK is {number} and this process sees {count} GPUs: start one process per GPU")
    return number


def _gloo_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group
