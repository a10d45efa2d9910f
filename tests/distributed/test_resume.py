"""Killed at random with SIGKILL and started again, a run logs what an uninterrupted one logs, bit for bit."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.forked import finished
from trainer.checkpoint.find import complete_checkpoints

from .runs import assert_close, exact, train, train_and_kill, weights

# A log line and a checkpoint that do not fall together: the checkpoint then holds half of a line's sum.
SETTINGS = ("train.steps=16", "train.log_every=2", "train.checkpoint_every=5", "train.validate_every=8")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    records = {n: train(n, folder / f"w{n}", *SETTINGS) for n in (1, 2)}
    for n in records:  # the saves of steps 5 and 10, beside the lines of metrics.jsonl
        # A save that ends late is counted with the next one.
        for key, least in (("checkpoint_blocked_s", 2), ("checkpoint_write_s", 1)):
            assert sum(record.get(key, 0) > 0 for record in records[n]) >= least, key
    return {n: exact(records[n]) for n in records}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_bit_exact(processes: int, workers: int, uninterrupted: dict[int, list[str]], tmp_path: Path) -> None:
    seed = int(os.environ.get("KILL_SEED", random.randrange(1 << 20)))
    print(f"KILL_SEED={seed}")
    chance = random.Random(seed)
    folder, more = tmp_path / "run", f"data.num_workers={workers}"
    killed_at = train_and_kill(processes, folder, chance.randint(0, 14), chance.uniform(0, 0.3), *SETTINGS, more)
    resumed_from = [path.name for path in complete_checkpoints(folder / "checkpoints")]
    records = train(processes, folder, *SETTINGS, more)
    assert exact(records) == uninterrupted[processes], f"killed at {killed_at}, had {resumed_from}, seed {seed}"


def test_a_branch_logs_what_a_run_with_its_schedule_from_the_start_logs(
    uninterrupted: dict[int, list[str]], tmp_path: Path
) -> None:
    """Here out of the decay of a WSD run, back at a constant rate. The checkpoint holds half of a line's sum."""
    decaying = ("train.steps=7", "optim.schedule=wsd", "optim.decay_steps=1")
    train(1, tmp_path / "decaying", *SETTINGS, *decaying)
    source, folder = tmp_path / "decaying" / "checkpoints" / "step_00000005", tmp_path / "constant"
    constant = ("train.steps=16", "optim.schedule=constant", "optim.decay_steps=0")
    done = finished("launch/branch.py", "--checkpoint", source, "--output", folder, *constant)
    assert done.returncode == 0, done.stderr
    assert exact(train(1, folder, config=str(folder / "config.yaml"))) == uninterrupted[1]


def test_a_run_goes_on_with_a_set_that_has_grown(tmp_path: Path) -> None:
    """Refused in its folder. In a branch the new set begins with its first epoch, and is resumed as any other."""
    steps = ("train.validate_every=0", "train.checkpoint_every=5")
    half, both = (f"data.shards=.cache/debug/train-{{000000..00000{last}}}.tar" for last in (0, 1))
    source, folder = tmp_path / "half", tmp_path / "both"
    train(1, source, *steps, half, "train.steps=5")
    refused = finished("launch/train.py", "--config", source / "config.yaml", both)
    assert refused.returncode == 2
    assert "launch/branch.py --new-data" in refused.stderr, refused.stderr
    grown = ("--new-data", both, "data.filter.min_side=8", "train.steps=10")
    done = finished("launch/branch.py", "--checkpoint", source, "--output", folder, *grown)
    assert done.returncode == 0, done.stderr
    config = str(folder / "config.yaml")
    assert [record["step"] for record in train(1, folder, config=config)] == [*range(11)]
    done = finished("launch/data_order.py", "--config", config, "--from-step", "5", "--to-step", "21")
    seen = [key for line in done.stdout.splitlines() for key in json.loads(line)["keys"]]
    assert len(seen) == 16 * 8, done.stderr
    assert len({key.split("/")[0] for key in seen[: 3 * 8]}) == 2, "of both shards from the first step on"
    train(1, folder, "train.steps=12", "run.allow_change=[train.steps,data.shards]", config=config)
    shutil.rmtree(folder / "checkpoints")
    fresh = finished("launch/train.py", "--config", config)
    assert fresh.returncode == 2
    assert "data.first_step is 5, and a new run begins at step 0" in fresh.stderr, fresh.stderr


def test_another_world_size_goes_on(tmp_path: Path, uninterrupted: dict[int, list[str]]) -> None:
    """2 -> 1 process in mid-run, in float64: same samples and draws, losses to rounding."""
    settings = (*SETTINGS, "parallel.precision=fp64", "train.sample_every=0")
    train_and_kill(2, tmp_path / "a", 8, 0.0, *settings, after_save=True, torchrun=True)
    assert complete_checkpoints(tmp_path / "a" / "checkpoints"), "killed after its first checkpoint"
    changed, whole = train(1, tmp_path / "a", *settings), train(2, tmp_path / "b", *settings)
    assert_close(changed, whole, 1e-9)
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 1e-9


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_an_alignment_that_has_ended_stays_so_and_its_projector_stays(reshard: str, tmp_path: Path) -> None:
    """On two ranks, resumed after the border and before it. The projector gets no gradient, no decay and no norm."""
    keys = (
        *("data.shards=synthetic", "text_encoder.width=16", "text_encoder.max_length=6", "train.sample_every=0"),
        *("objective.repa_weight=0.5", "objective.repa_layer=1", "objective.repa_width=16", "objective.repa_hidden=24"),
        *("objective.repa_until=3", "train.steps=6", "train.checkpoint_every=2", "train.micro_batch_size=1"),
        *("optim.weight_decay=0.1", f"parallel.reshard_after_forward={reshard}"),
    )
    whole = tmp_path / "whole"
    records = train(2, whole, *keys)
    assert [record["step"] for record in records if "repa_loss" in record] == [1, 2, 3]
    kept = {}
    for later in (4, 6):
        run = tmp_path / f"before_{later}"
        shutil.copytree(whole, run)
        for step in range(later, 7, 2):
            shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
        kept[later - 2] = weights(run)
        assert exact(train(2, run, *keys)) == exact(records)
    end = weights(whole)
    moved = {step: {name for name in end if not torch.equal(then[name], end[name])} for step, then in kept.items()}
    assert any(name.startswith("projector.") for name in moved[2])
    assert moved[4]
    assert not any(name.startswith("projector.") for name in moved[4])
