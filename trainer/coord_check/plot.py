"""The plot of a coordinate check: one line per module or parameter over the width, muP beside its SP control."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from .slopes import FigureSlope, Judgement, Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS: dict[Kind, str] = {
    "activation": "rms of each output",
    "change": "rms of its change\nsince initialisation",
    "update": "size of each\nparameter's update",
}
_COLOURS = {"passed": "#1a7f37", "failed": "#cf222e", "inconclusive": "#9a6700"}


def plot(report: Judgement, parametrization: str, title: str, path: Path) -> None:
    """Write the PNG. Lines are relative to their value at the smallest width: flat is what does not depend on it."""
    from matplotlib.figure import Figure

    checked = {"mup": "μP", "sp": "SP"}[parametrization]
    columns = [(checked, report.rows)]
    if parametrization != "sp":
        columns.append(("SP control (must fan out)", report.control))
    figure = Figure(figsize=(1.5 + 4.5 * len(columns), 9), layout="constrained")
    grid = figure.subplots(len(_PANELS), len(columns), sharex=True, sharey="row", squeeze=False)
    for axes_row, (kind, label) in zip(grid, _PANELS.items(), strict=True):
        for axes, (name, rows) in zip(axes_row, columns, strict=True):
            _panel(axes, [row for row in rows if row.figure.kind == kind and row.judged])
            if kind == "activation":
                axes.set_title(name, fontweight="bold")
        axes_row[0].set_ylabel(f"{label}\n(relative to the smallest width)")
    for axes in grid[-1]:
        axes.set_xlabel("width")
    figure.suptitle(
        f"{title}: {report.verdict.upper()}", fontsize=14, fontweight="bold", color=_COLOURS[report.verdict]
    )
    figure.supxlabel("Flat lines: independent of the width. Grey wedge: slopes that pass.", fontsize=10)
    figure.savefig(path, dpi=110, format="png")


def _panel(axes: "Axes", rows: list[FigureSlope]) -> None:
    """Draw the rows of the last step at which they were measured; the steepest one stands out, with its name."""
    last = max((row.figure.step for row in rows), default=0)
    lines = [(row, relative) for row in rows if row.figure.step == last and (relative := _relative(row))]
    if not lines:
        axes.text(0.5, 0.5, "nothing to show", ha="center", va="center", transform=axes.transAxes)
        return
    widths = sorted(lines[0][0].values)
    edges = [2 ** (lines[0][0].limit * math.log2(width / widths[0])) for width in widths]
    axes.fill_between(widths, [1 / edge for edge in edges], edges, color="0.88", lw=0)
    for _, relative in lines:
        axes.plot(widths, relative, color="#57606a", lw=0.7, alpha=0.55)
    row, relative = max(lines, key=lambda line: line[0].size)
    colour = _COLOURS["failed"] if row.exceeds else _COLOURS["passed"]
    slope = "" if row.slope is None else f"{row.slope:+.2f}  "
    axes.plot(widths, relative, color=colour, lw=2, marker="o", ms=4, label=f"{slope}{row.figure.name}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.grid(True, alpha=0.25)
    axes.legend(loc="best", fontsize=8, title=f"steepest slope, step {last}", title_fontsize=8)


def _relative(row: FigureSlope) -> list[float] | None:
    """Geometric mean over the seeds at each width, relative to the first; None where a value has no logarithm."""
    values = [row.values[width] for width in sorted(row.values)]
    if not all(0 < v < math.inf for seeds in values for v in seeds):
        return None
    means = [math.exp(sum(map(math.log, seeds)) / len(seeds)) for seeds in values]
    return [mean / means[0] for mean in means]
