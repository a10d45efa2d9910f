"""Runs at several rates and durations whose losses are made up, the exponent that they give, and the transfer by it."""

import json
import math
import shutil
from pathlib import Path

import pytest

from tests.helpers.studies import search
from trainer.config.load import load_config
from trainer.errors import ConfigError, RunError
from trainer.search.exponent import FILE, read_exponent
from trainer.search.horizon import Horizon, Trunk
from trainer.search.study import Study
from trainer.search.transfer import Choice, best_point, write_target
from trainer.search.trunk_worker import open_folder

EXPONENT = -0.4


@pytest.fixture
def own(study: Study, tmp_path: Path) -> Study:
    """A study of this test alone: 20 steps, best near lr 0.01."""
    shutil.copytree(study.folder, tmp_path / "study")
    return Study.load(str(tmp_path / "study"))


def horizon(study: Study, branches: str = "0.25,0.5,1", lrs: str = "0.25,0.5,1,2,4", seeds: int = 1) -> Horizon:
    return Horizon.of(study, branches, lrs, seeds)


def log(wanted: Horizon, best: float = 0.5, diverged: float = math.inf) -> None:
    """As if all had been trained; from the factor `diverged` on trunks have diverged. best: log2 of the factor that is
    best for the shortest run."""
    for trunk in wanted.trunks():
        if trunk.factor >= diverged:
            folder = wanted.folder / trunk.name / "trunk"
            folder.mkdir(parents=True)
            (folder / "diverged.txt").write_text("20 steps were skipped")
            continue
        for steps in wanted.steps:
            folder = wanted.branch_folder(trunk, steps)
            folder.mkdir(parents=True)
            x = math.log2(trunk.factor) - best - EXPONENT * math.log2(steps / wanted.steps[0])
            noise = 1e-4 * (-1) ** (trunk.seed + round(math.log2(trunk.factor)) + steps // 5)
            record = {"step": steps, "val_loss_ema": 0.3 + 0.01 * x**2 + noise, "val_set": "a"}
            (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")


@pytest.mark.slow
def test_trunk_is_the_proxy_at_another_rate(own: Study) -> None:
    wanted, best = horizon(own, seeds=2), best_point(own)
    config = wanted.trunk_config(Trunk(2.0, 1), 16)
    assert config.optim.lr == 2 * float(best["optim.lr"] or 0)
    assert config.optim.clip_norm == best["optim.clip_norm"]
    assert (config.train.steps, config.train.seed) == (16, own.proxy.train.seed + 1)
    assert (config.optim.schedule, config.optim.warmup_steps) == ("constant", 1)
    assert config.model == own.proxy.model
    assert wanted.steps == (5, 10, 20)
    assert "ema.decays=[0.98]" in wanted.branch_overrides(10), "spans as much of 10 steps as 0.99 of 20"
    assert [t.name for t in wanted.trunks()][:2] == ["lr_0.25_seed_0", "lr_0.5_seed_0"]


@pytest.mark.slow
def test_planted_exponent_is_found_and_written(own: Study) -> None:
    wanted = horizon(own)
    assert "15 branches are not finished" in wanted.conclude()
    log(wanted)
    said = wanted.conclude().splitlines()[0]
    written = json.loads((own.folder / FILE).read_text())
    low, high = written["interval"]
    assert low <= EXPONENT <= high
    assert said == f"best lr ~ duration^{written['exponent']:.2f} [{low:.2f}, {high:.2f}]"
    lr = float(best_point(own)["optim.lr"] or 0)
    assert written["durations"] == [5, 10, 20]
    assert written["log2_lr"][0] == pytest.approx(math.log2(lr) + 0.5, abs=0.1)
    assert len(written["losses"]["10"]) == 5
    assert written["date"]
    assert read_exponent(own.folder) is not None


@pytest.mark.slow
def test_diverged_trunks_count_as_infinite(own: Study) -> None:
    wanted = horizon(own, lrs="0.125,0.25,0.5,1,2,1000")
    log(wanted, best=-0.2, diverged=1000)
    assert "best lr ~ duration^-0.4" in wanted.conclude()
    assert json.loads((own.folder / FILE).read_text())["losses"]["5"][f"{1000 * wanted.target.optim.lr:.6g}"] == [None]


@pytest.mark.slow
def test_a_branch_that_failed_otherwise_is_not_finished(own: Study) -> None:
    wanted = horizon(own)
    log(wanted)
    folder = wanted.branch_folder(Trunk(4.0, 0), 20)
    (folder / "metrics.jsonl").write_text("")
    (folder / "status.json").write_text('{"state": "failed", "step": 3, "reason": "the disk is full"}')
    assert f"1 branches are not finished, and another worker may have them:\n  {folder}" in wanted.conclude()


@pytest.mark.slow
def test_best_rate_at_the_edge_leaves_no_exponent(own: Study) -> None:
    wanted = horizon(own)
    log(wanted, best=2.4)
    (own.folder / FILE).write_text("{}")
    with pytest.raises(RunError, match=r"5 steps: the best rate is the highest") as caught:
        wanted.conclude()
    assert "Go on with --lrs 0.25,0.5,1,2,4,8" in str(caught.value)
    assert not (own.folder / FILE).exists(), "what was measured before does not hold any more"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"branches": "1"}, "--branches takes at least 2 positive numbers"),
        ({"branches": "0.5,0.51"}, "two are the same"),
        ({"branches": "0.05,1"}, "the decay begins at 0, within the warm-up of 0"),
        ({"lrs": "1,2"}, "--lrs takes at least 3"),
        ({"lrs": "1,2,inf"}, "--lrs takes at least 3"),
        ({"lrs": "1,2,x"}, "--lrs takes at least 3"),
        ({"seeds": 0}, "--seeds must be at least 1"),
    ],
)
def test_refusals(own: Study, changes: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        horizon(own, **changes)  # pyright: ignore[reportArgumentType]


def test_a_study_of_muon_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.kind muon has no rule for the duration"):
        horizon(Study.open(search(tmp_path, "optim.kind=muon", trials=2)))


@pytest.mark.slow
def test_folder_takes_more_rates_and_seeds_but_no_other_durations(own: Study) -> None:
    open_folder(horizon(own))
    open_folder(horizon(own, lrs="0.25,0.5,1,2,4,8", seeds=3))
    with pytest.raises(ConfigError, match=r"the durations: \[5, 10, 20\] there, \[10, 20\] now"):
        open_folder(horizon(own, branches="0.5,1"))


# ------------------------------------------------------------------------------------------------------------ transfer
@pytest.mark.slow
def test_transfer_takes_the_measured_exponent(own: Study, tmp_path: Path) -> None:
    """Twice the batch and four times the steps: r = 1/4, eight times the images."""
    target, output = tmp_path / "target.yaml", tmp_path / "found.yaml"
    target.write_text("extends: mmdit_debug_mup.yaml\ntrain: {steps: 80, global_batch_size: 16}\n")
    choice = Choice(rules="completed-p")
    assert "horizon" not in "\n".join(write_target(own, str(target), output, choice))
    ruled = load_config(str(output)).optim
    log(wanted := horizon(own))
    wanted.conclude()
    measured = json.loads((own.folder / FILE).read_text())["exponent"]
    said = "\n".join(write_target(own, str(target), output, choice))
    found, text = load_config(str(output)).optim, output.read_text()
    assert found.lr == pytest.approx(float(best_point(own)["optim.lr"] or 0) * 2**0.5 * 8**measured, rel=1e-3)
    assert found.lr != pytest.approx(ruled.lr, rel=0.05)
    assert found.lr * found.weight_decay == pytest.approx(ruled.lr * ruled.weight_decay, rel=1e-3)
    assert (found.betas, found.eps) == (ruled.betas, ruled.eps)
    for part in ("horizon: best lr ~ duration^", "measured at 5 to 20 steps", "in place of the rule's -1/2"):
        assert part in said, part
        assert part in text, part
    assert f"sqrt(batch) x images^{measured:.2f} = " in text

    write_target(own, str(target), output, Choice(rules="sqrt-batch"))
    assert "horizon: best" not in output.read_text(), "a rule that says nothing of the duration"
    (own.folder / FILE).write_text("{")
    before = output.read_text()
    with pytest.raises(ConfigError, match=r"horizon\.json is damaged"):
        write_target(own, str(target), output, choice)
    assert output.read_text() == before
