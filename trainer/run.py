"""What the loop is handed, built by trainer.build."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .checkpoint.write import Checkpointer
from .ema import EMA
from .files import Lock
from .monitor.metrics import Metrics
from .monitor.mup_health import Health
from .monitor.step_timer import StepTimer
from .parallel.engine import Engine
from .parallel.mesh import World
from .recovery.skipped_ranges import last_step
from .state import TrainState
from .step import Alignment, MicroBatch


class Intervals(NamedTuple):
    """How many steps lie between two times that something is done; 0: it is never done."""

    log: int = 0
    validate: int = 0
    checkpoint: int = 0
    snapshot: int = 0
    sample: int = 0
    evaluate: int = 0

    def due(self, step: int, last_step: int) -> set[str]:
        """What is to be done after step number `step` (from 1); after the last one, everything that is ever done."""
        return {name for name, every in self._asdict().items() if every and (step % every == 0 or step == last_step)}


@dataclass(frozen=True)
class Plan:
    """The numbers of the config that the loop reads, which must not know config files, and what a step costs."""

    stage: str | None
    """Name of the stage that is trained; None where the run has no stages."""
    first_step: int
    """Of the stage."""
    steps: int
    """The step at which the stage ends; where it is the only one, the run."""
    is_last: bool
    """Whether the run ends with this stage."""
    images: Callable[[int], int]
    """Step -> samples that the run has seen before it."""
    global_batch_size: int
    every: Intervals
    max_bad_share: float
    """Share of unreadable samples at which the run ends."""
    rollback_after: int
    """Skipped steps in a row after which the run goes back; 0: never."""
    max_skipped_steps: int
    """Skipped steps in a row after which the run has diverged; 0: it trains on."""
    data_steps: int | None
    """Steps that the data hold; None where they have no end."""
    watchdog_factor: float | None
    watchdog_min_s: float
    image_flops: Callable[[float, Any, bool], float]
    """(text tokens per image, the batch's bucket, whether the step has an alignment) -> FLOPs of one image in a forward
    and a backward pass."""
    peak_flops: float | None
    """FLOP/s of all devices together; None where unknown, then no MFU is given."""

    def place(self, step: int) -> dict[str, Any]:
        """How far the run is before update `step`, as a line of metrics begins."""
        stage = {} if self.stage is None else {"stage": self.stage}
        return {"step": step, "samples_seen": self.images(step), **stage}

    def outcome(self, last_step: int) -> tuple[str, str]:
        """What training ends as after `last_step`, and its reason."""
        if not self.is_last:
            return "running", f"{self.stage} has ended"
        return "finished", "" if last_step == self.steps else "the data ended: rollbacks skipped the rest of them"


@dataclass(frozen=True)
class Run:
    """Everything that the loop needs."""

    plan: Plan
    world: World
    folder: Path
    engine: Engine
    ema: EMA
    health: Health
    timer: StepTimer
    passes: Callable[..., Tensor]
    """loop.forward_backward of a micro-batch: (encoded, features where the step has an alignment, last=...) ->
    StepSums."""
    alignment: Alignment | None
    lr: Callable[[int], float]
    """Number of an update (from 0) -> its base learning rate."""
    batches: Callable[[], Iterator[list[MicroBatch]]]
    """Begin to read: this rank's micro-batches of the step that `state` has come to when each is asked for, endless; of
    weight 0 where the data have ended."""
    validate: Callable[[], dict[str, float]]
    """Validation figures of the live and the EMA weights."""
    sample: Callable[[Path], None]
    """Write a grid of samples from the EMA weights."""
    evaluate: Callable[[], dict[str, Any]]
    """Figures of images from the EMA weights, on rank 0 (elsewhere {})."""
    metrics: Metrics
    checkpointer: Checkpointer
    meta: Mapping[str, Any]
    """What every checkpoint of this run carries beside its state."""
    state: TrainState
    lock: Lock | None
    """Held on rank 0 as long as this run holds its folder."""

    def alignment_at(self, step: int) -> Alignment | None:
        """The alignment of update number `step` (from 0); None where it has none."""
        return self.alignment if self.alignment is not None and self.alignment.on(step) else None

    @property
    def last_step(self) -> int:
        """How many training steps there are: plan.steps, or fewer where rollbacks have used up data that end."""
        return last_step(self.plan.steps, self.plan.data_steps, self.state.skipped_ranges)
