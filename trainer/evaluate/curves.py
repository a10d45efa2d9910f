"""A measure against the step: when does it reach a value?"""

import itertools
from collections.abc import Mapping


def first_reached(curve: Mapping[int, float], value: float, lower_is_better: bool = True) -> tuple[float, bool] | None:
    """(step, exact) at which {step: measure} is first as good as `value`, between two steps by linear interpolation.

    exact: False where the first step that was measured is already better, so that it was reached at or before it.
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
