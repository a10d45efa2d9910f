"""What a study found, as figures and plots: losses by key, importance, edge of stability, best region, cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..build.flops import image_flops
from ..config.load import load_config
from ..errors import ConfigError
from ..monitor.metrics import read_metrics
from .cost import Cost, cost_of
from .lr_fit import LR, LrFit, fit_of
from .space import FACTORS, Dimension, Point, Value
from .statistics import Estimate, best_region
from .study import DIVERGED_AT, Study, Trial
from .trust_region import ATTRIBUTE as BOX

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"complete": "#4c78a8", "halved": "#b0b0b0", "diverged": "#cf222e", "best": "#e4a11b"}


@dataclass(frozen=True)
class Key:
    """What the study says of one key. edge: the largest value that was stable, and the smallest one above it, from
    where every trial diverged; None where none did. region: the optimum with its 95 % interval, None where the trials
    are too few; of optim.lr that of the fit, where it has a minimum. spread: smallest and largest value of the best
    tenth of the trials, three at least; None of fewer than ten trials. All three need values that have an order."""

    dimension: Dimension
    best: Value
    importance: float | None
    edge: tuple[float, float] | None
    region: Estimate | None
    spread: tuple[float, float] | None

    @property
    def factor(self) -> tuple[str, str] | None:
        """(kind of module or role, hyperparameter) of a factor; None of another key."""
        if (key := self.dimension.key).startswith(FACTORS):
            kind, _, name = key.removeprefix(FACTORS).rpartition(".")
            return kind, name
        section, _, role = key.partition(".role_lr.")
        return (role, "lr") if section == "mup" and role else None

    @property
    def octaves_to_edge(self) -> float | None:
        """log2 of (smallest diverged value / best value)."""
        if self.edge is None or not self.dimension.log:
            return None
        return math.log2(self.edge[1] / float(self.best or 0))


@dataclass(frozen=True)
class Spent:
    """By all trials; one that ended early counts with the steps that it took."""

    flops: float
    process_hours: float
    device: str
    share: float | None
    """As a share of the target's FLOPs."""


@dataclass(frozen=True)
class StudyReport:
    study: Study
    trials: list[Trial]
    best: Trial
    lr_fit: LrFit | None
    keys: list[Key]
    spent: Spent
    planned: Cost | None
    pictures: dict[str, Path]

    @property
    def factors(self) -> dict[str, dict[str, Key]]:
        """{kind of module or role: {hyperparameter: key}} of the factors that were searched."""
        found: dict[str, dict[str, Key]] = {}
        for key in self.keys:
            if key.factor is not None:
                found.setdefault(key.factor[0], {})[key.factor[1]] = key
        return found

    @property
    def sampler(self) -> str:
        """How the points were chosen; of trust_region where its last box lay."""
        name = self.study.search.sampler
        boxes = [t.attributes[BOX] for t in self.trials if BOX in t.attributes]
        if not boxes:
            return name
        centre = "the start" if boxes[-1]["centre"] is None else f"trial {boxes[-1]['centre']}"
        return f"{name}, the last box {boxes[-1]['side']:.0%} of each range about {centre}"


