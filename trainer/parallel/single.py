"""The fsdp2 engine on one process: plain modules, without FSDP2.

On one process FSDP2 would copy every weight at each use and call Python for each of them. Losses, weights and
checkpoints are those of FSDP2Engine on one process bit for bit, in every precision.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .dcp import AsyncSaver, load_tensors
from .engine import StepResult, Watch, exchange
from .mesh import World
from .muon import MuonSettings
from .owners import Ranks
from .precision import DTYPES, Precision
from .update import Update, squared_norms, total_norm


class SingleEngine:
    """See engine.Engine; a shard is the whole tensor.

    model: on the meta device. units: the parts that FSDP2 would gather one at a time. initialise: fills buffers and
    parameters once they exist. groups: optimizer groups for the named parameters. muon: None where none of them is
    Muon's. fixed_gradients: they keep their memory from step to step, as a recorded backward pass needs it.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        world: World,
        precision: Precision,
        initialise: Callable[[nn.Module], None],
        groups: Callable[[dict[str, Tensor]], list[dict[str, Any]]],
        betas: tuple[float, float],
        clip_norm: float | None,
        muon: MuonSettings | None = None,
        fixed_gradients: bool = False,
    ) -> None:
        self._group = world.checkpoint
        self._saver = AsyncSaver(world.device, world.checkpoint)
        model.to(torch.float64 if precision == "fp64" else torch.float32)
        model.to_empty(device=world.device)
        initialise(model)
        for unit in units:
            unit.register_forward_pre_hook(_sum_gradients_apart)
        self.model = model
        self._parameters = dict(model.named_parameters())
        masters = {name: parameter.detach() for name, parameter in self._parameters.items()}
        self._update = Update(masters, groups, betas, clip_norm, muon, Ranks(), world.device, DTYPES[precision])
        self._casts, self._fixed = DTYPES[precision] is torch.bfloat16, fixed_gradients
        self._gradients: dict[str, Tensor] = {}
        """Under bf16 and fp8, and where they are fixed: the step's gradients so far, in the master weights' type."""
        if self._casts:
            for parameter in self._parameters.values():
                parameter.data = parameter.data.bfloat16()

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        if self._casts or self._fixed:
            self._add_gradients()

    @torch.no_grad()
    def _add_gradients(self) -> None:
        """Add a micro-batch's gradients, which are in the model's type, to the step's."""
        found = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        first = [name for name in found if name not in self._gradients]
        if first:
            made = [torch.empty_like(found[name], dtype=self._update.shards[name].dtype) for name in first]
            torch._foreach_copy_(made, [found[name] for name in first])
            self._gradients.update(zip(first, made, strict=True))
        if again := [name for name in found if name not in set(first)]:
            sums = [self._gradients[name] for name in again]
            torch._foreach_add_(sums, [found[name].to(sum_.dtype) for name, sum_ in zip(again, sums, strict=True)])
        for parameter in self._parameters.values():
            parameter.grad = None

    def step(self, lr: float, watch: Watch | None = None, max_norm: Tensor | None = None) -> StepResult:
        gradients = self._gradients
        if not (self._casts or self._fixed):
            gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        result = self._update.step(gradients, total_norm(squared_norms(gradients)), lr, watch, max_norm)
        self._cast_weights()
        if self._fixed:
            torch._foreach_zero_(list(gradients.values()))
            return result
        self._gradients = {}
        for parameter in self._parameters.values():
            parameter.grad = None
        return result

    @torch.no_grad()
    def _cast_weights(self) -> None:
        """Round the master weights to what the model computes with, wherever they have changed."""
        if self._casts:
            torch._foreach_copy_(list(self._parameters.values()), list(self._update.shards.values()))

    def optimizer_settings(self) -> dict[str, tuple[float, float, float]]:
        return self._update.settings()

    def master_shards(self) -> dict[str, Tensor]:
        return dict(self._update.shards)

    def full(self, name: str) -> Tensor:
        return self._update.shards[name]

    def state(self) -> dict[str, dict[str, Tensor]]:
        return self._update.state()

    def cut(self, name: str, full: Tensor) -> Tensor:
        return full

    def whole(self, name: str, shard: Tensor) -> Tensor:
        return shard

    @contextmanager
    def swapped(self, shards: Mapping[str, Tensor]) -> Iterator[None]:
        self._swap(shards)
        try:
            yield
        finally:
            self._swap(shards)

    def _swap(self, shards: Mapping[str, Tensor]) -> None:
        exchange(self._update.shards, shards)
        self._cast_weights()

    def save(self, folder: Path, extra: Mapping[str, Tensor], averages_only: bool = False) -> Future[None]:
        return self._saver.save(folder, extra if averages_only else {**self._update.tensors(), **extra})

    def load(self, folder: Path, extra: Mapping[str, Tensor]) -> None:
        load_tensors(folder, {**self._update.tensors(), **extra}, self._group)
        self._cast_weights()

    def load_weights(self, folder: Path, group: str = "model", names: Collection[str] | None = None) -> None:
        wanted = self._update.shards.keys() if names is None else names
        load_tensors(folder, {f"{group}/{name}": self._update.shards[name] for name in wanted}, self._group)
        self._cast_weights()


def _sum_gradients_apart(unit: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs that are views of what was given: the gradients that a unit has for one of its inputs are then added up
    before they are added to those of other units, which is the order that FSDP2 has."""
    return tuple(each.view_as(each) if isinstance(each, Tensor) and each.requires_grad else each for each in inputs)
