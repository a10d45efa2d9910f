"""The box follows the best trial, shrinks and grows; it beats random points; a cliff is never its centre."""

import math
import multiprocessing
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from tests.helpers.studies import fill, search
from trainer.errors import ConfigError
from trainer.search.definition import load_search
from trainer.search.space import Dimension, Point, point
from trainer.search.study import JOURNAL, Claim, Study
from trainer.search.trust_region import FIRST_SIDE, LEAST_SIDE, Box, TrustRegionSampler, box_after, draw

FORK = multiprocessing.get_context("fork")
FACTORS = tuple(Dimension(f"factor.{kind}", "log_uniform", (1 / 8, 8.0)) for kind in "abcdef")
START: Point = dict.fromkeys((d.key for d in FACTORS), 1.0)
Loss = Callable[[Point], float | None]


# ------------------------------------------------------------------------------------------------------------- the box
def trials(*values: float | None, outcomes: str = "") -> list[FrozenTrial]:
    """Finished trials with these losses; None diverged, and had a low loss before it did."""
    made = []
    for number, value in enumerate(values):
        outcome = "complete" if value is not None else "halved" if outcomes[number : number + 1] == "h" else "diverged"
        trial = create_trial(
            value=value,
            state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
            intermediate_values={1: 1e-6},
            user_attrs={"outcome": outcome},
        )
        trial.number = number
        made.append(trial)
    return made


@pytest.mark.parametrize(
    ("values", "box"),
    [
        ((), Box(None, 0.5)),
        ((1.0,), Box(0, 0.5)),
        ((1.0, 0.9), Box(1, 0.75)),
        ((1.0, 0.9, 0.8), Box(2, 1.0)),
        ((1.0, 2, 2, 2, 2), Box(0, 0.5)),
        ((1.0, 2, 2, 2, 2, 2), Box(0, 0.25)),
        ((1.0, *[2] * 10), Box(0, 0.125)),
        ((1.0, *[2] * 100), Box(0, LEAST_SIDE)),
        ((1.0, 2, 2, 2, 2, 0.9, 2, 2, 2, 2), Box(5, 0.75)),
        ((1.0, None, None), Box(0, 0.5)),
        ((1.0, None, None, None), Box(0, 0.25)),
        ((None, None, None, None), Box(None, 0.5)),
        ((None, None, None, 1.0), Box(3, 0.5)),
        ((1.0, math.inf, 0.5), Box(2, 0.75)),
        ((1.0, 1.0), Box(0, 0.5)),
    ],
)
def test_the_box_after(values: tuple[float | None, ...], box: Box) -> None:
    assert box_after(trials(*values)) == box


def test_a_halved_trial_is_a_miss_and_no_cliff() -> None:
    assert box_after(trials(1.0, None, None, None, None, outcomes="chhhh")) == Box(0, FIRST_SIDE)
    assert box_after(trials(1.0, None, None, None, None, None, outcomes="chhhhh")) == Box(0, FIRST_SIDE / 2)


def test_the_order_in_which_trials_end_does_not_matter() -> None:
    told = trials(1.0, 2.0, None, 0.9, 1.5, 0.8, None)
    for seed in range(5):
        assert box_after(random.Random(seed).sample(told, len(told))) == box_after(told)


# --------------------------------------------------------------------------------------------------------- the points
MIXED = (
    Dimension("lr", "log_uniform", (1e-4, 1e-1)),
    Dimension("decay", "uniform", (0.0, 1.0)),
    Dimension("warmup", "uniform", (0, 9), integer=True),
    Dimension("power", "powers_of_two", (-4, 4)),
    Dimension("clip", "choices", (0.3, 1.0, None)),
)
CENTRE: Point = {"lr": 1e-2, "decay": 0.9, "warmup": 4, "power": 1.0, "clip": None}


def drawn(key: str, side: float) -> list[Any]:
    return [draw(MIXED, CENTRE, side, 0, number)[key] for number in range(2000)]


