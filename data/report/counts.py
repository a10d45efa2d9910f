"""How often each value occurs, in memory that does not grow with the samples; quantiles and bins of that."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_BINS = 40
_WIDE = 20  # times the smallest value: from there on bins grow with the value


class Bins(NamedTuple):
    """edges: float64 [n + 1], rising; counts: int64 [n], of the values in [edges[i], edges[i + 1]).
    log: whether the edges are as far apart as their logarithms."""

    edges: np.ndarray
    counts: np.ndarray
    log: bool


class Counts:
    """How often each whole number from 0 to `largest` occurs; what is larger counts as `largest`."""

    def __init__(self, largest: int) -> None:
        self._counts = np.zeros(largest + 1, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count values, none of them negative."""
        self._counts += np.bincount(np.minimum(values, len(self._counts) - 1), minlength=len(self._counts))

    def __len__(self) -> int:
        """How many values were counted."""
        return int(self._counts.sum())

    def quantile(self, share: float) -> int:
        """The smallest value that at least `share` of the values do not exceed; there must be some."""
        below = np.cumsum(self._counts)
        return int(np.searchsorted(below, max(1, np.ceil(share * below[-1]))))

    def share_above(self, value: int) -> float:
        """The share of the values that are larger."""
        return float(self._counts[value + 1 :].sum() / self._counts.sum())

    def bins(self) -> Bins:
        """All values in about 40 bins, alike in width; or in ratio, where the largest is many times the smallest."""
        low, high = self.quantile(0), self.quantile(1)
        log = low > 0 and high > _WIDE * low and high - low >= _BINS
        if log:
            edges = np.unique(np.round(np.geomspace(low, high + 1, _BINS + 1)))
        else:
            step = _round(max(1.0, (high + 1 - low) / _BINS))
            edges = np.arange(low // step, high // step + 2) * step
        sums = np.concatenate([[0], np.cumsum(self._counts)])
        return Bins(edges, np.diff(sums[np.minimum(edges, len(self._counts)).astype(np.int64)]), bool(log))


def _round(step: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... that is no smaller."""
    power = 10.0 ** np.floor(np.log10(step))
    return float(power * next(digit for digit in (1, 2, 5, 10) if digit * power >= step))
