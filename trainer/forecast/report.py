"""A forecast as data, as text, as a picture and as a page."""

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data.files import json_digest
from data.templates import render

from ..checkpoint.find import complete_checkpoints
from ..checkpoint.meta import read_meta
from ..errors import ConfigError
from ..files import json_text, write_atomically
from ..provenance import commit
from ..search.page import inline_png
from ..search.trunks import decay_steps
from .fit import Fit, Interval, Rung, fit_rungs
from .laws import COEFFICIENTS
from .rungs import Point, Rungs, parameters_of, read_points, read_stable_points
from .track import FORECAST, Expected, bank_of, facts

_COURSE = 24  # steps of the target at which the forecast says what to expect


@dataclass(frozen=True)
class Forecast:
    """What is said of a run of so many parameters and images, and what it rests on."""

    fit: Fit
    rungs: Sequence[Rung]
    parameters: float
    images: float
    by_level: dict[str, Interval]
    """The loss at each time of the fixed bank."""
    course: list[Expected]
    """What to expect on the way, where the rungs tell."""
    notes: list[str]
    target: dict[str, Any]
    """The config's facts; {} for a table."""
    fingerprints: dict[str, str]
    """Of the rungs' data and encoders."""
    name: str

    @property
    def refused(self) -> bool:
        return bool(self.fit.refused)

    def data(self) -> dict[str, Any]:
        """forecast.json."""
        loss, budget = self.fit.loss(self.parameters, self.images), self.parameters * self.images
        size, wanted = self.fit.optimal_parameters(budget), self.fit.budget_of(self.parameters)
        coefficients = self.fit.coefficients()
        exponents = {name: coefficients[name] for name in ("alpha", "beta")}
        best = self.fit.has_optimum
        return {
            "name": self.name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "refused": self.refused,
            "reasons": self.fit.refused,
            "notes": self.notes,
            "parameters": self.parameters,
            "images": self.images,
            "loss": loss.value,
            "interval": [loss.low, loss.high],
            "exponents": {name: value.value for name, value in exponents.items()},
            "exponents_interval": {name: [value.low, value.high] for name, value in exponents.items()},
            "floor": coefficients["floor"].value,
            "floor_interval": [coefficients["floor"].low, coefficients["floor"].high],
            "optimal_parameters": size.value if best else None,
            "optimal_parameters_interval": [size.low, size.high] if best else None,
            "optimal_images": budget / size.value if best else None,
            "images_for_this_size": wanted.value / self.parameters if best else None,
            "images_for_this_size_interval": [each / self.parameters for each in wanted[1:]] if best else None,
            "by_level": {key: {"loss": each.value, "interval": [each.low, each.high]}
                         for key, each in self.by_level.items()},
            "fit": {"points": self.fit.count, "rms_residual": self.fit.rms_residual, "left_out": self.fit.left_out},
            "course": [list(each) for each in self.course],
            "fingerprints": self.fingerprints,
            "target": self.target,
            "target_digest": json_digest(self.target),
            "rungs_digest": json_digest([list(vars(rung).values()) for rung in self.rungs]),
            "rungs": [vars(rung) for rung in self.rungs],
        }  # fmt: skip


def forecast_table(rungs: Sequence[Rung], parameters: float, images: float, name: str) -> Forecast:
    """A forecast from runs that were made elsewhere. Raises ConfigError where they are too few."""
    fit = _fit(rungs)
    return Forecast(fit, rungs, parameters, images, {}, [], _doubts(fit), {}, {}, name)


