"""Bad steps, counted and judged on the device: rows of them, and gradient norms that are a spike.

A step is bad, and skipped, if its gradient norm is not finite or is a spike: log(norm) lies more than `threshold`
standard deviations above its mean. Mean and variance are estimated over the steps with a finite norm: over the first
1 / RATE steps they are the plain ones, from then on older steps are forgotten exponentially. They are used once
WARM_UP steps are counted. A spike enters them as if its norm were the limit: a single spike hardly moves them, and
after a lasting change of the norm training goes on after some steps.
"""

import torch
from torch import Tensor

WARM_UP = 100  # steps
RATE = 0.01  # weight of the newest step
LEAST_STD = 0.05  # a very even norm may still vary by a few percent


class SpikeDetector:
    """Keeps `numbers`, float64 [5] on the device, the same on all ranks and in the checkpoint: bad steps in a row up to
    now, the longest such row since the last log line, and count, mean and variance of log(norm)."""

    def __init__(self, device: torch.device, threshold: float | None = None) -> None:
        """threshold: optim.spike_threshold, in standard deviations; with None no norm is a spike."""
        self.numbers = torch.zeros(5, dtype=torch.float64, device=device)
        self._threshold = threshold

    def limit(self) -> Tensor | None:
        """The largest gradient norm that is no spike in the next step, a scalar on the device; None: no norm is one."""
        if self._threshold is None:
            return None
        _, _, count, mean, variance = self.numbers
        limit = (mean + self._threshold * variance.sqrt().clamp(min=LEAST_STD)).exp()
        return torch.where(count >= WARM_UP, limit, torch.inf)

    @torch.no_grad()
    def update(self, norm: Tensor, skipped: Tensor) -> None:
        """Count a step. norm: of its gradients. skipped: 1 where it was skipped, else 0."""
        row, longest, count, mean, variance = self.numbers.clone()
        row = torch.where(skipped > 0, row + 1, 0.0)
        rate = (1 / (count + 1)).clamp(min=RATE)
        limit = self.limit()
        seen = norm.double() if limit is None else torch.minimum(norm.double(), limit)
        away = seen.clamp(min=torch.finfo(torch.float64).tiny).log() - mean
        counted = torch.stack([count + 1, mean + rate * away, (1 - rate) * (variance + rate * away**2)])
        self.numbers[0], self.numbers[1] = row, torch.maximum(longest, row)
        self.numbers[2:] = torch.where(norm.isfinite(), counted, self.numbers[2:])

    def forget(self) -> None:
        """Begin anew: what the norms of another stage were is no measure for this one's."""
        self.numbers.zero_()

    def take_longest_row(self) -> int:
        """The longest row since the last call (a host sync). A row that goes on is counted from its beginning."""
        longest = int(self.numbers[1])
        self.numbers[1] = 0
        return longest

    def row(self) -> int:
        """Bad steps in a row up to now (a host sync)."""
        return int(self.numbers[0])

    def forget_rows(self) -> None:
        """Begin to count anew after a rollback, because other samples come now."""
        self.numbers[:2] = 0