def test_points_are_uniform_in_the_box_and_clipped_to_the_range() -> None:
    octaves = [math.log10(v) for v in drawn("lr", 0.5)]
    assert min(octaves) == pytest.approx(-2.75, abs=0.01)
    assert max(octaves) == pytest.approx(-1.25, abs=0.01)
    assert statistics.fmean(octaves) == pytest.approx(-2, abs=0.04), "in the logarithm, about the centre"
    assert statistics.stdev(octaves) == pytest.approx(1.5 / 12**0.5, rel=0.05)
    decay = drawn("decay", 0.5)
    assert min(decay) == pytest.approx(0.65, abs=0.01)
    assert max(decay) <= 1
    assert statistics.fmean(decay) == pytest.approx(0.825, abs=0.01), "uniform in what the range leaves of the box"


@pytest.mark.slow
def test_whole_numbers_and_powers_reach_their_neighbours_in_the_smallest_box() -> None:
    assert set(drawn("warmup", LEAST_SIDE)) == {3, 4, 5}
    assert set(drawn("power", LEAST_SIDE)) == {0.5, 1.0, 2.0}
    assert set(drawn("power", 1.0)) == {2.0**e for e in range(-4, 5)}
    assert all(isinstance(v, int) for v in drawn("warmup", 0.5))


def test_choices_are_kept_unless_the_share_of_the_box_draws_them_anew() -> None:
    few, all_ = drawn("clip", 0.25), drawn("clip", 1.0)
    assert few.count(None) / 2000 == pytest.approx(0.75 + 0.25 / 3, abs=0.03)
    assert few.count(0.3) / 2000 == pytest.approx(0.25 / 3, abs=0.03)
    assert {v: all_.count(v) / 2000 for v in (0.3, 1.0, None)} == pytest.approx(
        dict.fromkeys((0.3, 1.0, None), 1 / 3), abs=0.03
    )


@pytest.mark.parametrize("dimension", MIXED, ids=lambda d: d.key)
def test_a_value_is_at_its_place(dimension: Dimension) -> None:
    for number in range(50):
        value = dimension.at(number / 50)
        assert dimension.at(dimension.place(value)) == value


# ---------------------------------------------------------------------------------------------------------- the search
def valley(seed: int) -> Loss:
    """A quadratic in log2 of six factors, its optimum about an octave from the start in each; half an octave above the
    optimum of the first three training diverges."""
    chance = random.Random(seed)
    best = {key: chance.gauss(0, 1) for key in START}
    weight = {key: 0.02 * math.exp(chance.gauss(0, 0.7)) for key in START}
    cliff = {key: max(0.0, best[key] + 0.5) for key in list(START)[:3]}

    def loss(values: Point) -> float | None:
        x = {key: math.log2(float(value or 0)) for key, value in values.items()}
        if any(x[key] > edge + 1e-9 for key, edge in cliff.items()):
            return None
        return 1 + sum(weight[key] * (x[key] - best[key]) ** 2 for key in x)

    return loss


def tell(study: optuna.Study, trial: optuna.trial.Trial, loss: float | None) -> None:
    """As Study.finish does."""
    trial.report(1e-6 if loss is None else loss, 1)
    trial.set_user_attr("outcome", "diverged" if loss is None else "complete")
    study.tell(trial, loss, TrialState.PRUNED if loss is None else TrialState.COMPLETE)


def searched(loss: Loss, seed: int, count: int) -> optuna.Study:
    study = optuna.create_study(sampler=TrustRegionSampler(FACTORS, START, seed))
    for _ in range(count):
        trial = study.ask({d.key: d.distribution() for d in FACTORS})
        tell(study, trial, loss(dict(trial.params)))
    return study


def regret(points: list[Point], loss: Loss) -> float:
    return min(value for values in points if (value := loss(values)) is not None) - 1


@pytest.mark.slow
def test_it_beats_random_points_beside_a_cliff() -> None:
    """60 trials over six factors on 40 problems; the random ones begin at the start, too."""
    start, boxed, at_random = [], [], []
    for seed in range(40):
        loss = valley(seed)
        points = [dict(trial.params) for trial in searched(loss, seed, 60).trials]
        assert points[0] == START
        boxed.append(regret(points, loss))
        at_random.append(regret([START, *(point(FACTORS, "random", seed, n) or {} for n in range(1, 60))], loss))
        start.append(regret([START], loss))
    gains = [math.log2(r / b) for r, b in zip(at_random, boxed, strict=True)]  # octaves of what is left, in pairs
    error = statistics.stdev(gains) / 40**0.5
    assert statistics.fmean(gains) - 5 * error > 2
    assert sum(gain > 0 for gain in gains) >= 38
    # A box that keeps its size leaves 23 % of what the start loses, one that takes cliffs for good trials 74 %.
    assert statistics.fmean(boxed) < 0.17 * statistics.fmean(start)


