"""A study in its folder: which trials there are, who runs which, and what came out.

Optuna's journal file is the one record; many processes on many machines share it. A trial's hyperparameters stand
there before it starts. A worker holds a lock file as long as it runs a trial: the system lets go of it when the
process ends, however it ends, so that a trial which is running without a lock is dead and goes on elsewhere.
"""

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..config.keys import plain
from ..config.load import parse
from ..config.resume import differences
from ..config.schema import TrainConfig
from ..errors import CheckpointError, ConfigError
from ..files import NoLocksError, lock_folder, try_lock
from .definition import Published, Search
from .journal import Journal
from .space import ADAPTIVE, Dimension, Point, point
from .trust_region import TrustRegionSampler

JOURNAL = "study.journal"
DIVERGED_AT = 1.5
"""A trial has diverged when its loss is above this many times the median of the other trials."""
LEAST_PEERS = 4
"""The fewest other trials whose median is trusted."""
State = Literal["waiting", "running", "complete", "diverged", "halved"]


@dataclass(frozen=True)
class Trial:
    """losses: of each seed, [] before the end. value: their mean. curve: {step: val_loss_ema} of the first seed.
    attributes: commit, muP table, processes and device of the run."""

    number: int
    state: State
    point: Point
    value: float | None
    losses: list[float]
    reason: str
    curve: dict[int, float]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A trial that this process may run, as long as the lock is open."""

    trial: optuna.trial.Trial
    lock: IO[str]

    @property
    def number(self) -> int:
        return self.trial.number

    @property
    def point(self) -> Point:
        return dict(self.trial.params)


class Study:
    """The trials of `search` in `folder`."""

    def __init__(self, folder: Path, search: Search, proxy: TrainConfig, study: optuna.Study) -> None:
        self.folder, self.search, self.proxy = folder, search, proxy
        self._study = study
        self._distributions = {d.key: d.distribution() for d in search.space}

    @classmethod
    def open(cls, search: Search) -> "Study":
        """The study of a search: created with all its trials, or continued. Raises ConfigError where the folder holds
        a study of another search; more trials than before are added."""
        folder, proxy = search.folder, search.proxy()
        with lock_folder(folder, wait_s=120), _damage_is_told(folder):
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            old = optuna.create_study(storage=_storage(folder), study_name=search.name, load_if_exists=True)
            if "search" in old.user_attrs:
                _check_same(folder, old.user_attrs, search, proxy)
            old.set_user_attr("proxy", plain(proxy))
            old.set_user_attr("search", _to_json(search))
            study = cls(folder, search, proxy, _load(folder, search))
            for number in range(len(old.trials), search.trials):
                if (values := point(search.space, search.sampler, search.seed, number)) is not None:
                    study._study.enqueue_trial(values)
        return study

    @classmethod
    def load(cls, name: str) -> "Study":
        """A study by its folder, or by its name under runs/."""
        for folder in (Path(name), Path("runs") / name):
            if (folder / JOURNAL).is_file():
                with _damage_is_told(folder):
                    return cls._loaded(folder)
        raise ConfigError(f'no study "{name}": expected {JOURNAL} in that folder or in runs/{name}')

    @classmethod
    def _loaded(cls, folder: Path) -> "Study":
        if not (stored := optuna.get_all_study_summaries(_storage(folder))) or "search" not in stored[0].user_attrs:
            raise ConfigError(f"the study in {folder} was stopped before it had trials: run it again")
        attributes = stored[0].user_attrs
        search = _from_json(attributes["search"])
        study = cls(folder, search, parse(attributes["proxy"], str(folder)), _load(folder, search))
        study.trials()
        return study

    def claim(self) -> Claim | None:
        """A dead trial, else the next one; None where all are finished or in other hands."""
        with lock_folder(self.folder, wait_s=120), _damage_is_told(self.folder):
            for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if lock := self._lock(frozen.number):
                    trial = optuna.trial.Trial(self._study, frozen._trial_id)
                    for key, distribution in self._distributions.items():
                        # A kill within ask() leaves a trial without some of its values; those it has stay.
                        trial._suggest(key, distribution)
                    return Claim(trial, lock)
            trials = self._study.get_trials(deepcopy=False)
            waiting = any(t.state == TrialState.WAITING for t in trials)
            if not waiting and not (self.search.sampler in ADAPTIVE and len(trials) < self.search.trials):
                return None
            trial = self._study.ask(self._distributions)
            lock = self._lock(trial.number)
            assert lock is not None, f"trial {trial.number} is new, and its lock is held"
            return Claim(trial, lock)

    def check_data(self, identity: dict[str, Any]) -> None:
        """Raise ConfigError unless data, validation bank and encoders have the fingerprints that they had in the trials
        before: their losses are compared."""
        with lock_folder(self.folder, wait_s=120):
            held = self._study.user_attrs.get("identity", {})
            if changed := [part for part in identity if part in held and held[part] != identity[part]]:
                raise ConfigError(
                    f"{self.folder}: the trials before had other contents of {', '.join(changed)}: give back what they "
                    "had, or give this search another name"
                )
            if identity.keys() - held.keys():  # not every trial has REPA's encoder
                self._study.set_user_attr("identity", held | identity)

    def finish(self, claim: Claim, state: State, losses: list[float], reason: str, **attributes: Any) -> None:
        """Record the outcome and let go of the trial."""
        for key, value in {**attributes, "outcome": state, "reason": reason, "losses": losses}.items():
            claim.trial.set_user_attr(key, value)
        with lock_folder(self.folder, wait_s=120):
            if state == "complete":
                self._study.tell(claim.number, statistics.fmean(losses))
            else:
                self._study.tell(claim.number, state=TrialState.PRUNED)
            claim.lock.close()

    def report(self, claim: Claim, step: int, loss: float) -> tuple[State, str] | None:
        """Store a validation loss; a verdict where the trial should end here."""
        if step not in self._study.get_trials(deepcopy=False)[claim.number].intermediate_values:  # a resumed trial
            claim.trial.report(loss, step)
        if self.search.halving is not None and claim.trial.should_prune():
            return "halved", f"not among the best 1 / {self.search.halving['factor']} at step {step}"
        return self.diverged(claim.number, step, loss)

    def diverged(self, number: int, step: int, loss: float) -> tuple[State, str] | None:
        """Verdict on a loss after a quarter of the budget: above DIVERGED_AT medians of the other trials there?"""
        if step < self.proxy.train.steps / 4:
            return None
        trials = self._study.get_trials(deepcopy=False)
        peers = [t.intermediate_values[step] for t in trials if t.number != number and step in t.intermediate_values]
        if len(peers) < LEAST_PEERS or loss <= DIVERGED_AT * (median := statistics.median(peers)):
            return None
        return "diverged", f"val_loss_ema {loss:.4g} at step {step} is above {DIVERGED_AT} x the median {median:.4g}"

    def trials(self) -> list[Trial]:
        with _damage_is_told(self.folder):
            return [self._trial(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def importance(self) -> dict[str, float]:
        """Share of each key in what separates good trials from the others (PED-ANOVA); {} of too few."""
        complete = [t for t in self.trials() if t.state == "complete"]
        if len(complete) < 4 or len({t.value for t in complete}) < 2 or len(self.search.space) < 2:
            return {}
        found = optuna.importance.get_param_importances(self._study)
        return found if all(math.isfinite(v) for v in found.values()) else {}

    def run_folder(self, number: int, seed: int = 0) -> Path:
        return self.folder / self.search.run_name(number, seed)

    def _trial(self, frozen: FrozenTrial) -> Trial:
        attributes = dict(frozen.user_attrs)
        waiting = frozen.state == TrialState.WAITING
        outcome = attributes.pop("outcome", None)
        point = frozen.system_attrs["fixed_params"] if waiting else dict(frozen.params)
        # A kill while it is asked for leaves a running trial without some of its values; no other is without.
        if frozen.state != TrialState.RUNNING and (missing := self._distributions.keys() - point.keys()):
            raise LookupError(f"trial {frozen.number} has no {min(missing)}")
        return Trial(
            number=frozen.number,
            state="waiting" if waiting else outcome if frozen.state.is_finished() else "running",
            point=point,
            value=frozen.value if frozen.state == TrialState.COMPLETE else None,  # a pruned one has its last loss
            losses=attributes.pop("losses", []),
            reason=attributes.pop("reason", ""),
            curve=dict(sorted(frozen.intermediate_values.items())),
            attributes=attributes,
        )

    def _lock(self, number: int) -> IO[str] | None:
        """Hold a trial; None where another process does."""
        folder = self.folder / "locks"
        folder.mkdir(exist_ok=True)
        try:
            return try_lock(folder / f"{number:04d}")
        except NoLocksError as error:
            raise ConfigError(
                f"{folder} is on a file system without locks ({error}): workers could not tell a dead trial from a "
                "running one. Choose another run.dir, or mount it with flock."
            ) from None


def _storage(folder: Path) -> optuna.storages.JournalStorage:
    return optuna.storages.JournalStorage(Journal(folder / JOURNAL))


@contextlib.contextmanager
def _damage_is_told(folder: Path) -> Iterator[None]:
    """Whatever Optuna or this file stumble over while they read the journal is damage, and one message."""
    try:
        yield
    except (ConfigError, CheckpointError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise ConfigError(
            f"{folder / JOURNAL} is damaged ({reason}): give it back from a copy, or give the search another name to "
            "start anew"
        ) from None


def _load(folder: Path, search: Search | None = None) -> optuna.Study:
    """The stored study; its sampler and pruner come with `search`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    halving = search.halving if search else None
    pruner = (
        optuna.pruners.SuccessiveHalvingPruner(halving["first_step"], halving["factor"])
        if halving
        else optuna.pruners.NopPruner()
    )
    return optuna.load_study(study_name=None, storage=_storage(folder), sampler=_sampler(search), pruner=pruner)


