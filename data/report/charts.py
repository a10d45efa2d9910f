"""Histograms as what a page draws: bars, ticks and marks, in units of an SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .counts import Bins

WIDTH, HEIGHT = 640, 180  # of the area in which bars are
_LABEL_WIDTH = 64  # that a tick needs
_WIDEST_BAR = 48


class Bar(NamedTuple):
    """x, y, width and height; what it stands for, in words; and whether it lies beyond the mark that cuts."""

    x: float
    y: float
    width: float
    height: float
    title: str
    beyond: bool


class Chart(NamedTuple):
    """ticks and marks: (x, text). top: what the height of the area stands for."""

    bars: list[Bar]
    ticks: list[tuple[float, str]]
    marks: list[tuple[float, str]]
    top: str


def chart(
    bins: Bins,
    unit: str,
    marks: Sequence[tuple[float, str]] = (),
    cut: float = np.inf,
    ticks: Sequence[tuple[float, str]] = (),
    written: str = "{:,.0f}",
) -> Chart:
    """The chart of a histogram. unit: of the values. marks and ticks: (value, text); without ticks bars are labelled by
    their values. cut: the value from which on bars are marked as beyond it. written: how an edge is."""
    scale = np.log if bins.log else np.asarray
    low, high = (float(scale(bins.edges[place])) for place in (0, -1))

    def x(value: float) -> float:
        return WIDTH * (float(scale(value)) - low) / max(high - low, 1e-9)

    most, total = max(1, int(bins.counts.max(initial=1))), max(1, int(bins.counts.sum()))
    whole = bool((bins.edges == np.round(bins.edges)).all())
    bars = []
    for first, end, count in zip(bins.edges[:-1], bins.edges[1:], bins.counts, strict=True):
        last = end - 1 if whole else end
        span = " to ".join(dict.fromkeys(written.format(edge) for edge in (first, last)))
        height = HEIGHT * int(count) / most
        title = f"{span} {unit}: {int(count):,} ({count / total:.1%})"
        width = max(1.0, min(_WIDEST_BAR, x(end) - x(first) - 1))
        left = (x(first) + x(end) - width) / 2 if width == _WIDEST_BAR else x(first)
        bars.append(Bar(left, HEIGHT - height, width, height, title, first >= cut))
    placed = [[(x(at), text) for at, text in some if bins.edges[0] < at < bins.edges[-1]] for some in (marks, ticks)]
    return Chart(bars, placed[1] or _ticks(bins, x, whole, written), placed[0], f"{most:,} ({most / total:.1%})")


def _ticks(bins: Bins, x: Callable[[float], float], whole: bool, written: str) -> list[tuple[float, str]]:
    """Below the bars' left edges, or below a bar's middle where it stands for one whole number."""
    single = whole and bool((np.diff(bins.edges) == 1).all())
    ticks: list[tuple[float, str]] = []
    for first, end in zip(bins.edges[:-1], bins.edges[1:], strict=True):
        at = (x(first) + x(end)) / 2 if single else x(first)
        if not ticks or at - ticks[-1][0] >= _LABEL_WIDTH:
            ticks.append((at, written.format(first)))
    return ticks
