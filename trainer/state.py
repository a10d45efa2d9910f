"""What advances during training and is saved in a checkpoint."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .monitor.mup_health import BINS
from .recovery.skipped_ranges import SkippedRange
from .recovery.spikes import SpikeDetector


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
    spikes: SpikeDetector
    step: int = 0
    skipped_ranges: tuple[SkippedRange, ...] = ()
    holes: dict[str, int] = field(default_factory=dict)
    samples_read: int = 0

    @classmethod
    def start(cls, device: torch.device, spike_threshold: float | None = None) -> "TrainState":
        totals = torch.zeros(len(Totals._fields) - 1 + 2 * BINS, dtype=torch.float64, device=device)
        return cls(totals, SpikeDetector(device, spike_threshold))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it as tensors; the rest is in its meta."""
        return {"totals": self.totals, "skips": self.spikes.numbers}
