"""The passes of a micro-batch as the loop calls them: as they are, or as CUDA graphs (parallel.cuda_graph)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..config.schema import TrainConfig
from ..errors import ConfigError
from ..loop import forward_backward
from ..parallel.cuda_graph import CUDAGraphs, CUDARecorder, Recorder
from ..parallel.engine import Engine
from ..parallel.mesh import World
from ..step import Alignment, Objective, Route


def graph_recorder(config: TrainConfig, world: World) -> Recorder | None:
    """What records the passes; None where they are not to be. Raises ConfigError where there is no GPU."""
    if not config.parallel.cuda_graph:
        return None
    if world.device.type != "cuda":
        raise ConfigError("parallel.cuda_graph needs a CUDA device, and there is none here: set it to false")
    return CUDARecorder(world.device)


def build_passes(
    engine: Engine,
    objective: Objective,
    alignment: Alignment | None,
    route: Route | None,
    scale: float,
    recorder: Recorder | None,
) -> Callable[..., Tensor]:
    """Run.passes. scale: a factor on the losses."""
    passes = partial(forward_backward, engine, objective, alignment, scale, route=route)
    if recorder is None:
        return passes
    # On one process, the only place for graphs, nothing is reduced, so that no micro-batch is the last one.
    graphs = CUDAGraphs(partial(passes, last=True), recorder)

    def replayed(*inputs: Any, last: bool) -> Tensor:
        return graphs(*inputs)

    return replayed