def test_a_diverged_trial_is_never_the_centre() -> None:
    for seed in range(5):
        study = searched(valley(seed), seed, 40)
        good = {t.number for t in study.trials if t.state == TrialState.COMPLETE}
        centres = {t.user_attrs["trust_region"]["centre"] for t in study.trials[1:]}
        assert len(good) < 40, "some diverged"
        assert centres <= good
        assert len(centres) > 3, "it moves"


def test_the_same_seed_draws_the_same_and_another_draws_others() -> None:
    one, same, other = ([t.params for t in searched(valley(0), seed, 25).trials] for seed in (3, 3, 4))
    assert one == same
    assert one[0] == other[0], "the start"
    assert all(a != b for a, b in zip(one[1:], other[1:], strict=True))


# ----------------------------------------------------------------------------------------------- in a study's folder
LR = {"optim.lr": {"log_uniform": [1e-4, 1e-1]}, "optim.weight_decay": {"uniform": [0, 1]}}
GIVEN: Point = {"optim.lr": 1e-3, "optim.weight_decay": 0.5}


def opened(folder: Path, **keys: Any) -> Study:
    given = {"sampler": "trust_region", "space": LR, "start": GIVEN, "trials": 20, **keys}
    return Study.open(search(folder, **given))


def taken(study: Study) -> Claim:
    claim = study.claim()
    assert claim is not None
    return claim


def hill(values: Point) -> float | None:
    lr = float(values["optim.lr"] or 0)
    return None if lr > 0.02 else abs(math.log2(lr / 0.01)) + float(values["optim.weight_decay"] or 0)


@pytest.mark.slow
def test_a_study_that_is_stopped_and_gone_on_with_has_the_same_trials(tmp_path: Path) -> None:
    whole = opened(tmp_path / "whole")
    assert whole.trials() == [], "chosen when they are asked for"
    fill(whole, hill)
    first = opened(tmp_path / "parts", trials=7)
    fill(first, hill)
    assert len(first.trials()) == 7
    rest = opened(tmp_path / "parts")
    fill(rest, hill)
    told, again = whole.trials(), rest.trials()
    assert told[0].point == GIVEN
    assert [t.point for t in told] == [t.point for t in again]
    assert len(told) == 20
    assert {t.state for t in told} == {"complete", "diverged"}
    assert Study.load(str(rest.folder)).search == rest.search


@pytest.mark.slow
def test_workers_that_share_a_journal_draw_as_one_would(tmp_path: Path) -> None:
    """Two workers, each trial ended while the other's runs: what both draw follows from what was stored."""
    studies = [opened(tmp_path), opened(tmp_path)]
    claims = [taken(study) for study in studies]
    for turn in range(2, 20):
        study, claim = studies[turn % 2], claims[turn % 2]
        loss = hill(claim.point)
        study.finish(claim, *(("diverged", [], "") if loss is None else ("complete", [loss], "")))
        claims[turn % 2] = taken(study)
    for claim in claims:
        claim.lock.close()
    told = studies[0].trials()
    assert [t.number for t in told] == list(range(20))
    assert told[1].attributes["trust_region"] == {"centre": None, "side": FIRST_SIDE}
    stored = optuna.load_study(study_name="study", storage=studies[0]._study._storage).trials
    for trial in told[2:]:
        known = [t for t in stored if t.number < trial.number - 1]  # the one before was still running
        assert trial.attributes["trust_region"] == vars(box_after(known))


def _take_all(folder: Path) -> None:
    fill(opened(folder), hill)


