"""How fast each rank is, for the line of a log step: a node that is slow shows while the run goes on.

Ranks wait for each other in every unit of the model, so that a step takes all of them the same time. Which of them the
others wait for is told by what each does alone: waiting for its data, and computing its units, whose weights the engine
has gathered before (it does so in hooks, outside of `forward`).
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


class StepTimer:
    """Clock of this rank's steps since the last log line. units: blocks of the model, whose `forward` it wraps.

    watching: whether the forward passes of the units are timed, in a log step. On a GPU by events that the log step
    reads once the device has been waited for; nothing here waits for it.
    """

    def __init__(self, units: Sequence[nn.Module], world: World) -> None:
        self._world = world
        self._cuda = world.device.type == "cuda"
        self.watching = False
        self._spans: list[tuple[Any, Any]] = []  # beginning and end of each unit's forward pass
        for unit in units:
            unit.forward = partial(self._timed, unit.forward)
        self.restart()

    def restart(self) -> None:
        """Steps are counted from now on."""
        self._began, self._waited_s = time.perf_counter(), 0.0
        self.buckets = Counter[Any]()  # of the steps since then

    def take(self, stream: Iterator[list[Any]]) -> list[Any]:
        """The next step's micro-batches."""
        asked = time.perf_counter()
        micro_batches = next(stream)
        self._waited_s += time.perf_counter() - asked
        self.buckets[micro_batches[0].bucket] += 1
        return micro_batches

    def step_s(self) -> float:
        """Mean time of a step until now."""
        return (time.perf_counter() - self._began) / self.buckets.total()

    def figures(self, step_s: float) -> dict[str, float]:
        """Median and maximum over ranks, and the slowest rank: of a step and of its wait for data (mean since the last
        log line), and of the forward pass of the units (in the last step). The same call on all ranks, after the
        device has done the step."""
        forward_s = sum(b.elapsed_time(e) / 1000 if self._cuda else e - b for b, e in self._spans)
        self.watching = False
        self._spans.clear()
        own = torch.tensor([step_s, self._waited_s / self.buckets.total(), forward_s], dtype=torch.float64)
        all_ranks = [torch.empty_like(own) for _ in range(self._world.size)]
        dist.all_gather(all_ranks, own, group=self._world.control)
        found = {}
        for name, seconds in zip(("step", "data_wait", "forward"), torch.stack(all_ranks, dim=1), strict=True):
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
