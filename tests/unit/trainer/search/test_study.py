"""Who runs which trial: stored before it starts, taken once, taken over from the dead, ended early where right."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from tests.helpers.studies import fill, search
from trainer.config.keys import plain
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.search.report import completed
from trainer.search.space import point
from trainer.search.study import JOURNAL, LEAST_PEERS, Claim, Study

FORK = multiprocessing.get_context("fork")
HELD: list[Claim] = []


@pytest.fixture(autouse=True)
def let_go() -> Iterator[None]:
    yield
    while HELD:
        HELD.pop().lock.close()


def taken(study: Study) -> Claim:
    claim = study.claim()
    assert claim is not None
    HELD.append(claim)
    return claim


def test_trials_are_stored_before_they_start(tmp_path: Path) -> None:
    wanted = search(tmp_path)
    study = Study.open(wanted)
    stored = study.trials()
    assert [t.state for t in stored] == ["waiting"] * 12
    assert [t.point for t in stored] == [point(wanted.space, "random", 0, n) for n in range(12)]
    claim = taken(study)
    assert (claim.number, claim.point) == (0, stored[0].point)
    again = Study.load(str(study.folder))
    assert again.search == wanted
    assert again.trials()[0].state == "running"


@pytest.mark.slow
def test_a_dead_trial_is_taken_first_and_a_living_one_never(tmp_path: Path) -> None:
    study, other = Study.open(search(tmp_path)), Study.open(search(tmp_path))
    first = taken(study)
    assert taken(other).number == 1, "the first is in other hands"
    claim = taken(other)
    claim.lock.close()  # what the system does when its process ends
    revived = taken(study)
    assert (revived.number, revived.point) == (claim.number, claim.point)
    study.finish(first, "complete", [1.0, 2.0], "")
    assert other.trials()[0].value == 1.5
    assert other.trials()[0].losses == [1.0, 2.0]
    assert taken(other).number == 3


@pytest.mark.slow
def test_a_trial_whose_worker_died_as_it_took_it_has_all_values(tmp_path: Path) -> None:
    """The journal ends after the trial's first value, as a kill within ask() leaves it."""
    study = Study.open(search(tmp_path))
    whole = taken(study)
    whole.lock.close()
    journal = tmp_path / "study" / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    values = [number for number, line in enumerate(lines) if '"param_name"' in line]
    assert len(values) == 4
    journal.write_text("".join(lines[: values[1]]))
    revived = taken(Study.open(search(tmp_path)))
    assert (revived.number, revived.point) == (whole.number, whole.point)


@pytest.mark.slow
def test_trials_of_other_data_are_refused(tmp_path: Path) -> None:
    study = Study.open(search(tmp_path))
    identity = {"data": "a", "text_encoder": "b", "validation": "c/128"}
    study.check_data(identity)
    Study.open(search(tmp_path)).check_data(identity | {"repa_encoder": "d"})
    Study.open(search(tmp_path)).check_data(identity)  # a trial without REPA
    with pytest.raises(ConfigError, match="other contents of repa_encoder"):
        study.check_data(identity | {"repa_encoder": "e"})
    with pytest.raises(ConfigError, match="the trials before had other contents of data, validation: give back"):
        Study.open(search(tmp_path)).check_data(identity | {"data": "x", "validation": "c/64"})
    with pytest.raises(ConfigError, match=r"parallel\.precision: None in the study, fp32 now"):
        Study.open(search(tmp_path, "parallel.precision=fp32"))


def _take_all(folder: Path, queue: "multiprocessing.queues.Queue[int]") -> None:  # pyright: ignore[reportAttributeAccessIssue]
    study = Study.open(search(folder))
    while claim := study.claim():
        queue.put(claim.number)
        study.finish(claim, "complete", [float(claim.number)], "")


