"""A forecast as a person makes it: rungs that are killed in the middle, the fit, and a run that follows it."""

import json
import math
import signal
from pathlib import Path

import pytest
from numpy.random import default_rng

from tests.distributed.runs import exact
from tests.helpers.forked import finished, started
from tests.helpers.rungs import Law, rungs_of
from tests.integration.test_search_cli import wait_for_step
from trainer.forecast.rungs import Rungs, parameters_of
from trainer.forecast.track import FORECAST
from trainer.monitor.metrics import read_metrics
from trainer.monitor.records import read_status
from trainer.search.trunk_worker import open_folder

CONFIG = (
    "--config", "mmdit_debug_mup.yaml", "run.name=target", "model.depth=1", "model.width=128", "train.steps=48",
    "optim.schedule=wsd", "optim.decay_steps=12", "optim.warmup_steps=2", "ema.decays=[0.8]", "validation.samples=8",
    "train.log_every=2", "train.validate_every=6", "train.sample_every=0",
)  # fmt: skip
RUNGS = ("--widths", "32,64,96", "--steps", "8,16,32", "--seeds", "2")
# One trunk with two branches: what kills and other workers must not change shows on it.
WORK = """
import sys
from trainer.forecast.rungs import Rungs
from trainer.search.trunk_worker import Worker, open_folder
from trainer.parallel.mesh import open_world
rungs = Rungs("mmdit_debug_mup.yaml", tuple(sys.argv[1:]), (64,), (8, 32), 1)
open_folder(rungs)
with open_world(1) as world:
    sys.exit(0 if Worker(rungs, world, lambda text: print(text, file=sys.stderr)).work() else 3)
"""


def losses(folder: Path) -> dict[str, list[str]]:
    """Exact figures of trunk and branches, by their folder's name."""
    return {path.parent.name: exact(read_metrics(path.parent)) for path in folder.glob("**/metrics.jsonl")}


