"""The fsdp2 engine: fully_shard per unit (HSDP on a 2-D mesh), fused AdamW with groups by name.

The order matters and raises nothing when wrong: shard, materialise, fill buffers, init, and only then build the
optimizer; one built before fully_shard trains nothing. On one process single.SingleEngine does the same without FSDP2.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .dcp import AsyncSaver, load_tensors
from .engine import StepResult, Watch, exchange
from .mesh import World
from .muon import MuonSettings
from .owners import Ranks
from .precision import DTYPES, Precision
from .update import Update, squared_norms, total_norm


@dataclass(frozen=True)
class Sharding:
    """reshard_after_forward: free a unit's gathered weights between forward and backward pass; if not, they stay over
    all micro-batches of a step. prefetch: units gathered ahead of use, 0 as FSDP2 does by itself. cpu_offload: shards
    of weights, gradients and optimizer state live in the host's memory, where the optimizer then runs."""

    reshard_after_forward: bool = True
    prefetch: int = 0
    cpu_offload: bool = False


class FSDP2Engine:
    """See engine.Engine.

    model: on the meta device, unsharded. units: the parts gathered one at a time, in the order of the forward pass.
    initialise: fills buffers and parameters once they exist. groups: optimizer groups for the sharded named parameters.
    muon: None where none of them is Muon's.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        world: World,
        precision: Precision,
        sharding: Sharding,
        initialise: Callable[[nn.Module], None],
        groups: Callable[[dict[str, Tensor]], list[dict[str, Any]]],
        betas: tuple[float, float],
        clip_norm: float | None,
        muon: MuonSettings | None = None,
    ) -> None:
        self._world = world
        self._saver = AsyncSaver(world.device, world.checkpoint)
        model.to(torch.float64 if precision == "fp64" else torch.float32)
        narrow = DTYPES[precision] is torch.bfloat16
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if narrow else None,
            reduce_dtype=torch.float32 if narrow else None,
            # A cast of the inputs would round t to 8 bits: the models cast what they want cast.
            cast_forward_inputs=False,
        )
        pinned = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        offload = pinned if sharding.cpu_offload else OffloadPolicy()
        # One copy of the weights needs no all-reduce between copies.
        copies = world.mesh["replicate"]
        self._copies = copies.get_group() if copies.size() > 1 else None
        self._shard_group = world.mesh["shard"].get_group()
        mesh = world.mesh if copies.size() > 1 else world.mesh["shard"]
        shard = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offload)
        sharded = [shard(unit, reshard_after_forward=sharding.reshard_after_forward) for unit in units]
        # The root's own weights end the forward pass and begin the backward pass: they stay.
        self._root: FSDPModule = shard(model, reshard_after_forward=False)
        _prefetch(self._root, sharded, sharding.prefetch)
        self._keeps_weights = not sharding.reshard_after_forward
        self.model = model
        model.to_empty(device="cpu" if sharding.cpu_offload else world.device)
        if sharding.cpu_offload:
            _move_buffers(model, world.device)
        initialise(model)
        self._parameters: dict[str, DTensor] = {}
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), name
            self._parameters[name] = parameter
        shards = {name: _detached(parameter).to_local() for name, parameter in self._parameters.items()}
        ranks = Ranks(self._shard_group if self._shard_group.size() > 1 else None, self._copies)
        self._update = Update(shards, groups, betas, clip_norm, muon, ranks, world.device, DTYPES[precision])

    def backward(self, loss: Tensor, last: bool) -> None:
        # Hooks of FSDP2 reduce the gradients within loss.backward. Left to the last micro-batch, they would be held
        # whole on every rank until then (fp32: 71 GB at 18B): that is for models whose weights stay gathered as well.
        # The sum over replicas, of shards, always waits for the last.
        if self._keeps_weights:
            self._root.set_requires_gradient_sync(last)
            self._root.set_reshard_after_backward(last)
        else:
            self._root.set_requires_all_reduce(last)
        loss.backward()

    def step(self, lr: float, watch: Watch | None = None, max_norm: Tensor | None = None) -> StepResult:
        gradients = self._gradient_shards()
        result = self._update.step(gradients, self._norm(gradients), lr, watch, max_norm)
        for parameter in self._parameters.values():
            parameter.grad = None
        device = self._world.device  # under cpu_offload they are in the host's memory
        return StepResult(*(scalar.to(device) for scalar in result))

    def _norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The norm of all gradients, on the shards' device; the same on all ranks."""
        squared = squared_norms(gradients)  # [T], of this rank's shards
        parts = squared.to(self._world.device)  # under cpu_offload they are in the host's memory
        if self._shard_group.size() > 1:
            dist.all_reduce(parts, group=self._shard_group)
        norm = total_norm(parts)
        if self._copies is not None:
            # Copies of the weights may add up the shards' parts in another order: one of them decides for all.
            dist.broadcast(norm, group=self._copies, group_src=0)
        return norm.to(squared.device)

    def optimizer_settings(self) -> dict[str, tuple[float, float, float]]:
        return self._update.settings()

    def master_shards(self) -> dict[str, Tensor]:
        return dict(self._update.shards)

    @torch.no_grad()
    def _gradient_shards(self) -> dict[str, Tensor]:
        shards: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                assert isinstance(parameter.grad, DTensor), name
                shards[name] = parameter.grad.to_local()
        return shards

    def full(self, name: str) -> Tensor:
        return _detached(self._parameters[name]).full_tensor()

    def state(self) -> dict[str, dict[str, Tensor]]:
        return self._update.state()

    def cut(self, name: str, full: Tensor) -> Tensor:
        parameter = self._parameters[name]
        return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()

    def whole(self, name: str, shard: Tensor) -> Tensor:
        return _like(shard, self._parameters[name]).full_tensor()

    @contextmanager
    def swapped(self, shards: Mapping[str, Tensor]) -> Iterator[None]:
        self._swap(shards)
        try:
            yield
        finally:
            self._swap(shards)

    @torch.no_grad()
    def _swap(self, shards: Mapping[str, Tensor]) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a gathered copy would be stale
        exchange(self.master_shards(), shards)

    def save(self, folder: Path, extra: Mapping[str, Tensor], averages_only: bool = False) -> Future[None]:
        return self._saver.save(folder, self._share(self._sharded(extra) if averages_only else self._tensors(extra)))

    def _share(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this copy of the weights writes: else the host memory of each would hold what one of them writes."""
        if self._copies is None:
            return tensors
        copies, own = dist.get_world_size(self._copies), dist.get_rank(self._copies)
        sharded = [name for name, tensor in tensors.items() if isinstance(tensor, DTensor)]
        others = {name for number, name in enumerate(sharded) if number % copies != own}
        return {name: tensor for name, tensor in tensors.items() if name not in others}

    def load(self, folder: Path, extra: Mapping[str, Tensor]) -> None:
        load_tensors(folder, self._tensors(extra), self._world.checkpoint)

    def load_weights(self, folder: Path, group: str = "model", names: Collection[str] | None = None) -> None:
        wanted = self._parameters.keys() if names is None else names
        weights = {f"{group}/{name}": self._parameters[name].detach() for name in wanted}
        load_tensors(folder, weights, self._world.checkpoint)

    def _tensors(self, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Everything of a checkpoint under one name each, shards as DTensors that share memory."""
        return self._sharded({**self._update.tensors(), **extra})

    def _sharded(self, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`extra` with the shards among it as DTensors. The counts of updates are no shards, though they are named
        like them."""
        tensors: dict[str, Tensor] = {}
        for key, tensor in extra.items():
            group, _, name = key.partition("/")
            whole = group == "step" or name not in self._parameters
            tensors[key] = tensor if whole else _like(tensor, self._parameters[name])
        return tensors


def _detached(parameter: DTensor) -> DTensor:
    detached = parameter.detach()
    assert isinstance(detached, DTensor)
    return detached


def _prefetch(root: FSDPModule, units: Sequence[FSDPModule], ahead: int) -> None:
    """Gather `ahead` units before their turn.

    The root's own weights come first in both passes. Backwards, what it gathers ahead is left to FSDP2: a list would be
    gathered at the gradient of each of its outputs, with REPA's features once more when it has been used.
    """
    if ahead == 0:
        return
    forward, backward = [root, *units], list(reversed(units))
    for order, set_following in (
        (forward, FSDPModule.set_modules_to_forward_prefetch),
        (backward, FSDPModule.set_modules_to_backward_prefetch),
    ):
        for number, module in enumerate(order):
            set_following(module, order[number + 1 : number + 1 + ahead])


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _like(shard: Tensor, parameter: DTensor) -> DTensor:
    """This rank's shard as a DTensor in the parameter's layout. Not by from_local, which would copy a shard in the
    host's memory to the mesh's device."""
    return DTensor(shard, parameter._spec, requires_grad=False)