def test_workers_side_by_side_take_each_trial_once(tmp_path: Path) -> None:
    queue = FORK.Queue()
    workers = [FORK.Process(target=_take_all, args=(tmp_path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    numbers = [queue.get(timeout=120) for _ in range(12)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(numbers) == list(range(12))
    assert [t.value for t in Study.load(str(tmp_path / "study")).trials()] == [float(n) for n in range(12)]


@pytest.mark.slow
def test_another_search_is_refused_and_more_trials_are_added(tmp_path: Path) -> None:
    Study.open(search(tmp_path))
    with pytest.raises(ConfigError, match=r"seed: 0 in the study, 1 now") as caught:
        Study.open(search(tmp_path, "train.steps=30", "train.log_every=5", seed=1))
    assert "train.steps: 20 in the study, 30 now" in str(caught.value)
    assert "log_every" not in str(caught.value), "runtime keys are free"
    study = Study.open(search(tmp_path, trials=14))
    assert [t.number for t in study.trials()] == list(range(14))
    assert len(Study.open(search(tmp_path, trials=5)).trials()) == 14


@pytest.mark.slow
def test_a_study_from_before_a_key_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key then acted as its default acts now; another value of it is another search."""

    def older(config: TrainConfig) -> dict[str, Any]:
        data = plain(config)
        del data["optim"]["kind"], data["optim"]["muon"], data["mup"]["factors"]
        return data

    with monkeypatch.context() as then:
        then.setattr("trainer.search.study.plain", older)
        Study.open(search(tmp_path))
    assert len(Study.open(search(tmp_path)).trials()) == 12
    with pytest.raises(ConfigError, match=r"optim\.kind: adamw in the study, muon now"):
        Study.open(search(tmp_path, "optim.kind=muon"))


def test_a_kill_before_the_trials_are_stored_is_mended(tmp_path: Path) -> None:
    wanted = search(tmp_path)
    study = Study.open(search(tmp_path, trials=3))
    del study
    assert len(Study.open(wanted).trials()) == 12
    with pytest.raises(ConfigError, match=r"expected study\.journal"):
        Study.load(str(tmp_path))


def test_divergence_is_judged_by_the_median_after_a_quarter(tmp_path: Path) -> None:
    study = Study.open(search(tmp_path))
    for number in range(LEAST_PEERS + 1):
        claim = taken(study)
        early = study.report(claim, 0, 1.0 if number < LEAST_PEERS else 50.0)
        late = study.report(claim, 5, 1.0 if number < LEAST_PEERS else 1.51)
        assert early is None, "before a quarter of the steps nothing is judged"
        if number < LEAST_PEERS:
            assert late is None
            study.finish(claim, "complete", [1.0], "")
        else:
            assert late is not None
            assert late[0] == "diverged"
            assert "val_loss_ema 1.51 at step 5 is above 1.5 x the median 1" in late[1]
            study.finish(claim, *late[:1], [], late[1])
    assert study.report(taken(study), 5, 1.49) is None
    assert [t.state for t in study.trials()][LEAST_PEERS] == "diverged"


def test_a_late_divergence_is_not_ranked(tmp_path: Path) -> None:
    study = Study.open(search(tmp_path))
    fill(study, lambda p: 9.0 if float(p["optim.lr"] or 0) > 0.02 else 1.0)
    assert {t.value for t in study.trials()} == {1.0, 9.0}
    assert {t.value for t in completed(study)} == {1.0}


def test_a_resumed_trial_reports_a_step_again(tmp_path: Path) -> None:
    study = Study.open(search(tmp_path))
    claim = taken(study)
    study.report(claim, 5, 1.0)
    claim.lock.close()
    study.report(taken(study), 5, 1.0)  # optuna would warn, which fails a test
    assert study.trials()[0].curve == {5: 1.0}


def test_halving_stops_the_worse_half(tmp_path: Path) -> None:
    halving = {"first_step": 10, "factor": 2}
    study = Study.open(search(tmp_path, halving=halving))
    verdicts = []
    for loss in (1.0, 1.1, 1.2, 0.9):
        claim = taken(study)
        assert study.report(claim, 5, loss) is None
        verdict = study.report(claim, 10, loss)
        verdicts.append(verdict and verdict[0])
        study.finish(claim, *(("halved", [], verdict[1]) if verdict else ("complete", [loss], "")))
    assert verdicts == [None, "halved", "halved", None]


def test_tpe_learns_from_what_is_finished(tmp_path: Path) -> None:
    study = Study.open(search(tmp_path, sampler="tpe", trials=16))
    assert study.trials() == []
    fill(study, lambda p: abs(float(p["optim.lr"] or 0) - 1e-2))
    assert len(study.trials()) == 16
    assert study.claim() is None


@pytest.mark.slow
def test_importance_finds_the_key_that_matters(tmp_path: Path) -> None:
    study = Study.open(search(tmp_path, trials=60))
    fill(study, lambda p: 1 + 100 * float(p["optim.lr"] or 0))
    importance = study.importance()
    assert next(iter(importance)) == "optim.lr"
    assert importance["optim.lr"] > 0.5


def test_optuna_reads_the_journal_as_a_study(tmp_path: Path) -> None:
    """As optuna-dashboard does: by the file alone."""
    study = Study.open(search(tmp_path))
    backend = JournalFileBackend(str(study.folder / JOURNAL))
    [summary] = optuna.get_all_study_summaries(optuna.storages.JournalStorage(backend))
    assert (summary.study_name, summary.n_trials) == ("study", 12)
