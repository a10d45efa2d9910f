"""What advances during training and is saved in a checkpoint."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from .monitor.mup_health import BINS, time_sums
from .parallel.engine import StepResult
from .recovery.skipped_ranges import SkippedRange, data_step
from .recovery.spikes import SpikeDetector
from .step import Encoded, MicroBatchLosses


@dataclass(frozen=True)
class Sums:
    """Named sums that travel as one float64 tensor, so that ranks add them up in one all-reduce and a checkpoint holds
    one tensor. In it the scalars come first, in the order of their fields, and `by_time` last."""

    by_time: Tensor
    """[2 BINS]: losses and weights by diffusion time, see mup_health.time_sums."""

    @classmethod
    def _scalars(cls) -> list[str]:
        return [each.name for each in fields(cls) if each.name != "by_time"]

    @classmethod
    def zeros(cls, device: torch.device) -> Tensor:
        """The packed tensor of no step."""
        return torch.zeros(len(cls._scalars()) + 2 * BINS, dtype=torch.float64, device=device)

    def packed(self) -> Tensor:
        scalars = [getattr(self, name).double() for name in self._scalars()]
        return torch.cat([torch.stack(scalars), self.by_time])

    @classmethod
    def unpacked(cls, packed: Tensor) -> Self:
        """Views of a packed tensor."""
        names = cls._scalars()
        scalars = dict(zip(names, packed[: len(names)].unbind(), strict=True))
        return cls(**scalars, by_time=packed[len(names) :])


@dataclass(frozen=True)
class StepSums(Sums):
    """Sums over the samples of one step, each multiplied by its weight."""

    loss: Tensor
    repa_loss: Tensor
    text_tokens: Tensor
    weight: Tensor

    @classmethod
    def of_micro_batch(cls, losses: MicroBatchLosses, encoded: Encoded) -> Self:
        return cls(
            loss=losses.loss.detach(),
            repa_loss=losses.repa_loss.detach(),
            text_tokens=encoded.text_tokens,
            weight=encoded.weight.sum(),
            by_time=time_sums(losses.draw.t, losses.per_sample.detach(), encoded.weight).flatten(),
        )


@dataclass(frozen=True)
class Totals(Sums):
    """Sums over the steps since the last log line. A step that was skipped is counted in `skipped` or `spikes`, and in
    nothing else."""

    loss: Tensor
    """Of each step's mean over its samples, as are repa_loss and text_tokens."""
    repa_loss: Tensor
    """0 without an alignment."""
    grad_norm: Tensor
    text_tokens: Tensor
    clipped: Tensor
    """Steps whose gradients were scaled down."""
    counted: Tensor
    """Steps that were taken."""
    skipped: Tensor
    """Steps that were skipped because their gradient norm was not finite."""
    spikes: Tensor
    """Steps that were skipped because their gradient norm was a spike."""

    @classmethod
    def of_step(cls, sums: StepSums, result: StepResult) -> Self:
        """A step that was taken. sums: over the samples of all ranks."""
        samples = sums.weight.clamp(min=1)  # a step of holes alone has none
        zero = torch.zeros_like(sums.loss)
        return cls(
            loss=sums.loss / samples,
            repa_loss=sums.repa_loss / samples,
            grad_norm=result.grad_norm,
            text_tokens=sums.text_tokens / samples,
            clipped=result.clipped,
            counted=torch.ones_like(sums.loss),
            skipped=zero,
            spikes=zero,
            by_time=sums.by_time,
        )

    @classmethod
    def skipped_step(cls, result: StepResult) -> Self:
        """A step that was skipped: for a spike if its gradient norm is finite."""
        finite = result.grad_norm.double().isfinite().double()
        zero = torch.zeros_like(finite)
        return cls(
            loss=zero,
            repa_loss=zero,
            grad_norm=zero,
            text_tokens=zero,
            clipped=zero,
            counted=zero,
            skipped=1 - finite,
            spikes=finite,
            by_time=zero.expand(2 * BINS),
        )


@dataclass
class TrainState:
    """The state of a run, beside weights, optimizer and EMA. A checkpoint holds `tensors()` among its tensors and the
    rest in its meta.json."""

    totals: Tensor
    """Packed Totals since the last log line, on the device, the same on all ranks."""
    spikes: SpikeDetector
    step: int = 0
    """Updates done, skipped ones included."""
    skipped_ranges: tuple[SkippedRange, ...] = ()
    holes: Counter[str] = field(default_factory=Counter[str])
    """Samples that this rank could not read in the life of the run, by reason."""
    samples_read: int = 0
    """Samples that this rank has tried to read in the life of the run."""

    @classmethod
    def start(cls, device: torch.device, spike_threshold: float | None = None) -> "TrainState":
        return cls(Totals.zeros(device), SpikeDetector(device, spike_threshold))

    @property
    def data_step(self) -> int:
        """The step of the data that the next training step reads."""
        return data_step(self.step, self.skipped_ranges)

    def add_step(self, sums: Tensor, result: StepResult) -> None:
        """Add a step to the totals without asking the device whether it was skipped. sums: packed StepSums."""
        taken = Totals.of_step(StepSums.unpacked(sums), result).packed()
        self.totals += torch.where(result.skipped > 0, Totals.skipped_step(result).packed(), taken)

    def add_reads(self, read: int, holes: Iterable[str] | Mapping[str, int]) -> None:
        """Count samples that were read. holes: the reason of each unreadable one, or their number by reason."""
        self.samples_read += read
        self.holes.update(holes)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it as tensors."""
        return {"totals": self.totals, "skips": self.spikes.numbers}

    def restore(self, meta: dict[str, Any], rank: int) -> None:
        """Take over a checkpoint's meta, after its tensors have been loaded.

        The skipped ranges stay those of the run folder: the run may have gone back to this checkpoint since it was
        written. The counts of samples are per rank; where the world size has changed rank 0 goes on with their sums.
        """
        self.step = meta["step"]
        if [list(each) for each in self.skipped_ranges if each.at_step <= self.step] != meta.get("jumps", []):
            self.spikes.forget_rows()
        reads = meta.get("reads", [])
        if len(reads) == dist.get_world_size():
            reads = [reads[rank]]
        elif rank != 0:
            reads = []
        for holes, read in reads:
            self.add_reads(read, holes)
