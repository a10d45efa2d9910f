"""Coordinate check (Tensor Programs V, arXiv 2203.03466, appendix D): does what training does depend on the width?

A few steps on one fixed batch at several widths. Four figures are followed over the width:
  activation  rms of each observed module's output,
  change      rms of its difference from the output at initialisation, which noise at initialisation would hide,
  update      multiplier x ||dW||_2 x sqrt(fan_in / fan_out) of each matrix; of everything else the sum of rms(dp) over
              the steps: names the parameter whose learning rate is wrong, also where no activation shows it (a bias, a
              table). The sum, since the way back and forth of a gain that growing numbers of heads share gets more,
  weight      multiplier x ||W||_2 x sqrt(fan_in / fan_out) of each matrix that reads the width.
Each gets the least-squares slope of log2(figure) on log2(width) over all seeds; under muP every slope is near 0.

The same run under SP is the control: where training does not move SP's activations apart, it could not have moved
a faulty muP model's either, and the verdict is "inconclusive".
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..mup.apply import describe
from ..mup.table import MuTable, fans

Kind = Literal["activation", "change", "update", "weight"]
Verdict = Literal["passed", "failed", "inconclusive"]
# Largest |slope| of a correct model, calibrated on small backbones: reference/mup.md, T7-T9.
LIMITS: dict[Kind, float] = {"activation": 0.25, "change": 0.25, "update": 0.25, "weight": 0.3}
CONTROL = 0.7
# The last step that the limits are calibrated for. Later ones are measured but not judged: on one batch, models of
# finite width then part by how far each has learnt it (slopes of 0.35 after 32 steps in a correct model).
JUDGED_STEPS = 5


class Subject(NamedTuple):
    """A model ready to train on one fixed batch, which is the same at every width."""

    model: nn.Module
    table: MuTable
    observed: Mapping[str, nn.Module]
    """Modules whose output is followed; see `observe`."""
    loss: Callable[[], Tensor]
    """The forward pass."""
    update: Callable[[Tensor], object]
    """Backward pass and optimizer step."""
    weight: Callable[[str], Tensor]
    """A whole parameter by name."""


class Figure(NamedTuple):
    """What is measured: after `step` updates. label: role of a parameter, or why a figure is not judged."""

    kind: Kind
    name: str
    step: int


@dataclass(frozen=True)
class Measured:
    """values: figure -> width -> one number per seed. roles: of the parameters. at_rest: modules whose output is zero
    at initialisation."""

    widths: tuple[int, ...]
    values: Mapping[Figure, Mapping[int, list[float]]]
    roles: Mapping[str, str]
    at_rest: frozenset[str]


@dataclass(frozen=True)
class FigureSlope:
    """One figure over the width. slope: None where it cannot be fitted; `note` then says why. error: standard error
    of the slope from the spread of the seeds, 0 for one seed."""

    figure: Figure
    slope: float | None
    error: float
    judged: bool
    note: str
    values: Mapping[int, list[float]]

    @property
    def limit(self) -> float:
        return LIMITS[self.figure.kind]

    @property
    def size(self) -> float:
        """|slope|; infinite where a judged figure has none."""
        return abs(self.slope) if self.slope is not None else math.inf

    @property
    def exceeds(self) -> bool:
        return self.judged and self.size > self.limit

    def to_json(self) -> dict[str, Any]:
        kind, name, step = self.figure
        return {
            "kind": kind, "name": name, "step": step, "slope": self.slope, "error": self.error,
            "limit": self.limit, "judged": self.judged, "passed": not self.exceeds, "note": self.note,
            "values": dict(self.values),
        }  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    reason: str
    rows: tuple[FigureSlope, ...]
    control: tuple[FigureSlope, ...]
    culprits: Mapping[Kind, tuple[FigureSlope, ...]]
    """Rows over their limit, the worst first, one for each name."""

    @property
    def worst(self) -> dict[Kind, FigureSlope]:
        return {kind: rows[0] for kind in LIMITS if (rows := ranked(self.rows, kind))}


# ------------------------------------------------------------------------------------------------------- measuring
def observe(model: nn.Module, units: Sequence[nn.Module], compiled: bool) -> dict[str, nn.Module]:
    """Every leaf module and every unit (the residual stream); of a compiled unit only its output can be seen."""
    hidden = {id(m) for unit in units for m in unit.modules()} if compiled else set()
    shown = {id(unit) for unit in units}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in shown or (id(module) not in hidden and next(module.children(), None) is None)
    }


def recorded_steps(steps: int) -> list[int]:
    """All of the first few, then powers of two and the last."""
    return sorted({*range(1, min(steps, JUDGED_STEPS) + 1), *(2**i for i in range(steps.bit_length())), steps})


class _Recorder:
    """Hooks on modules; figures stay on the device until the end."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.figures: dict[Figure, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        self._step: int | None = None
        self._seen: dict[str, int] = {}
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        self._step, self._seen = step, {}
        yield
        self._step = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        @torch.no_grad()
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._step is None:
                return
            outputs = output if isinstance(output, tuple | list) else [output]
            for number, tensor in enumerate(outputs):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self._record(name if output is tensor else f"{name}[{number}]", tensor, self._step)

        # A compiled unit traces its hooks; what they write down must not become part of its graph.
        return torch.compiler.disable(hook)  # pyright: ignore[reportReturnType] (it is a function that it is given)

    def _record(self, name: str, tensor: Tensor, step: int) -> None:
        call = self._seen[name] = self._seen.get(name, 0) + 1
        name = name if call == 1 else f"{name} (call {call})"
        tensor = tensor.float() if tensor.dtype != torch.float64 else tensor
        if step == 0:
            self.start[name] = tensor.clone()
        self.figures[Figure("activation", name, step)] = _rms(tensor)
        if step > 0:
            self.figures[Figure("change", name, step)] = _rms(tensor - self.start[name])


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64) / math.sqrt(x.numel())