def forecast_target(rungs: Rungs) -> Forecast:
    """The forecast of a config from its rungs. Raises ConfigError where too few are finished."""
    target, points = rungs.target, read_points(rungs)
    fit, parameters = _fit([_rung(point) for point in points]), float(parameters_of(target))
    images = float(target.train.steps * target.train.global_batch_size)
    missing = len(rungs.steps) * len(list(rungs.trunks())) - len(points)
    notes = [*([f"{missing} rungs are not finished"] if missing else []), *_doubts(fit)]
    decayed = target.optim.schedule == "wsd"
    if not decayed:
        share = decay_steps(target, target.train.steps) / target.train.steps
        notes.append(
            f"optim.schedule is {target.optim.schedule}; the rungs' rate is constant and falls to 0 over the last "
            f"{share:.0%} of their steps (wsd): the forecast is of a target that ends so"
        )
    by_level = {}
    for level in sorted(set[str]().union(*(point.by_level for point in points))):
        each = [Rung(p.parameters, p.images, p.seed, p.by_level.get(level, math.inf)) for p in points]
        try:
            by_level[level] = fit_rungs(each, check=False).loss(parameters, images)
        except ValueError as error:  # a time that only some rungs were measured at
            notes.append(f"nothing is said of {level}: {error}")
    course = _course(rungs, fit, parameters, notes) if decayed else []
    return Forecast(
        fit, [_rung(p) for p in points], parameters, images, by_level, course, notes, facts(target),
        _fingerprints(rungs), str(target.run.name),
    )  # fmt: skip


def _fingerprints(rungs: Rungs) -> dict[str, str]:
    """Of a rung that is finished; {} where its checkpoint is gone."""
    for trunk in rungs.trunks():
        for steps in rungs.steps:
            for checkpoint in complete_checkpoints(rungs.branch_folder(trunk, steps) / "checkpoints"):
                meta = read_meta(checkpoint)
                return {key: str(value) for key, value in {**meta["fingerprints"], **bank_of(meta)}.items()}
    return {}


def _fit(rungs: Sequence[Rung]) -> Fit:
    try:
        return fit_rungs(rungs)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _rung(point: Point) -> Rung:
    return Rung(float(point.parameters), float(point.images), point.seed, point.loss)


def _doubts(fit: Fit) -> list[str]:
    """What could not be looked into, or does not follow."""
    doubts = []
    if fit.left_out is None:
        doubts.append(
            f"the widest rungs could not be left out to see whether the law of the others finds them, which takes "
            f"{COEFFICIENTS + 2} points without them: add a width or a duration"
        )
    if not fit.has_optimum:
        doubts.append("the losses hardly depend on the size, or on the images: no best size follows from them")
    return doubts


def _course(rungs: Rungs, fit: Fit, parameters: float, notes: list[str]) -> list[Expected]:
    """While the rate is constant: from what the trunks measured after as many images, from twice the warm-ups on. At
    the end: the forecast itself. Of the decay between nothing is said. notes: gets why there is nothing but the end.

    A trunk's average spans the share of its steps that the target's will; where their durations differ, it spans fewer
    steps, which moves the loss on the way more than that at the end.
    """
    target = rungs.target
    steps, batch = target.train.steps, target.train.global_batch_size
    end = fit.loss(parameters, float(steps * batch))
    course = [Expected(steps, *end)]
    stable = [_rung(point) for point in read_stable_points(rungs)]
    try:
        on_the_way = fit_rungs(stable, check=False)
    except ValueError as error:
        notes.append(f"nothing is said of the way to the end: {error}")
        return course
    if on_the_way.refused:
        notes.append(f"nothing is said of the way to the end: {'; '.join(on_the_way.refused)}")
        return course
    first = max(2.0 * target.optim.warmup_steps, min(rung.images for rung in stable) / batch, 1.0)
    last = steps - decay_steps(target, steps)
    if first >= last:
        return course
    at = sorted({round(step) for step in np.geomspace(first, last, _COURSE)})
    return [*(Expected(step, *on_the_way.loss(parameters, float(step * batch))) for step in at), *course]


# ------------------------------------------------------------------------------------------------------ for a person


