"""What the loop is handed: Run, with its plan and the interfaces of what trainer.build puts together."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from torch import Tensor

from .checkpoint.write import Checkpointer
from .ema import EMA
from .monitor.metrics import Metrics
from .monitor.mup_health import Health
from .monitor.step_timer import StepTimer
from .parallel.engine import Engine
from .parallel.mesh import World
from .recovery.skipped_ranges import last_step
from .state import TrainState


class Encoded(NamedTuple):
    """A micro-batch on the device: x0 [b, C, h, w], what the model is conditioned on, keys int64 and weight [b],
    and how many text tokens the rows that count have (a scalar)."""

    x0: Tensor
    condition: Any
    keys: Tensor
    weight: Tensor
    text_tokens: Tensor


class MicroBatch(Protocol):
    """A micro-batch as the data room hands it over: what the loop itself reads of it."""

    holes: list[str]
    read: int
    bucket: Any
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
    """Text tokens and the batch's bucket -> FLOPs of one image in a forward and a backward pass."""
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
    timer: StepTimer
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
        return last_step(self.plan.steps, self.plan.data_steps, self.state.skipped_ranges)
