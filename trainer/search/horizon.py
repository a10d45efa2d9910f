"""What the best learning rate of a study is at several durations: trunks at multiples of it, with their branches.

The rest of the study's best point stays, and so does the proxy. The losses are those of the EMA weights on the fixed
bank, and what they say goes to horizon.json (trainer/search/exponent.py).
"""

import datetime
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.redaction import message

from ..config.keys import plain
from ..config.load import parse
from ..config.schema import TrainConfig
from ..errors import ConfigError, RunError
from ..files import json_text, write_atomically
from ..monitor.records import read_metrics
from ..parallel.mesh import rank
from .exponent import FILE, Exponent, Refusal, fit_exponent
from .lr_fit import LR
from .space import Point, as_overrides
from .statistics import Losses
from .study import Study
from .transfer import best_point
from .trunk_worker import has_diverged, open_folder, train_trunks
from .trunks import OBJECTIVE, Trunks


@dataclass(frozen=True)
class Trunk:
    """A run at a constant rate: `factor` times the best one, and the k-th seed."""

    factor: float
    seed: int

    @property
    def name(self) -> str:
        return f"lr_{self.factor:.6g}_seed_{self.seed}"


@dataclass(frozen=True)
class Horizon(Trunks[Trunk]):
    """What is trained: the proxy at a point of the space, at each factor of its learning rate, for each number of
    steps, so many seeds. study: its folder."""

    RECORD = "trunks.json"
    OTHERS = ("trunks of another point, proxy or other --branches", "Remove it to measure anew.")
    study: Path
    proxy: Mapping[str, Any]
    point: Point
    factors: tuple[float, ...]
    steps: tuple[int, ...]
    seeds: int

    @classmethod
    def of(cls, study: Study, branches: str, lrs: str, seeds: int) -> "Horizon":
        """From what a person types: shares of the proxy's steps, and factors of the best learning rate. Raises
        ConfigError for what no exponent can be fitted to."""
        shares, factors = _positive("--branches", branches, 2), _positive("--lrs", lrs, 3)
        if seeds < 1:
            raise ConfigError(f"--seeds must be at least 1, got {seeds}")
        if study.proxy.optim.kind == "muon":
            raise ConfigError(
                "optim.kind muon has no rule for the duration that an exponent could serve: search at the target's "
                "duration, or measure a study of optim.kind adamw"
            )
        steps = tuple(round(share * study.proxy.train.steps) for share in shares)
        if len(set(steps)) < len(steps) or steps[0] < 1:
            raise ConfigError(f"--branches {branches} of {study.proxy.train.steps} steps are {steps}: two are the same")
        horizon = cls(study.folder, plain(study.proxy), best_point(study), factors, steps, seeds)
        horizon.check(f"--branches {shares[0]:g}")
        for trunk in horizon.trunks():
            horizon.trunk_config(trunk, steps[0])
        return horizon

    @property
    def target(self) -> TrainConfig:
        return parse(self.proxy, f"the proxy of {self.study}", as_overrides(self.point))

    @property
    def folder(self) -> Path:
        return self.study / "horizon"

    def trunks(self) -> Iterator[Trunk]:
        """One whole set of rates after another: after the first seed there is something to fit."""
        for seed in range(self.seeds):
            for factor in self.factors:
                yield Trunk(factor, seed)

    def trunk_config(self, trunk: Trunk, steps: int) -> TrainConfig:
        own = [
            *self.trunk_overrides(trunk, trunk.seed, steps), f"{LR}={self.target.optim.lr * trunk.factor!r}",
            f"train.validate_every={self.steps[-1]}",
        ]  # fmt: skip
        point = {key: value for key, value in self.point.items() if key not in {o.partition("=")[0] for o in own}}
        return parse(self.proxy, f"the proxy of {self.study}", [*as_overrides(point), *own])

    def identity(self) -> dict[str, Any]:
        """More rates and seeds may come; the point and the durations stay."""
        config = self.trunk_config(Trunk(1.0, 0), self.steps[0])
        return self.identity_of(config, ())

    def conclude(self) -> str:
        """Write horizon.json, and say what is in it. Raises RunError, and leaves no file, where the losses give no
        exponent; where they are not all there it says so."""
        losses, missing = self._losses()
        if missing:
            folders = "\n  ".join(map(str, missing[:5]))
            return (
                f"{len(missing)} branches are not finished, and another worker may have them:\n  {folders}\n"
                "The same command goes on with them, and fits the exponent when all are there"
            )
        found = fit_exponent(losses)
        path = self.study / FILE
        if isinstance(found, Refusal):
            path.unlink(missing_ok=True)
            raise RunError(self._refused(found))
        write_atomically(path, json_text(self._data(found, losses), indent=1) + "\n")
        return f"{found}\n{path}; `search.py transfer --rules completed-p` uses it"

    def _losses(self) -> tuple[Losses, list[Path]]:
        """({steps: {log2 factor: loss of each seed, infinite where it diverged}}, the branches that are not
        finished)."""
        losses = {n: {math.log2(f): [math.nan] * self.seeds for f in self.factors} for n in self.steps}
        missing, sets = [], set[str]()
        for trunk in self.trunks():
            ran_away = has_diverged(self.folder / trunk.name / "trunk")
            for steps in self.steps:
                folder = self.branch_folder(trunk, steps)
                ends = [r for r in read_metrics(folder) if r["step"] == steps and OBJECTIVE in r]
                if ends:
                    sets.add(str(ends[-1].get("val_set")))
                    loss = ends[-1][OBJECTIVE]
                    losses[steps][math.log2(trunk.factor)][trunk.seed] = _or_infinite(loss)
                elif has_diverged(folder) or (ran_away and not folder.is_dir()):
                    losses[steps][math.log2(trunk.factor)][trunk.seed] = math.inf
                else:
                    missing.append(folder)
        if len(sets) > 1:
            raise ConfigError(f"{self.folder}: its branches were measured on different validation samples: remove it")
        return losses, missing

    def _refused(self, refusal: Refusal) -> str:
        lines = [f"no exponent in {self.folder}:", *(f"  {reason}" for reason in refusal.reasons)]
        if refusal.add:
            rates = sorted({*self.factors, *(2.0**x for x in refusal.add)})
            lines.append(f"Go on with --lrs {','.join(f'{rate:.4g}' for rate in rates)}")
        return "\n".join(lines)

    def _data(self, found: Exponent, losses: Losses) -> dict[str, Any]:
        lr = self.target.optim.lr
        rates = {
            steps: {f"{lr * 2.0**x:.6g}": values for x, values in curve.items()} for steps, curve in losses.items()
        }
        return {
            "exponent": found.exponent.value,
            "interval": [found.exponent.low, found.exponent.high],
            "durations": list(found.optima),
            "log2_lr": [math.log2(lr) + x for x in found.optima.values()],
            "losses": rates,
            "point": dict(self.point),
            "date": datetime.date.today().isoformat(),
        }


def measure(
    study: str,
    given: tuple[str, str, int],
    command: Sequence[str],
    workers: int,
    kill: Callable[[int], None],
    fit: bool,
) -> int:
    """Train what is not yet trained of a horizon, and with `fit` say what it shows. Returns an exit code.

    study: its folder or name. given: branches, learning rates and seeds, as `Horizon.of` takes them. command, workers,
    kill: as `train_trunks` takes them.
    """
    horizon = Horizon.of(Study.load(study), *given)
    if rank() == 0:
        open_folder(horizon)
    code = train_trunks(horizon, next(horizon.trunks()), command, workers, kill)
    if rank() == 0 and fit:
        print(message(horizon.conclude()), flush=True)
    return code


def _or_infinite(loss: float | None) -> float:
    """JSON has no other numbers than finite ones."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _positive(option: str, text: str, least: int) -> tuple[float, ...]:
    try:
        numbers = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        numbers = ()
    if len(numbers) < least or not all(0 < number < math.inf for number in numbers):
        raise ConfigError(f"{option} takes at least {least} positive numbers with commas between, got {text!r}")
    return numbers
