"""Steps that are skipped, counted and judged on the device: rows of them, and the norms that count as a spike.

A step is bad if its gradient norm is not finite, or if it is a spike: log(norm) lies more than `threshold` standard
deviations above its mean. Both are running estimates over the steps with a finite norm: the plain ones of the first
1 / RATE steps, exponentially forgetting from then on. They act after WARM_UP steps. A spike is counted in them as a
norm at the limit: one hardly moves them, and after a lasting change of the norm training goes on after some steps.
"""

import torch
from torch import Tensor

WARM_UP = 100  # steps
RATE = 0.01  # weight of the newest step
LEAST_STD = 0.05  # a very even norm may still vary by a few percent


class SpikeDetector:
    """numbers: float64 [5] on the device, the same on all ranks: bad steps in a row up to now, the longest such row
    since the last log line, and count, mean and variance of log(norm). A checkpoint holds them."""

    def __init__(self, device: torch.device, threshold: float | None = None) -> None:
        """threshold: standard deviations (optim.spike_threshold); None: no norm is a spike."""
        self.numbers = torch.zeros(5, dtype=torch.float64, device=device)
        self._threshold = threshold

    def limit(self) -> Tensor | None:
        """The largest gradient norm of the next step that is no spike, a scalar on the device."""
        if self._threshold is None:
            return None
        _, _, count, mean, variance = self.numbers
        limit = (mean + self._threshold * variance.sqrt().clamp(min=LEAST_STD)).exp()
        return torch.where(count >= WARM_UP, limit, torch.inf)

    @torch.no_grad()
    def update(self, norm: Tensor, skipped: Tensor) -> None:
        """Count a step: its gradient norm, and 1 where it was skipped, else 0."""
        row, longest, count, mean, variance = self.numbers.clone()
        row = torch.where(skipped > 0, row + 1, 0.0)
        rate = (1 / (count + 1)).clamp(min=RATE)
        limit = self.limit()
        seen = norm.double() if limit is None else torch.minimum(norm.double(), limit)
        away = seen.clamp(min=torch.finfo(torch.float64).tiny).log() - mean
        counted = torch.stack([count + 1, mean + rate * away, (1 - rate) * (variance + rate * away**2)])
        self.numbers[0], self.numbers[1] = row, torch.maximum(longest, row)
        self.numbers[2:] = torch.where(norm.isfinite(), counted, self.numbers[2:])

    def take_longest_row(self) -> int:
        """The longest row since the last call (a host sync). One that goes on is counted from its beginning."""
        longest = int(self.numbers[1])
        self.numbers[1] = 0
        return longest

    def forget_rows(self) -> None:
        """After a rollback: what comes now are other samples."""
        self.numbers[:2] = 0
