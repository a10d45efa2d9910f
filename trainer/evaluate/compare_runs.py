"""Evaluations of several runs side by side: each metric by step and run, and how much earlier a run gets there.

python launch/evaluate.py table runs/BASELINE runs/OTHER ... [--output DIR]

Reads RUN/evaluate/SUITE/step_*/results.json of each run, the baseline first, and writes table.md, table.json and
table.png. Values of different protocols are never put side by side.
"""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import parse_json

from ..files import json_text, write_atomically
from .curves import Reached, compare

_LOWER_IS_BETTER = ("fid", "sfid", "kid", "loss")
Column = tuple[str, str]  # suite, metric


@dataclass(frozen=True)
class Value:
    """One metric of one checkpoint. method: the run's name."""

    step: int
    method: str
    suite: str
    metric: str
    value: float
    standard_error: float | None

    @property
    def column(self) -> Column:
        return self.suite, self.metric

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2g}"
        return f"{self.value:.4g}{error}"


@dataclass(frozen=True)
class Comparison:
    """A run against the baseline, in one metric."""

    suite: str
    metric: str
    method: str
    reached: Reached

    def __str__(self) -> str:
        return f"{self.suite} {self.metric}: {self.method} {self.reached}"


def write_table(runs: Sequence[Path], output: Path, weights: str = "ema") -> str:
    """Write table.md, table.json and table.png to the folder `output`; returns the table as text, with their place.

    runs: their folders, the baseline first. Raises DataError where the runs cannot be compared.
    """
    names = method_names(runs)
    values, protocols = read_all(dict(zip(names, runs, strict=True)), weights)
    comparisons = compare_all(values, names)
    rows = table(values, names)
    lines = [str(comparison) for comparison in comparisons]
    output.mkdir(parents=True, exist_ok=True)
    notes = [f"- {suite}: {weights} weights, protocol `{key}`" for suite, key in protocols.items()]
    page = [*as_markdown(rows), "", *notes, *(f"- {line}" for line in lines), "", "![by step](table.png)", ""]
    write_atomically(output / "table.md", "\n".join(page))
    found = {
        "baseline": names[0],
        "weights": weights,
        "protocols": protocols,
        "values": [asdict(value) for value in values],
        "reached": [
            {
                "suite": c.suite,
                "metric": c.metric,
                "method": c.method,
                **asdict(c.reached),
                "times_earlier": c.reached.times_earlier,
            }
            for c in comparisons
        ],
    }
    write_atomically(output / "table.json", json_text(found, indent=1) + "\n")
    plot(values, comparisons, output / "table.png")
    return "\n".join([*as_text(rows), "", *lines, "", str(output / "table.md")])


