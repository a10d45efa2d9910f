"""The horizon of a study on real runs: killed in a branch and run again, with a rate that diverges."""

from pathlib import Path

from tests.distributed.runs import exact
from tests.helpers.forked import finished, started
from tests.helpers.studies import fill, search
from tests.integration.test_search_cli import wait_for_step
from trainer.monitor.metrics import read_metrics
from trainer.search.study import Study

OVERRIDES = (
    "model.depth=1", "model.width=32", "train.steps=16", "train.sample_every=0", "optim.warmup_steps=1",
    "validation.samples=8", "ema.decays=[0.8]",
)  # fmt: skip
# With fewer rates than the command takes: each is a trunk and two branches.
WORK = """
import sys
from trainer.search.horizon import Horizon
from trainer.search.study import Study
from trainer.search.trunk_worker import open_folder, train_trunks
given = Horizon.of(Study.load(sys.argv[1]), "0.5,1", "1,2,3", 1)
rates = tuple(map(float, sys.argv[2].split(",")))
horizon = Horizon(given.study, given.proxy, given.point, rates, given.steps, 1)
open_folder(horizon)
train_trunks(horizon, next(horizon.trunks()), [], 1, lambda pid: None)
print(horizon.conclude())
"""


def study_in(folder: Path) -> Path:
    """A study whose trials, at different rates, were never trained."""
    study = Study.open(search(folder, *OVERRIDES, trials=4))
    fill(study, lambda point: float(point["optim.lr"] or 0))
    return study.folder


def losses(trunk: Path) -> dict[str, list[str]]:
    return {path.parent.name: exact(read_metrics(path.parent)) for path in trunk.glob("*/metrics.jsonl")}


def test_killed_and_continued(tmp_path: Path) -> None:
    killed, alone = study_in(tmp_path / "killed"), study_in(tmp_path / "alone")
    with started("-c", WORK, killed, "1,1e30") as process:
        wait_for_step(killed / "horizon" / "lr_1_seed_0" / "steps_00000008", 7, process)  # it began at 6
        process.kill()
    again = finished("-c", WORK, killed, "1,1e30")
    said, told = again.stdout, again.stderr
    assert again.returncode == 1, told
    # What two rates can say: the best is the lowest, and the other diverged.
    assert "RunError: no exponent in " in told
    for steps in (8, 16):
        assert f"{steps} steps: the best rate is the lowest that was tried" in told
    assert "Go on with --lrs " in told
    assert "lr_1e+30_seed_0/trunk has failed: " in said
    finished("-c", WORK, alone, "1")
    found = losses(killed / "horizon" / "lr_1_seed_0")
    assert set(found) == {"trunk", "steps_00000008", "steps_00000016"}
    assert found == losses(alone / "horizon" / "lr_1_seed_0")


def test_mistakes_exit_with_2(tmp_path: Path) -> None:
    done = finished("launch/search.py", "horizon", "--study", study_in(tmp_path), "--lrs", "1,2")
    assert done.returncode == 2
    assert "--lrs takes at least 3 positive numbers" in done.stderr
    assert not (tmp_path / "study" / "horizon").exists()