def test_a_killed_worker_goes_on(tmp_path: Path) -> None:
    """Killed within the trunk and stopped within a branch; the losses are those of one that was left alone."""
    command = ("-c", WORK, *CONFIG[2:])
    assert "is finished at step 32" in finished(*command, f"run.dir={tmp_path}/alone").stderr
    killed = tmp_path / "killed" / "target_forecast" / "width_00064_seed_0"
    command = (*command, f"run.dir={tmp_path}/killed")
    with started(*command) as process:
        wait_for_step(killed / "trunk", 10, process)
        process.kill()
    with started(*command) as process:
        wait_for_step(killed / "steps_00000032", 28, process)
        process.send_signal(signal.SIGSTOP)  # it holds its trunk, and gets no further meanwhile
        other = finished(*command)
        assert "another worker has it" in other.stderr
        assert other.returncode == 3
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        code, told = process.wait(300), process.said("err")
    assert (code, "preempted" in told) in ((3, True), (0, False)), told[-2000:]
    assert finished(*command).returncode == 0
    found = losses(killed)
    assert set(found) == {"trunk", "steps_00000008", "steps_00000032"}
    assert found == losses(tmp_path / "alone")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the runs: with rungs whose losses follow a law, as training would have logged them."""
    overrides = (*CONFIG[2:], f"run.dir={tmp_path}")
    rungs, chance, law = Rungs.of("mmdit_debug_mup.yaml", overrides, "32,64,96", "8,16,32", 2), default_rng(0), Law()
    for trunk in rungs.trunks():
        config = rungs.trunk_config(trunk, 8)
        logged = {rungs.branch_folder(trunk, steps): [steps] for steps in rungs.steps}
        for path, steps in {**logged, rungs.folder / trunk.name / "trunk": range(4, 27, 2)}.items():
            path.mkdir(parents=True)
            lines = []
            for step in steps:
                images = step * config.train.global_batch_size
                loss = 3 * law.loss(parameters_of(config), images) * math.exp(0.002 * chance.standard_normal())
                record = {"step": step, "val_loss_ema": loss, "val_loss_ema_t0.0625": 2 * loss, "val_set": "x"}
                if trunk.width == 32:  # a time that not all rungs were measured at
                    record["val_loss_ema_t0.9375"] = loss
                lines.append(json.dumps(record) + "\n")
            (path / "metrics.jsonl").write_text("".join(lines))
    open_folder(rungs)
    return tmp_path


def test_fit_and_a_run_that_follows(folder: Path) -> None:
    """The forecast of the rungs, and one that the run's first validations lie below."""
    target = folder / "target_forecast"
    fitted = finished("launch/forecast.py", "fit", *CONFIG, f"run.dir={folder}", "--json")
    assert fitted.returncode == 0, fitted.stdout[-3000:] + fitted.stderr[-2000:]
    found = json.loads(fitted.stdout)
    assert found["interval"][0] < found["loss"] < found["interval"][1]
    assert found["by_level"]["t0.0625"]["loss"] == pytest.approx(2 * found["loss"])
    assert set(found["by_level"]) == {"t0.0625"}
    assert any("nothing is said of t0.9375: 18 runs leave 3 points" in note for note in found["notes"])
    assert [found["course"][0][0] < 24, found["course"][-2][0], found["course"][-1][0]] == [True, 36, 48]
    assert json.loads((target / FORECAST).read_text())["loss"] == found["loss"]
    assert "<img" in (target / "index.html").read_text()

    path = folder / "taken.json"
    path.write_text(json.dumps({**found, "refused": False, "course": [[1, 5, 4, 6], [47, 5, 4, 6], [48, 1, 1e-9, 9]]}))
    done = finished("launch/train.py", *CONFIG, f"run.dir={folder}", f"run.forecast={path}")
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("forecast ")]
    assert len(said) == 8
    assert all("now " in line and line.endswith("below") for line in said[:7])
    assert said[7].endswith("inside")
    assert done.stdout.count("warning: 3 validations in a row lie outside") == 1
    followed = [record for record in read_metrics(folder / "target") if "forecast/loss" in record]
    assert [record["step"] for record in followed] == [6, 12, 18, 24, 30, 36, 42, 48]
    state, reason = read_status(folder / "target") or ("", "")
    assert state == "finished", reason

    wrong = finished("launch/train.py", *CONFIG, f"run.dir={folder}", f"run.forecast={path}", "optim.lr=1e-5")
    assert wrong.returncode == 2
    assert "optim.lr: " in wrong.stderr


def test_other_rungs_in_the_same_folder(folder: Path) -> None:
    done = finished("launch/forecast.py", "run", *CONFIG, *RUNGS, f"run.dir={folder}", "optim.lr=1e-5")
    assert done.returncode == 2
    assert "holds the rungs of another target" in done.stderr


def test_table(tmp_path: Path) -> None:
    rungs = rungs_of(Law(), 0.003, default_rng(0))
    table = tmp_path / "rungs.csv"
    rows = (f"{r.parameters},{r.images},{r.seed},{r.loss}\n" for r in rungs)
    table.write_text("parameters,images,seed,loss\n" + "".join(rows))
    command = ("launch/forecast.py", "fit", "--table", table, "--parameters", "1.6e6", "--images", "38400")
    done = finished(*command, "--json", "--output", tmp_path / "page")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["interval"][0] < Law().loss(1.6e6, 38400) < found["interval"][1]
    assert set(found["exponents"]) == {"alpha", "beta"}
    assert found["optimal_parameters"] > 0
    assert found["refused"] is False
    assert (tmp_path / "page" / "index.html").is_file()
    assert "loss 0." in finished(*command).stdout

    few = tmp_path / "few.csv"
    few.write_text("\n".join(table.read_text().splitlines()[:10]))
    done = finished("launch/forecast.py", "fit", "--table", few, "--parameters", "1", "--images", "1")
    assert done.returncode == 2
    assert "needs 7" in done.stderr
    assert finished("launch/forecast.py", "fit").returncode == 2
    assert finished("launch/forecast.py", "fit", "--table", table).returncode == 2