def describe_factors(report: StudyReport) -> list[str]:
    """The factors by kind as lines of a table: of the best trial, with the spread of the best tenth."""
    names = list(dict.fromkeys(name for row in report.factors.values() for name in row))
    rows = [["factor", *names]] if names else []
    rows += [[kind, *(_factor(row.get(name)) for name in names)] for kind, row in report.factors.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _factor(key: Key | None) -> str:
    if key is None:
        return ""
    spread = f" ({key.spread[0]:.3g} to {key.spread[1]:.3g})" if key.spread else ""
    return f"{float(key.best or 0):.3g}{spread}"


def completed(study: Study) -> list[Trial]:
    """Trials with an objective, best first, without those that ended above the limit of divergence although no early
    check had stopped them. ConfigError where there is none."""
    done = sorted((t for t in study.trials() if t.value is not None), key=lambda t: t.value or 0.0)
    diverged = [t for t in study.trials() if t.state == "diverged"]
    if not done and diverged and not any(t.state in ("waiting", "running") for t in study.trials()):
        raise ConfigError(
            f"all {len(diverged)} trials of {study.folder} that ended on their own diverged, so there is no best one: "
            "lower the range of optim.lr in the search's space, or lengthen optim.warmup_steps, in a new study"
        )
    if not done:
        raise ConfigError(f"{study.folder} has no finished trial yet: launch/search.py run goes on with it")
    limit = DIVERGED_AT * (done[len(done) // 2].value or 0.0)
    return [t for t in done if (t.value or 0.0) <= limit]


def make_report(study: Study) -> StudyReport:
    """Figures and PNGs of a study, in its folder's report/; raises ConfigError where no trial is finished."""
    done = completed(study)
    trials = study.trials()
    diverged = [t for t in trials if t.state == "diverged" or (t.value is not None and t not in done)]
    importance = study.importance()
    regions = _regions(study.search.space, done)
    if (fit := fit_of(study.search.space, done)) and fit.region:
        regions[LR] = fit.region
    keys = [
        Key(
            d,
            done[0].point[d.key],
            importance.get(d.key),
            _edge(d, done, diverged),
            regions.get(d.key),
            _spread(d, done),
        )
        for d in study.search.space
    ]
    target = load_config(study.search.target) if study.search.target else None
    planned = cost_of(study.search, study.proxy, target) if target else None
    folder = study.folder / "report"
    folder.mkdir(exist_ok=True)
    pictures = {
        "losses": _plot_losses(keys, done, diverged, folder / "losses.png"),
        "curves": _plot_curves(study, done, folder / "curves.png"),
    }
    if importance:
        pictures["importance"] = _plot_importance(importance, folder / "importance.png")
    return StudyReport(study, trials, done[0], fit, keys, _spent(study, trials, planned), planned, pictures)


def _edge(dimension: Dimension, done: Sequence[Trial], diverged: Sequence[Trial]) -> tuple[float, float] | None:
    """(largest value of a trial that did not diverge, smallest one above which all did)."""
    if not dimension.numeric:
        return None
    stable = max(float(t.point[dimension.key] or 0) for t in done)
    above = [v for t in diverged if (v := float(t.point[dimension.key] or 0)) > stable]
    return (stable, min(above)) if above else None


def _spread(dimension: Dimension, done: Sequence[Trial]) -> tuple[float, float] | None:
    """(smallest, largest) value of the best tenth of the trials."""
    if not dimension.numeric or len(done) < 10:
        return None
    values = [float(t.point[dimension.key] or 0) for t in done[: max(3, len(done) // 10)]]
    return min(values), max(values)


def _scaled(dimension: Dimension, value: Value) -> float:
    """Where a value lies between the ends of its range, as a number from 0 to 1."""
    low, high = (float(v or 0) for v in dimension.ends)
    x = float(value or 0)
    if dimension.log:
        low, high, x = math.log(low), math.log(high), math.log(x)
    return (x - low) / (high - low)


def _unscaled(dimension: Dimension, u: float) -> float:
    low, high = (float(v or 0) for v in dimension.ends)
    return low * (high / low) ** u if dimension.log else low + (high - low) * u


def _regions(space: Sequence[Dimension], done: Sequence[Trial]) -> dict[str, Estimate]:
    ordered = [d for d in space if d.numeric and d.ends[0] != d.ends[-1]]
    if not ordered:
        return {}
    points = [[_scaled(d, t.point[d.key]) for d in ordered] for t in done]
    found = best_region(points, [t.value or 0.0 for t in done])
    if found is None:
        return {}
    return {
        d.key: Estimate(*(_unscaled(d, u) for u in (e.value, e.low, e.high)))
        for d, e in zip(ordered, found, strict=True)
    }


def _spent(study: Study, trials: Sequence[Trial], planned: Cost | None) -> Spent:
    """What the runs' metrics say. Steps that were lost to a kill and done again are not counted."""
    steps, hours, device = 0, 0.0, "not started"
    for trial in trials:
        for seed in range(study.search.seeds):
            records = read_metrics(study.run_folder(trial.number, seed))
            steps += max((r["step"] for r in records), default=0)
            timed = [r for r in records if "step_time_s" in r]
            before = [0, *(r["step"] for r in timed)]
            seconds = sum(r["step_time_s"] * (r["step"] - b) for r, b in zip(timed, before, strict=False))
            hours += seconds / 3600 * trial.attributes.get("processes", 1)
        device = trial.attributes.get("device", device)
    flops = float(steps * study.proxy.train.global_batch_size * image_flops(study.proxy))
    return Spent(flops, hours, device, flops / planned.target.flops if planned else None)


# ------------------------------------------------------------------------------------------------------------ pictures


def _plot_losses(keys: Sequence[Key], done: Sequence[Trial], diverged: Sequence[Trial], path: Path) -> Path:
    """One panel per key, as the paper's Figure 4: the loss of every trial; diverged ones are crosses at the top."""
    columns = min(2, len(keys))
    rows = -(-len(keys) // columns)
    figure = _figure(5.2 * columns, 3.6 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes, key in zip(panels, keys, strict=False):
        _panel(axes, key, done, diverged)
    for axes in panels[len(keys) :]:
        axes.set_visible(False)
    return _save(figure, path)


def _panel(axes: "Axes", key: Key, done: Sequence[Trial], diverged: Sequence[Trial]) -> None:
    dimension = key.dimension
    names = [str(v) for v in dimension.ends] if not dimension.numeric else None

    def place(point: Point) -> float:
        value = point[dimension.key]
        return names.index(str(value)) if names else float(value or 0)

    values = [t.value or 0.0 for t in done]
    top = max(values) + 0.06 * ((max(values) - min(values)) or 1.0)
    if key.region is not None:
        axes.axvspan(
            key.region.low, key.region.high, color=_COLOURS["best"], alpha=0.2, lw=0, label="best region, 95 %"
        )
        axes.axvline(key.region.value, color=_COLOURS["best"], ls="--", lw=1)
    axes.scatter([place(t.point) for t in done], values, s=22, color=_COLOURS["complete"], label="trials")
    if diverged:
        places = [place(t.point) for t in diverged]
        axes.scatter(places, [top] * len(places), marker="x", color=_COLOURS["diverged"], label="diverged")
    axes.scatter([place(done[0].point)], values[:1], s=150, marker="*", color=_COLOURS["best"], ec="black", lw=0.6,
                 label="best", zorder=3)  # fmt: skip
    if dimension.log:
        axes.set_xscale("log", base=2 if dimension.scale == "powers_of_two" else 10)
    if names:
        axes.set_xticks(range(len(names)), names)
    elif dimension.choices is not None:
        axes.set_xticks([float(v or 0) for v in dimension.choices], [f"{v:.4g}" for v in dimension.choices])
        axes.minorticks_off()
    axes.set(xlabel=dimension.key, ylabel="val_loss_ema")
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=8, loc="best")


def _plot_curves(study: Study, done: Sequence[Trial], path: Path) -> Path:
    """Validation loss against the step: the better, the darker. A trial that ended early ends early here, too."""
    figure = _figure(7, 4)
    axes = figure.subplots()
    rank = {trial.number: place for place, trial in enumerate(done)}
    for trial in sorted(study.trials(), key=lambda t: -rank.get(t.number, len(rank))):
        if not trial.curve:
            continue
        best = rank.get(trial.number) == 0
        colour = _COLOURS["best" if best else "complete" if trial.number in rank else "diverged"]
        shade = 1.0 if best else 0.25 + 0.5 * (1 - rank.get(trial.number, 0) / max(1, len(rank)))
        label = f"best: trial {trial.number}" if best else None
        axes.plot(
            *zip(*trial.curve.items(), strict=True), color=colour, alpha=shade, lw=2.2 if best else 1, label=label
        )
    axes.set(xlabel="step", ylabel="val_loss_ema", yscale="log")
    axes.grid(True, which="both", alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return _save(figure, path)


def _plot_importance(importance: dict[str, float], path: Path) -> Path:
    figure = _figure(7, 0.8 + 0.4 * len(importance))
    axes = figure.subplots()
    keys = list(importance)[::-1]
    axes.barh(keys, [importance[key] for key in keys], color=_COLOURS["complete"])
    axes.set(xlabel="importance (PED-ANOVA)", xlim=(0, 1))
    return _save(figure, path)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # only a report needs it, not a worker or a transfer

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> Path:
    figure.savefig(path, dpi=110, format="png")
    return path