def _sampler(search: Search | None) -> optuna.samplers.BaseSampler:
    if search is not None and search.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=search.seed, constant_liar=True)
    if search is not None and search.start is not None:
        return TrustRegionSampler(search.space, search.start, search.seed)
    return optuna.samplers.RandomSampler()  # samples nothing: the points of the others are given to Optuna


def _check_same(folder: Path, stored: dict[str, Any], search: Search, proxy: TrainConfig) -> None:
    """What makes losses of a study comparable must not change while it runs."""
    free = ("trials", "target", "published", "config", "overrides")  # the last two are compared as what they resolve to
    was, now = stored["search"], _to_json(search)
    changed = [
        f"{key}: {was.get(key)} in the study, {now[key]} now"
        for key in now
        if key not in free and was.get(key) != now[key]
    ]
    changed += [
        f"{each.key}: {each.before} in the study, {each.now} now"
        for each in differences(stored["proxy"], proxy)
        if each.kind != "runtime" or each.key == "parallel.precision"
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds a study of another search:\n  " + "\n  ".join(changed) + "\nGive this one another name."
        )


def _to_json(search: Search) -> dict[str, Any]:
    data = dataclasses.asdict(search)
    data["space"] = [{**d, "values": list(d["values"])} for d in data["space"]]
    return {**data, "overrides": list(search.overrides)}


def _from_json(data: dict[str, Any]) -> Search:
    space = tuple(Dimension(**{**d, "values": tuple(d["values"])}) for d in data["space"])
    published = Published(**data["published"]) if data["published"] else None
    return Search(**{**data, "space": space, "published": published, "overrides": tuple(data["overrides"])})