def _spectral_norm(matrix: Tensor) -> Tensor:
    """Largest singular value, from the smaller Gram matrix: ten times faster than the singular values."""
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    scale = matrix.abs().max().clamp(min=torch.finfo(matrix.dtype).tiny)  # squares of 1e-30 would be zero
    matrix = matrix / scale
    return scale * torch.linalg.eigvalsh(matrix @ matrix.T)[-1].clamp(min=0).sqrt()


@torch.no_grad()
def _size(subject: Subject, name: str, matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """Effect of a matrix (or of its update) on what it computes, in the form that muP keeps constant."""
    fan_in, fan_out = shape
    matrix = matrix.float() if matrix.dtype != torch.float64 else matrix
    return subject.table.rows[name].multiplier * _spectral_norm(matrix.flatten(1)) * math.sqrt(fan_in / fan_out)


def run(subject: Subject, steps: int) -> tuple[dict[Figure, float], set[str]]:
    """Train for `steps` updates -> (figures, modules whose output is zero at initialisation)."""
    infos = describe(subject.model)
    matrices = {n: fans(i) for n, i in infos.items() if len(i.shape) >= 2 and i.owner != "Parameter"}
    start = {name: subject.weight(name).clone() for name in matrices}
    path = {name: torch.zeros((), dtype=torch.float64) for name in infos if name not in matrices}
    recorder, wanted = _Recorder(subject.observed), recorded_steps(steps)
    figures: dict[Figure, Tensor] = {}
    for step in [*range(steps), steps]:
        if step == 0 or step in wanted:
            with recorder.at(step):
                loss = subject.loss()
        else:
            loss = subject.loss()
        if step < steps:
            before = {name: subject.weight(name).clone() for name in path}
            subject.update(loss)
            path = {n: so_far.to(before[n].device) + _rms(subject.weight(n) - before[n]) for n, so_far in path.items()}
        if step + 1 in (min(steps, JUDGED_STEPS), steps):
            figures |= {Figure("update", name, step + 1): length for name, length in path.items()}
            for name, shape in matrices.items():
                weight = subject.weight(name)
                figures[Figure("update", name, step + 1)] = _size(subject, name, weight - start[name], shape)
                figures[Figure("weight", name, step + 1)] = _size(subject, name, weight, shape)
    recorder.remove()
    figures |= recorder.figures
    names = list(figures)
    values = torch.stack([figures[name].double() for name in names]).tolist()
    measured = dict(zip(names, values, strict=True))
    at_rest = {figure.name for figure, value in measured.items() if figure.step == 0 and value == 0}
    return {figure: value for figure, value in measured.items() if figure.step > 0}, at_rest


def measure(build: Callable[[int, int], Subject], widths: Sequence[int], seeds: int, steps: int) -> Measured:
    """build(width, seed) -> Subject. Equal seeds must give equal data at every width."""
    values: dict[Figure, dict[int, list[float]]] = {}
    roles: dict[str, str] = {}
    at_rest: set[str] = set()
    for width in widths:
        for seed in range(seeds):
            subject = build(width, seed)
            figures, still = run(subject, steps)
            at_rest |= still
            roles = {name: row.role for name, row in subject.table.rows.items()}
            for figure, value in figures.items():
                values.setdefault(figure, {}).setdefault(width, []).append(value)
            del subject  # the next one may need its memory
    return Measured(tuple(widths), values, roles, frozenset(at_rest))


# --------------------------------------------------------------------------------------------------------- judging
class Fit(NamedTuple):
    """slope: None where there is none, and `why`. counts: whether it is judged: a missing slope may be a fault."""

    slope: float | None
    error: float
    counts: bool
    why: str


def fit(values: Mapping[int, Sequence[float]]) -> Fit:
    """Slope of log2 value on log2 width over all seeds; or why there is none, and whether that is a fault."""
    everything = [value for seeds in values.values() for value in seeds]
    if not all(map(math.isfinite, everything)):
        broken = [width for width, seeds in values.items() if not all(map(math.isfinite, seeds))]
        return Fit(None, 0.0, True, f"not finite at width {', '.join(map(str, broken))}")
    if not any(everything):
        return Fit(None, 0.0, False, "zero at every width: nothing has reached it yet")
    if not all(everything):
        still = [width for width, seeds in values.items() if not all(seeds)]
        return Fit(None, 0.0, True, f"zero at width {', '.join(map(str, still))} alone")
    logs = {math.log2(width): [math.log2(value) for value in seeds] for width, seeds in values.items()}
    count = len(everything)
    mean_x = sum(x * len(ys) for x, ys in logs.items()) / count
    mean_y = sum(map(sum, logs.values())) / count
    spread = sum((x - mean_x) ** 2 * len(ys) for x, ys in logs.items())
    slope = sum((x - mean_x) * (y - mean_y) for x, ys in logs.items() for y in ys) / spread
    noise = sum((y - sum(ys) / len(ys)) ** 2 for ys in logs.values() for y in ys) / max(1, count - len(logs))
    return Fit(slope, math.sqrt(noise / spread), True, "")


def rows_of(measured: Measured) -> tuple[FigureSlope, ...]:
    rows = []
    for figure, values in measured.values.items():
        slope, error, judged, note = fit(values)
        role = measured.roles.get(figure.name)
        if figure.kind == "weight" and role not in ("hidden", "output"):
            # The norm of a thin random matrix has not reached its limit at small widths.
            judged, note = False, f"{role}: fan_in does not grow"
        elif figure.step > JUDGED_STEPS and slope is not None:
            judged, note = False, f"only the first {JUDGED_STEPS} steps are judged"
        rows.append(FigureSlope(figure, slope, error, judged, note or role or "", values))
    return tuple(rows)


def ranked(rows: Sequence[FigureSlope], kind: Kind) -> list[FigureSlope]:
    """Judged rows of a kind, the steepest first, one for each name."""
    best: dict[str, FigureSlope] = {}
    for row in sorted((r for r in rows if r.judged and r.figure.kind == kind), key=lambda r: -r.size):
        best.setdefault(row.figure.name, row)
    return list(best.values())


def strongest_control(control: Measured) -> FigureSlope | None:
    """The activation that grows most. Changes alone do not count, and so no output that starts at zero: to first
    order they grow at any learning rate, even one that moves nothing."""
    rows = [r for r in rows_of(control) if r.figure.kind == "activation" and r.figure.name not in control.at_rest]
    return max((r for r in rows if r.judged), key=lambda r: math.inf if r.slope is None else r.slope, default=None)


def shows_faults(control: Measured) -> bool:
    """Whether the settings are such that a fault shows, as it does in SP."""
    strongest = strongest_control(control)
    return strongest is not None and (strongest.slope is None or strongest.slope > CONTROL)


def judge(measured: Measured, control: Measured) -> Judgement:
    """control: the same settings under SP."""
    rows = rows_of(measured)
    culprits: dict[Kind, tuple[FigureSlope, ...]] = {
        kind: tuple(row for row in ranked(rows, kind) if row.exceeds) for kind in LIMITS
    }
    strongest = strongest_control(control)
    if not shows_faults(control):
        # Before anything else: where SP looks well, so could a faulty model, and rounding can make a right one fail.
        verdict = "inconclusive"
        reason = (
            f"no activation of the SP control has a slope over {CONTROL}"
            + (
                f" (the largest: {strongest.slope:.2f})"
                if strongest is not None and strongest.slope is not None
                else ""
            )
            + ": these steps could not show a fault; raise --lr or --steps"
        )
    elif any(culprits.values()):
        verdict, reason = "failed", "; ".join(_name(found[0]) for found in culprits.values() if found)
    else:
        verdict, reason = "passed", "; ".join(_name(found[0]) for k in LIMITS if (found := ranked(rows, k)))
    return Judgement(verdict, reason, rows, rows_of(control), culprits)


def _name(row: FigureSlope) -> str:
    slope = row.note if row.slope is None else f"{row.slope:+.2f}"
    return f"{row.figure.kind} {slope} in {row.figure.name} (step {row.figure.step})"
