"""What advances during training, and what the loop is handed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .checkpoint import Checkpointer
from .ema import EMA
from .health import BINS, Health
from .metrics import Metrics
from .parallel.engine import Engine
from .parallel.mesh import World


class Encoded(NamedTuple):
    """A micro-batch on the device: x0 [b, C, h, w], what the model is conditioned on, keys int64 and weight [b],
    and how many text tokens the rows that count have (a scalar)."""

    x0: Tensor
    condition: Any
    keys: Tensor
    weight: Tensor
    text_tokens: Tensor


class Readable(Protocol):
    """A micro-batch as the data room hands it over: what the loop itself reads of it."""

    holes: list[str]
    read: int


class Objective(Protocol):
    def draw(self, x0: Tensor, keys: Tensor) -> Any: ...
    def loss(self, prediction: Tensor, draw: Any) -> Tensor: ...


@dataclass
class TrainState:
    """step: updates done (skipped ones included). totals: of the steps since the last log line, on the device,
    the same on all ranks: loss, grad norm, text tokens a sample, clipped steps, steps that count, skipped steps; then
    losses and weights by time (health.time_sums)."""

    totals: Tensor
    step: int = 0
    holes: dict[str, int] = field(default_factory=dict)
    samples_read: int = 0

    @classmethod
    def start(cls, device: torch.device) -> "TrainState":
        return cls(totals=torch.zeros(6 + 2 * BINS, dtype=torch.float64, device=device))


@dataclass(frozen=True)
class Plan:
    """Numbers of the loop: steps, batch, intervals (0: never), and what a step costs."""

    steps: int
    global_batch_size: int
    log_every: int
    validate_every: int
    checkpoint_every: int
    snapshot_every: int
    sample_every: int
    max_bad_share: float
    image_flops: Callable[[float], float]
    """Text tokens -> FLOPs of one image in a forward and a backward pass."""
    peak_flops: float | None
    """Of all devices together; None where unknown, then no MFU is given."""


@dataclass(frozen=True)
class Run:
    """Everything that the loop needs, built by trainer.build."""

    plan: Plan
    world: World
    folder: Path
    engine: Engine
    ema: EMA
    health: Health
    objective: Objective
    lr: Callable[[int], float]
    """Base learning rate of an update."""
    batches: Callable[[int], Iterator[tuple[int, list[Any]]]]
    """First step -> (step, this rank's micro-batches); ends where the data end."""
    encode: Callable[[Any], Encoded]
    validate: Callable[[], dict[str, float]]
    """Validation figures of the live and the EMA weights."""
    sample: Callable[[Path], None]
    """Write a grid of samples from the EMA weights."""
    metrics: Metrics
    checkpointer: Checkpointer
    meta: Mapping[str, Any]
    """What every checkpoint of this run carries beside its state."""
    state: TrainState
    lock: IO[str] | None
    """Open on rank 0 as long as this run holds its folder."""