def describe(forecast: Forecast) -> str:
    """What a person reads."""
    fit, budget = forecast.fit, forecast.parameters * forecast.images
    loss, size = fit.loss(forecast.parameters, forecast.images), fit.optimal_parameters(budget)
    wanted, c = fit.budget_of(forecast.parameters), fit.coefficients()
    left_out = (
        "" if fit.left_out is None else f"; without the largest rungs it misses them by {_shown(fit.left_out, '+.2%')}"
    )
    lines = [
        f"{forecast.name}, {forecast.parameters:.4g} parameters after {forecast.images:.4g} images: loss "
        f"{loss.value:.4g} [{loss.low:.4g}, {loss.high:.4g}] (90 %)",
        f"law: L = {_shown(c['floor'])} + a N^-alpha + b D^-beta, alpha {_shown(c['alpha'])}, beta "
        f"{_shown(c['beta'])}; {fit.count} points leave {fit.rms_residual:.2%} of the loss{left_out}",
    ]
    if fit.has_optimum:
        lines += [
            f"for this compute (N D = {budget:.3g}) the best size is {_shown(size, '.3g')} parameters, with "
            f"{budget / size.value:.3g} images",
            f"this size is the best one for {wanted.value / forecast.parameters:.3g} images "
            f"[{wanted.low / forecast.parameters:.3g}, {wanted.high / forecast.parameters:.3g}]",
        ]
    lines += [
        *(f"note: {note}" for note in forecast.notes),
        *(f"REFUSED: {reason}" for reason in fit.refused),
    ]
    return "\n".join(lines)


def _shown(each: Interval, form: str = ".3f") -> str:
    return f"{each.value:{form}} [{each.low:{form}}, {each.high:{form}}]"


def write_forecast(forecast: Forecast, folder: Path) -> Path:
    """forecast.json, forecast.png and index.html in a folder; returns the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(forecast, folder / "forecast.png")
    data = forecast.data()
    page = render(
        Path(__file__).with_name("templates") / "forecast.html",
        f=data,
        text=describe(forecast),
        picture=inline_png(folder / "forecast.png"),
        coefficients=COEFFICIENTS,
    )
    write_atomically(folder / "index.html", page)
    write_atomically(folder / FORECAST, json_text(data, indent=1) + "\n")
    return folder / FORECAST


def draw(forecast: Forecast, path: Path) -> None:
    """Left: the rungs, their law and the target. Right: what the law leaves of each rung."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    used = [rung for rung in forecast.rungs if math.isfinite(rung.loss) and rung.lr == 1.0]
    most = max(forecast.images, *(rung.images for rung in used))
    d = np.geomspace(min(rung.images for rung in used), most, 60)
    for number, n in enumerate(sorted({rung.parameters for rung in used})):
        here, colour = [rung for rung in used if rung.parameters == n], f"C{number % 10}"
        left.plot([r.images for r in here], [r.loss for r in here], ".", color=colour)
        left.plot(d, np.exp(forecast.fit.law.log_loss(n, d)[0]), color=colour, lw=1, label=f"{n:.3g} parameters")
        left_over = [100 * (r.loss / float(np.exp(forecast.fit.law.log_loss(n, r.images))[0, 0]) - 1) for r in here]
        right.plot([r.images for r in here], left_over, ".", color=colour)
    loss = forecast.fit.loss(forecast.parameters, forecast.images)
    error = [[loss.value - loss.low], [loss.high - loss.value]]
    left.plot(d, np.exp(forecast.fit.law.log_loss(forecast.parameters, d)[0]), "k:", lw=1)
    left.errorbar([forecast.images], [loss.value], yerr=error, fmt="k*", capsize=4, ms=9,
                  label=f"forecast, {forecast.parameters:.3g} parameters")  # fmt: skip
    left.set(xlabel="images", ylabel="loss on the fixed bank (EMA)", xscale="log", yscale="log")
    right.set(xlabel="images", ylabel="measured beside the law, %", xscale="log")
    right.axhline(0, color="k", lw=0.8)
    for axes in (left, right):
        axes.grid(True, which="both", alpha=0.25)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")
