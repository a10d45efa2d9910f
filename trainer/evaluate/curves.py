"""A measure against the step: when does a run reach the value at which another one ends?"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

Curve = Mapping[int, float]
"""{step: measure}"""


@dataclass(frozen=True)
class Reached:
    """When a run is as good as the baseline at its end.

    baseline_step: where the baseline first was so good itself: one that gets worse has not needed the steps since.
    step: None where the run never is; exact: False where the first step that was measured is already better.
    """

    value: float
    baseline_step: float
    step: float | None
    exact: bool

    @property
    def times_earlier(self) -> float | None:
        """baseline_step / step (at least, where that is not exact)."""
        return self.baseline_step / self.step if self.step else None

    def __str__(self) -> str:
        if self.step is None:
            return f"does not reach the baseline's final value {self.value:.4g}"
        where = f"at step {self.step:.0f} (interpolated)" if self.exact else f"at or before step {self.step:.0f}"
        times = "" if self.step == 0 else f": {'' if self.exact else 'at least '}{self.times_earlier:.2f} times earlier"
        return f"reaches the baseline's final value {self.value:.4g} {where}{times}"


def compare(baseline: Curve, other: Curve, lower_is_better: bool = True) -> Reached:
    """Both must have a point."""
    final = baseline[max(baseline)]
    own = first_reached(baseline, final, lower_is_better)
    assert own is not None, "the last step is as good as itself"
    step, exact = first_reached(other, final, lower_is_better) or (None, True)
    return Reached(final, own[0], step, exact)


def first_reached(curve: Curve, value: float, lower_is_better: bool = True) -> tuple[float, bool] | None:
    """(step, exact) at which a curve is first as good as `value`, between two steps by linear interpolation.

    None where no step is as good.
    """
    sign = 1 if lower_is_better else -1
    points = [(step, sign * curve[step]) for step in sorted(curve)]
    value *= sign
    if points and points[0][1] <= value:
        return float(points[0][0]), points[0][1] == value
    for (before, above), (after, below) in itertools.pairwise(points):
        if below <= value:
            return before + (after - before) * (above - value) / (above - below), True
    return None