def test_worker_processes_leave_a_study_whose_points_all_follow_from_their_boxes(tmp_path: Path) -> None:
    workers = [FORK.Process(target=_take_all, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    study = opened(tmp_path)
    told = study.trials()
    assert [t.number for t in told] == list(range(20))
    for trial in told[1:]:
        box = trial.attributes["trust_region"]
        centre = GIVEN if box["centre"] is None else told[box["centre"]].point
        assert trial.point == draw(study.search.space, centre, box["side"], 0, trial.number)


@pytest.mark.slow
def test_a_trial_whose_worker_died_as_it_took_it_is_drawn_from_the_same_box(tmp_path: Path) -> None:
    """The journal ends within ask(), and another trial becomes the best before the dead one is taken over."""
    study = opened(tmp_path)
    claims = [taken(study) for _ in range(3)]
    wanted = claims[2].point
    for claim in claims:
        claim.lock.close()
    journal = tmp_path / "study" / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    values = [number for number, line in enumerate(lines) if '"param_name"' in line]
    journal.write_text("".join(lines[: values[-1]]))
    other = opened(tmp_path)
    for loss in (1.0, 0.1):
        other.finish(taken(other), "complete", [loss], "")
    revived = taken(other)
    revived.lock.close()
    assert (revived.number, revived.point) == (2, wanted)


@pytest.mark.slow
def test_the_start_is_the_proxys_own_unless_it_is_given(tmp_path: Path) -> None:
    found = search(tmp_path, "optim.lr=2e-3", sampler="trust_region", space=LR, start={"optim.weight_decay": 1})
    assert found.start == {"optim.lr": 2e-3, "optim.weight_decay": 1}
    Study.open(found)
    other = search(tmp_path, "optim.lr=3e-3", sampler="trust_region", space=LR, start={"optim.weight_decay": 1})
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.002 in the study, 0\.003 now"):
        Study.open(other)


@pytest.mark.slow
def test_the_start_of_a_factor_that_no_config_gives_is_1(tmp_path: Path) -> None:
    space = {f"mup.factors.{kind}.lr": {"log_uniform": [0.125, 8]} for kind in ("attention", "mlp", "time")}
    found = search(tmp_path, "mup.factors.mlp.lr=2", sampler="trust_region", space=space)
    assert found.start == {"mup.factors.attention.lr": 1.0, "mup.factors.mlp.lr": 2.0, "mup.factors.time.lr": 1.0}
    shipped = load_search("search/mmdit_factors.yaml")
    assert set((shipped.start or {}).values()) == {1.0}
    assert shipped.trials == 10 * len(shipped.space)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"start": {"optim.lr": 0.5}}, "start.optim.lr 0.5 is not in space.optim.lr.log_uniform [0.0001, 0.1]"),
        ({"start": {"optim.lr": "high"}}, "start.optim.lr high is not in"),
        ({"start": {"optim.lr": True}}, "start.optim.lr True is not in"),
        ({"start": {"optim.l": 1e-3}}, 'start.optim.l: no key of the space; did you mean "optim.lr"?'),
        ({"start": 3}, "start must be {key: value}, of keys of the space, got 3"),
        ({"start": GIVEN, "sampler": "random"}, "start belongs to sampler trust_region"),
        (
            {"space": {"optim.lr": {"choices": [0.1, 0.2]}}, "start": None},
            "(the proxy's own value) is not in space.optim.lr.choices [0.1, 0.2]: give start: {optim.lr: ...}",
        ),
        ({"space": {"optim.warmup_steps": {"uniform": [0, 9]}}, "start": {"optim.warmup_steps": 2.5}}, "2.5 is not in"),
        ({"space": {"optim.lrr": {"choices": [1]}}, "start": None}, 'optim.lrr: unknown key; did you mean "optim.lr"?'),
        ({"trials": None}, "trials is missing"),
        (
            {"space": {f"mup.factors.{k}.lr": {"log_uniform": [0.5, 2]} for k in ("mlp", "image")}, "start": None},
            "both set lr of",
        ),
    ],
)  # fmt: skip
def test_mistakes(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        search(tmp_path, **{"sampler": "trust_region", "space": LR, "start": GIVEN, **keys})
    assert message in str(caught.value)


def test_a_start_of_choices_is_one_of_them(tmp_path: Path) -> None:
    space = {"optim.clip_norm": {"choices": [None, 1, 3.0]}, "optim.betas": {"choices": [[0.9, 0.95], [0.9, 0.99]]}}
    start: dict[str, Any] = {"optim.clip_norm": None, "optim.betas": [0.9, 0.99]}
    study = opened(tmp_path, space=space, start=start)
    fill(study, lambda _: 1.0)
    assert study.trials()[0].point == {"optim.clip_norm": None, "optim.betas": "[0.9, 0.99]"}
