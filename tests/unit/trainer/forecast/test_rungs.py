"""Which rungs there are: the target's hyperparameters, and what differs; what no forecast can be fitted to."""

import json
import math
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.forecast.rungs import Rungs, Trunk, read_points, read_stable_points
from trainer.search.trunk_worker import open_folder
from trainer.search.trunks import decay_steps


def rungs(folder: Path, *overrides: str, widths: str = "32,64,96", steps: str = "20,40,80", seeds: int = 2) -> Rungs:
    own = (f"run.dir={folder}", "run.name=target", "train.steps=800", "optim.warmup_steps=10", "ema.decays=[0.995]")
    return Rungs.of("mmdit_debug_mup.yaml", [*own, *overrides], widths, steps, seeds)


@pytest.mark.slow
def test_one_set_of_widths_after_another(tmp_path: Path) -> None:
    wanted = [(seed, width) for seed in (0, 1) for width in (32, 64, 96)]
    assert [(t.seed, t.width) for t in rungs(tmp_path, widths="64,32,96").trunks()] == wanted


@pytest.mark.slow
def test_trunk_and_branch_differ_from_the_target_as_they_must(tmp_path: Path) -> None:
    wanted = rungs(tmp_path, "optim.lr=3e-3")
    trunk = wanted.trunk_config(Trunk(64, 1), 64)
    assert (trunk.model.width, trunk.train.seed, trunk.train.steps) == (64, wanted.target.train.seed + 1, 64)
    assert (trunk.optim.schedule, trunk.optim.lr, trunk.optim.warmup_steps) == ("constant", 3e-3, 5)
    # The target's average spans 200 of its 800 steps: the trunk's 20 of 80, a branch's never fewer than 10.
    # It carries those of its branches from the start, which so do not begin anew where they leave.
    assert trunk.ema.decays == (pytest.approx(1 - 1 / 20), pytest.approx(1 - 1 / 10))
    assert all(f"ema.decays=[{decay}]" in wanted.branch_overrides(s) for s, decay in ((80, 0.95), (40, 0.9), (20, 0.9)))
    assert "ema.decays=[0.9]" in wanted.branch_overrides(20)
    assert "optim.decay_steps=16" in wanted.branch_overrides(80)


@pytest.mark.slow
def test_share_of_the_decay_is_the_targets(tmp_path: Path) -> None:
    target = rungs(tmp_path, "optim.schedule=wsd", "optim.decay_steps=80").target
    assert decay_steps(target, 50) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"widths": "32,64"}, "at least three widths"),
        ({"steps": "40"}, "two durations and seven points"),
        ({"steps": "40,80"}, "seven points"),
        ({"widths": "32,64,x"}, "--widths takes whole numbers"),
        ({"steps": "0,1,2"}, "--steps takes whole numbers"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"widths": "32,64,97"}, "97"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        rungs(tmp_path, **changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_refusals_of_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.validate_every"):
        rungs(tmp_path, "train.validate_every=0")
    with pytest.raises(ConfigError, match=r"parallel\.engine=zero"):
        rungs(tmp_path, "parallel.engine=zero")
    assert rungs(tmp_path, steps="4,8,12").warmup_steps == 1
    with pytest.raises(ConfigError, match="within the warm-up"):
        rungs(tmp_path, "optim.schedule=wsd", "optim.decay_steps=790", steps="20,40,80")


@pytest.mark.slow
def test_folder_is_of_one_target(tmp_path: Path) -> None:
    first = rungs(tmp_path)
    open_folder(first)
    open_folder(rungs(tmp_path, widths="32,64,96,128", seeds=3))
    with pytest.raises(ConfigError, match="the durations: "):
        open_folder(rungs(tmp_path, steps="20,30,80"))  # a trunk has gone past where its decay would begin
    open_folder(rungs(tmp_path, "model.width=128"))  # the same rungs serve targets of other widths
    with pytest.raises(ConfigError, match=r"optim\.lr: .* there, 0\.5 now"):
        open_folder(rungs(tmp_path, "optim.lr=0.5"))
    with pytest.raises(ConfigError, match="the seed: 0 there, 5 now"):
        open_folder(rungs(tmp_path, "train.seed=5"))
    (first.folder / "rungs.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        open_folder(first)


def log(folder: Path, *lines: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.slow
def test_points_are_the_last_losses_of_branches(tmp_path: Path) -> None:
    wanted = rungs(tmp_path)
    trunk = Trunk(32, 0)
    early = {"step": 20, "val_loss_ema": 0.9, "val_set": "a"}
    last = {"step": 40, "val_loss_ema": 0.5, "val_loss_ema_t0.0625": 0.7, "val_set": "a"}
    log(wanted.branch_folder(trunk, 40), early, last)
    log(wanted.branch_folder(trunk, 80), early)  # not finished
    log(wanted.folder / trunk.name / "trunk", {**early, "step": 5}, {**early, "step": 30})
    (point,) = read_points(wanted)
    batch = wanted.target.train.global_batch_size
    assert (point.width, point.steps, point.loss, point.images) == (32, 40, 0.5, 40 * batch)
    assert point.by_level == {"t0.0625": 0.7}
    assert [point.steps for point in read_stable_points(wanted)] == [30], "after twice the warm-up"
    open_folder(wanted)
    assert Rungs.found("mmdit_debug_mup.yaml", wanted.overrides).steps == (20, 40, 80)
    with pytest.raises(ConfigError, match=r"optim\.lr: .* there, 0\.5 now"):
        Rungs.found("mmdit_debug_mup.yaml", [*wanted.overrides, "optim.lr=0.5"])
    log(wanted.branch_folder(Trunk(64, 0), 40), {**last, "val_set": "b"})
    with pytest.raises(ConfigError, match="2 different sets of validation samples"):
        read_points(wanted)


@pytest.mark.slow
def test_what_has_diverged_counts_as_infinite(tmp_path: Path) -> None:
    """A branch that has, and all branches that a trunk no longer came to."""
    wanted = rungs(tmp_path, seeds=1)
    (wanted.folder / "width_00032_seed_0" / "trunk").mkdir(parents=True)
    (wanted.folder / "width_00032_seed_0" / "trunk" / "diverged.txt").touch()
    log(wanted.branch_folder(Trunk(32, 0), 20), {"step": 20, "val_loss_ema": 0.5})
    log(wanted.branch_folder(Trunk(64, 0), 40))
    (wanted.branch_folder(Trunk(64, 0), 40) / "diverged.txt").touch()
    losses = {(point.width, point.steps): point.loss for point in read_points(wanted)}
    assert losses == {(32, 20): 0.5, (32, 40): math.inf, (32, 80): math.inf, (64, 40): math.inf}


def test_none_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no rungs: python launch/forecast\.py run"):
        Rungs.found("mmdit_debug_mup.yaml", [f"run.dir={tmp_path}"])
