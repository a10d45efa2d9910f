"""Frozen modules that one rank has read: a copy on every rank, or shards over the ranks of a node."""

import os
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def spread(read: nn.Module | None, module: nn.Module, device: torch.device, shard: bool) -> None:
    """Put on `device` what rank 0 has in `read` (None elsewhere), one tensor at a time.

    module: the same on the meta device, on every rank. shard: each rank of a node keeps a part, and a forward pass
    gathers one layer at a time: it must then run equally often on all ranks.
    """
    if shard:
        # A group of its own: forward passes go on beside the training step, in no common order with its collectives.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        group, _ = dist.new_subgroups(ranks)
        assert isinstance(group, dist.ProcessGroup)  # every rank is a member
        part = partial(fully_shard, mesh=DeviceMesh.from_group(group, device.type), reshard_after_forward=True)
        for layer in _layers(module):
            part(layer)
        part(module)
    module.to_empty(device=device)
    source = {} if read is None else dict(_tensors(read))
    for name, target in _tensors(module).items():
        whole = torch.empty(target.shape, dtype=target.dtype, device=device)
        if read is not None:
            whole.copy_(source[name])
        dist.broadcast(whole, src=0)
        if isinstance(target, DTensor):
            own = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(own.to_local())
        else:
            target.copy_(whole)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; one that has two names (tied embeddings) twice."""
    return dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))


def _layers(module: nn.Module) -> list[nn.Module]:
    """The elements of the module list with the most weights: the layers of an encoder."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=nn.ModuleList()))
