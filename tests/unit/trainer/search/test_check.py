"""The optimum looked for again at another width: which runs, and what their losses say."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.studies import fill, search
from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.search.check import Verdict, check_search, compared, judge, write_search
from trainer.search.definition import load_search
from trainer.search.space import Point
from trainer.search.study import Study

BEST = -6.5
SPACE = {"optim.lr": {"log_uniform": [1e-3, 1e-1]}, "optim.clip_norm": {"choices": [0.3, 1.0]}}


def valley(best: float) -> Callable[[Point], float]:
    return lambda point: 0.3 + 0.02 * (math.log2(float(point["optim.lr"] or 0)) - best) ** 2


def losses_at(best: float) -> tuple[float, float, float]:
    """At half, once and twice 2^BEST, of a valley with its minimum at 2^best."""
    low, own, high = (valley(best)({"optim.lr": 2.0 ** (BEST + x)}) for x in (-1, 0, 1))
    return low, own, high


@pytest.mark.slow
def test_the_three_runs(tmp_path: Path) -> None:
    first = Study.open(search(tmp_path, trials=12, space=SPACE))
    fill(first, valley(BEST))
    made = check_search(first, 128)
    read = load_search(str(write_search(made)))
    assert read.folder == first.folder.parent / "study_width128"
    study = Study.open(read)
    rates = [float(t.point["optim.lr"] or 0) for t in study.trials()]
    assert rates[1] == pytest.approx(2**BEST, rel=0.1)
    assert rates == pytest.approx([rates[1] / 2, rates[1], rates[1] * 2], rel=1e-3)
    assert study.proxy.model.width == 128
    best = min((t for t in first.trials() if t.value is not None), key=lambda t: t.value or 0)
    assert study.proxy.optim.clip_norm == best.point["optim.clip_norm"]
    same = load_config("mmdit_debug_mup.yaml", [*made.overrides, "model.width=64"])
    assert same.model == first.proxy.model, "all else is the proxy's"
    with pytest.raises(ConfigError, match="not all of its runs have ended"):
        judge(first, study)
    fill(study, valley(BEST - 0.8))
    found = judge(first, study)
    assert (found.width, found.lr, found.verdict) == (128, rates[1], "moved")


@pytest.mark.parametrize(
    ("best", "verdict"),
    [(BEST, "stays"), (BEST + 0.3, "stays"), (BEST - 0.8, "moved"), (BEST + 0.8, "moved"), (BEST + 4, "moved")],
)
def test_verdicts(best: float, verdict: Verdict) -> None:
    found = compared(128, 2**BEST, losses_at(best), noise=0.001)
    assert found.verdict == verdict
    assert found.shift is not None
    assert found.shift.value == pytest.approx(max(-1, min(1, best - BEST)))
    assert found.shift.low <= found.shift.value <= found.shift.high
    assert ("HAS MOVED" in str(found)) == (verdict == "moved")


def test_noise_that_hides_the_optimum_is_said() -> None:
    for best in (BEST, BEST + 0.6):
        found = compared(128, 2**BEST, losses_at(best), noise=0.02)
        assert found.verdict == "open"
        assert "give the search more seeds" in found.why


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ((0.31, 0.3, math.inf), "stays"),
        ((0.29, 0.3, math.inf), "moved"),
        ((0.3, math.inf, math.inf), "moved"),
        ((math.inf, 0.3, 0.31), "open"),
        ((math.inf, math.inf, math.inf), "moved"),
    ],
)
def test_runs_that_diverge(losses: tuple[float, float, float], verdict: Verdict) -> None:
    assert compared(128, 1e-2, losses, 0.001).verdict == verdict


def test_a_study_without_a_learning_rate_has_no_optimum(tmp_path: Path) -> None:
    study = Study.open(search(tmp_path, trials=2, space={"optim.clip_norm": {"choices": [0.3, 1.0]}}))
    fill(study, lambda p: float(p["optim.clip_norm"] or 0))
    with pytest.raises(ConfigError, match=r"did not search optim\.lr"):
        check_search(study, 128)


def test_a_study_of_muon_is_refused(tmp_path: Path) -> None:
    """Its own rate would stay where it is."""
    study = Study.open(search(tmp_path, "optim.kind=muon", trials=2))
    with pytest.raises(ConfigError, match=r"is of optim\.kind muon: .* Search again at model\.width=128"):
        check_search(study, 128)
