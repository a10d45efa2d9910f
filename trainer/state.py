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
from .jumps import Jump, last_step
from .metrics import Metrics
from .pace import Pace
from .parallel.engine import Engine
from .parallel.mesh import World
from .skipping import Skips


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
    cell: Any
    """What the images and texts of the step have in common, None in a run of one kind."""


class Objective(Protocol):
    def draw(self, x0: Tensor, keys: Tensor) -> Any: ...
    def loss(self, prediction: Tensor, draw: Any) -> Tensor: ...


class Alignment(Protocol):
    """A second term of the loss; see trainer.diffusion.repa.Alignment."""

    @property
    def weight(self) -> float: ...
    @property
    def features_at(self) -> int: ...
    def losses(self, projected: Tensor, batch: Any) -> Tensor: ...


class Totals(NamedTuple):
    """Sums over steps, scalars but the last, in the order in which one tensor holds them. Skipped steps count in
    `skipped` (not finite) or `spikes` alone. by_time: losses and weights by time (health.time_sums), [2 BINS]."""

    loss: Tensor
    repa_loss: Tensor
    """0 without an alignment."""
    grad_norm: Tensor
    text_tokens: Tensor
    """A sample."""
    clipped: Tensor
    counted: Tensor
    skipped: Tensor
    spikes: Tensor
    by_time: Tensor

    def packed(self) -> Tensor:
        return torch.cat([torch.stack(self[:-1]), self.by_time])

    @classmethod
    def unpacked(cls, packed: Tensor) -> "Totals":
        """Views of a packed tensor."""
        scalars = len(cls._fields) - 1
        return cls(*packed[:scalars].unbind(), by_time=packed[scalars:])


@dataclass
class TrainState:
    """step: updates done (skipped ones included). totals: packed Totals of the steps since the last log line, float64
    on the device, the same on all ranks."""

    totals: Tensor
    skips: Skips
    step: int = 0
    jumps: tuple[Jump, ...] = ()
    holes: dict[str, int] = field(default_factory=dict)
    samples_read: int = 0

    @classmethod
    def start(cls, device: torch.device, spike_threshold: float | None = None) -> "TrainState":
        totals = torch.zeros(len(Totals._fields) - 1 + 2 * BINS, dtype=torch.float64, device=device)
        return cls(totals, Skips(device, spike_threshold))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it as tensors; the rest is in its meta."""
        return {"totals": self.totals, "skips": self.skips.numbers}


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
    evaluate_every: int
    max_bad_share: float
    rollback_after: int
    """Skipped steps in a row after which the run goes back; 0: never."""
    data_steps: int | None
    """Steps that the data hold; None where they have no end."""
    watchdog_factor: float | None
    watchdog_min_s: float
    image_flops: Callable[[float, Any], float]
    """Text tokens and the batch's cell -> FLOPs of one image in a forward and a backward pass."""
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
    pace: Pace
    objective: Objective
    alignment: Alignment | None
    lr: Callable[[int], float]
    """Base learning rate of an update."""
    batches: Callable[[int], Iterator[tuple[int, list[Any]]]]
    """First step of the data -> (step, this rank's micro-batches), endless; of weight 0 where the data have ended."""
    encode: Callable[[Any], Encoded]
    validate: Callable[[], dict[str, float]]
    """Validation figures of the live and the EMA weights."""
    sample: Callable[[Path], None]
    """Write a grid of samples from the EMA weights."""
    evaluate: Callable[[], dict[str, Any]]
    """Figures of images of the EMA weights, on rank 0 (elsewhere {})."""
    metrics: Metrics
    checkpointer: Checkpointer
    meta: Mapping[str, Any]
    """What every checkpoint of this run carries beside its state."""
    state: TrainState
    lock: IO[str] | None
    """Open on rank 0 as long as this run holds its folder."""

    @property
    def last_step(self) -> int:
        """Training steps in all: plan.steps, or fewer where rollbacks have used up data that have an end."""
        return last_step(self.plan.steps, self.plan.data_steps, self.state.jumps)