def method_names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the path as tells them apart."""
    paths = [path.resolve() for path in runs]
    if len(set(paths)) < len(paths):
        raise DataError("the same run is given twice")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path.parts[-length:]) for path in paths]


# -------------------------------------------------------------------------------------------------------- the results
def read_all(runs: dict[str, Path], weights: str = "ema") -> tuple[list[Value], dict[str, str]]:
    """(values of these weights of all runs, {suite: hash of its protocol}). runs: {method: folder}.

    Raises DataError where a file is damaged, and where two of a suite were made by different protocols.
    """
    values: list[Value] = []
    protocols: dict[str, str] = {}
    first: dict[str, Path] = {}
    for method, folder in runs.items():
        of_weights = False
        for file in sorted(folder.glob("evaluate/*/step_*/results.json")):
            suite, protocol, its_weights, found = read(file, method)
            if its_weights != weights:
                continue
            of_weights = True
            if protocols.setdefault(suite, protocol) != protocol:
                raise DataError(
                    f"{file} cannot be compared with {first[suite]}: protocol {protocol}, against protocol "
                    f"{protocols[suite]}; evaluate both by one protocol"
                )
            first.setdefault(suite, file)
            values += found
        if not of_weights:
            raise DataError(
                f"{folder} has no evaluate/SUITE/step_*/results.json of {weights} weights: "
                f"run launch/evaluate.py --checkpoint {folder} --suite NAME --weights {weights} first"
            )
    return values, protocols


def read(file: Path, method: str) -> tuple[str, str, str, list[Value]]:
    """(suite, hash of the protocol, weights, values) of a results.json."""
    try:
        results: dict[str, Any] = parse_json(file.read_text())
        suite, checkpoint = str(results["suite"]), results["checkpoint"]
        values = [
            Value(int(checkpoint["step"]), method, suite, name, float(found["value"]), found["standard_error"])
            for name, found in results["metrics"].items()
        ]
        protocol, weights = str(results["protocol_hash"]), str(checkpoint["weights"])
    except KeyError as error:
        raise DataError(f"{file} has no key {error}: it was not written by launch/evaluate.py") from None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    if broken := [value.metric for value in values if not math.isfinite(value.value)]:
        raise DataError(f"{file}: {broken[0]} is not a finite number")
    return suite, protocol, weights, values


def lower_is_better(metric: str) -> bool:
    return any(metric == name or metric.startswith(f"{name}_") or metric.endswith(f"_{name}")
               for name in _LOWER_IS_BETTER)  # fmt: skip


def curve(values: Iterable[Value], method: str, column: Column) -> dict[int, float]:
    """{step: value} of one run in one metric."""
    return {v.step: v.value for v in values if v.method == method and v.column == column}


def columns(values: Iterable[Value]) -> list[Column]:
    return list(dict.fromkeys(value.column for value in values))


def compare_all(values: Sequence[Value], methods: Sequence[str]) -> list[Comparison]:
    """Each run against the first, in each metric that both have."""
    found = []
    for column in columns(values):
        if baseline := curve(values, methods[0], column):
            for method in methods[1:]:
                if other := curve(values, method, column):
                    found.append(Comparison(*column, method, compare(baseline, other, lower_is_better(column[1]))))
    return found


# ----------------------------------------------------------------------------------------------------- table and figure
def table(values: Sequence[Value], methods: Sequence[str]) -> list[list[str]]:
    """A header, then one row per step and method, sorted by step. The best value of a step has a star."""
    shown = columns(values)
    several = len({suite for suite, _ in shown}) > 1
    rows = [["step", "method", *(f"{suite} {metric}" if several else metric for suite, metric in shown)]]
    for step in sorted({value.step for value in values}):
        here = {(v.method, v.column): v for v in values if v.step == step}
        for method in methods:
            cells = [here.get((method, column)) for column in shown]
            if any(cells):
                rows.append([str(step), method, *(_cell(cell, here.values()) for cell in cells)])
    return rows


def _cell(value: Value | None, of_step: Iterable[Value]) -> str:
    if value is None:
        return ""
    rivals = [other.value for other in of_step if other.column == value.column]
    best = min(rivals) if lower_is_better(value.metric) else max(rivals)
    return f"{value}{' *' if len(rivals) > 1 and value.value == best else ''}"


def as_text(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def as_markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def plot(values: Sequence[Value], comparisons: Sequence[Comparison], path: Path) -> None:
    """A panel per metric: the baseline's final value is a line, and where another run reaches it a star."""
    from matplotlib.figure import Figure

    panels = columns(values)
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.6 * across, 3.6 * down), layout="constrained")
    spare = list(figure.subplots(down, across, squeeze=False).flat)
    methods = list(dict.fromkeys(value.method for value in values))
    for column, axes in zip(panels, spare, strict=False):
        for place, method in enumerate(methods):
            if points := sorted(curve(values, method, column).items()):
                axes.plot(*zip(*points, strict=True), "o-", ms=4, color=f"C{place}", label=method)
        for comparison in comparisons:
            if (comparison.suite, comparison.metric) != column:
                continue
            reached, colour = comparison.reached, f"C{methods.index(comparison.method)}"
            axes.axhline(reached.value, color="C0", ls=":", lw=1)
            if reached.times_earlier is not None:
                label = f"{'' if reached.exact else '≥ '}{reached.times_earlier:.2f}x earlier"
                axes.plot([reached.step], [reached.value], "*", ms=12, color=colour, label=label)
        axes.set(xlabel="step", ylabel=" ".join(column))
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=8)
    for axes in spare[len(panels) :]:
        axes.set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_atomically(path, image.getvalue())
