"""A branch: the run folder that it makes, and what it refuses. That it trains on exactly: tests/distributed."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from trainer.build.branch import branch
from trainer.checkpoint.find import find_checkpoint
from trainer.checkpoint.meta import read_meta
from trainer.checkpoint.write import seal
from trainer.config.load import load_config
from trainer.config.resume import check_resume
from trainer.errors import CheckpointError, ConfigError
from trainer.monitor.records import read_metrics
from trainer.recovery.skipped_ranges import SkippedRange, read_skipped_ranges, write_skipped_ranges

OLD = ROOT / "tests" / "integration" / "run_of_0db30ff"


def test_a_branch_holds_the_steps_up_to_its_checkpoint(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "new" / "branch"
    shutil.copytree(OLD, source)
    with open(source / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6')
    write_skipped_ranges(source, [SkippedRange(4, 2, "gone back to here"), SkippedRange(5, 1, "later")])
    told = branch(source, folder, ["train.steps=9", "optim.lr=1e-3", "train.log_every=2"])
    assert told[1:] == [
        "changed: optim.lr: 0.004 -> 0.001", "changed: train.log_every: 1 -> 2", "changed: train.steps: 4 -> 9",
    ]  # fmt: skip
    assert [record["step"] for record in read_metrics(folder)] == [0, 1, 2, 3, 4]
    assert read_skipped_ranges(folder) == (SkippedRange(4, 2, "gone back to here"),)
    checkpoint = find_checkpoint(folder)  # verifies it
    assert json.loads((folder / "mup.json").read_text()) == json.loads((source / "mup.json").read_text())
    config = load_config(str(folder / "config.yaml"))
    assert (config.run.dir, config.run.name) == (str(folder.parent), "branch")
    assert set(config.run.allow_change) == {"optim.lr", "train.steps"}
    assert check_resume(read_meta(checkpoint)["config"], config, 4), "the run goes on without a word more"
    shutil.rmtree(source)
    assert find_checkpoint(folder) == checkpoint, "whatever becomes of the source"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.seed=3", "optim.lr=1"], "train.seed: 0 in the checkpoint, 3 now\nChange keys of class schedule"),
        (["train.steps=3"], "train.steps 3 is before step 4"),
        (["run.name=other"], "follow from --output"),
        (["optim.schedule=wsd"], "optim.decay_steps"),
    ],
)
def test_what_a_branch_may_not_change(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        branch(OLD, tmp_path / "branch", overrides)
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_branch_with_other_data_may_change_their_keys_but_not_the_resolution(tmp_path: Path) -> None:
    write_skipped_ranges(shutil.copytree(OLD, tmp_path / "source"), [SkippedRange(4, 2, "of the data before")])
    told = branch(tmp_path / "source", tmp_path / "a", ["data.shards=new", "data.epochs=1"], new_data=True)
    assert {"changed: data.epochs: None -> 1", "changed: data.first_step: 0 -> 4"} < {*told}
    assert not read_skipped_ranges(tmp_path / "a")
    config = load_config(str(tmp_path / "a" / "config.yaml"))
    old = read_meta(find_checkpoint(tmp_path / "a"))["config"]
    assert check_resume(old, config, 4)
    with pytest.raises(ConfigError, match=r"data\.epochs"):
        check_resume(old, config, 3)  # of a checkpoint before them
    for key in ("train.seed=3", "data.resolution=16"):
        with pytest.raises(ConfigError, match="a branch keeps what the run is"):
            branch(OLD, tmp_path / "b", [key], new_data=True)


def test_a_snapshot_is_no_start_of_a_branch(tmp_path: Path) -> None:
    shutil.copytree(find_checkpoint(OLD), tmp_path / "step_00000004")
    meta = read_meta(tmp_path / "step_00000004")
    (tmp_path / "step_00000004" / "meta.json").write_text(seal({**meta, "averages_only": True}))
    with pytest.raises(CheckpointError, match=r"without the optimizer's moments: .*run\.init_from="):
        branch(tmp_path / "step_00000004", tmp_path / "branch", [])
