"""How fast each rank is, for the line of a log step, so that a slow node is seen while the run goes on.

Ranks wait for each other in every unit of the model, so that a step takes the same time on all of them. What each rank
does alone tells which one the others wait for: waiting for its data, and computing the units. The engine gathers a
unit's weights in hooks outside of its `forward`, so that this wait for other ranks is not in the unit's time.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..parallel.mesh import World
from ..step import MicroBatch


class StepTimer:
    """Times this rank's steps since the last log line. units: the model's blocks, whose `forward` it wraps; none where
    no forward pass can be timed, because the host takes no part in it.

    watching: whether the units' forward passes are timed; the loop sets it in a log step. On a GPU events are recorded,
    which `figures` reads when the device has done the step: nothing here waits for the device.
    """

    def __init__(self, units: Sequence[nn.Module], world: World) -> None:
        self._world = world
        self._cuda = world.device.type == "cuda"
        self.watching, self._times_forward = False, bool(units)
        self._spans: list[tuple[Any, Any]] = []  # beginning and end of each unit's forward pass
        for unit in units:
            unit.forward = partial(self._timed, unit.forward)
        self.restart()

    def restart(self) -> None:
        """Forget the steps until now."""
        self._began, self._waited_s = time.perf_counter(), 0.0
        self.buckets = Counter[Any]()  # how many steps each bucket had since then

    def timed(self, steps: Iterator[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
        """The same steps; how long each one lets the loop wait counts as waiting for data."""
        asked = time.perf_counter()
        for micro_batches in steps:
            self._waited_s += time.perf_counter() - asked
            self.buckets[micro_batches[0].batch.bucket] += 1
            yield micro_batches
            asked = time.perf_counter()

    def step_s(self) -> float:
        """Mean time per step until now, in seconds."""
        return (time.perf_counter() - self._began) / self.buckets.total()

    def figures(self, step_s: float) -> dict[str, float]:
        """Median and maximum over ranks in seconds, and the slowest rank: of a step and of its wait for data (means
        since the last log line), and of the units' forward passes (in the last step).

        step_s: mean time per step. All ranks make this call alike, after the device has done the step.
        """
        forward_s = sum(b.elapsed_time(e) / 1000 if self._cuda else e - b for b, e in self._spans)
        self.watching = False
        self._spans.clear()
        own = torch.tensor([step_s, self._waited_s / self.buckets.total(), forward_s], dtype=torch.float64)
        all_ranks = [torch.empty_like(own) for _ in range(self._world.size)]
        dist.all_gather(all_ranks, own, group=self._world.control)
        found = {}
        names = ("step", "data_wait", *(("forward",) if self._times_forward else ()))
        for name, seconds in zip(names, torch.stack(all_ranks, dim=1), strict=False):
            found[f"perf/{name}_median_s"] = float(seconds.quantile(0.5))
            found[f"perf/{name}_max_s"] = float(seconds.max())
            found[f"perf/{name}_slowest_rank"] = int(seconds.argmax())
        return found

    def _timed(self, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        if not self.watching:
            return forward(*inputs, **named)
        began = self._now()
        result = forward(*inputs, **named)
        self._spans.append((began, self._now()))
        return result

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
