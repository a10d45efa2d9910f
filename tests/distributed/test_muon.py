"""Muon on sharded weights, through launch/train.py in float64: the world size is no part of the mathematics."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.forked import finished

from .runs import assert_close, exact, train, train_and_kill, weights

# The weights that Muon moves are still where they began unless prediction and gates let gradients through.
SETTINGS = (
    "optim.kind=muon", "optim.muon.lr=0.02", "optim.muon.weight_decay=0.1", "model.adaln_init=fan_in",
    "parallel.precision=fp64", "train.validate_every=3", "train.checkpoint_every=3", "train.sample_every=0",
    "train.micro_batch_size=0.03125", "text_encoder.dropout=0.3",
)  # fmt: skip
GROUPS = ("model", "ema_0.99", "momentum", "exp_avg")


def assert_same_weights(one: Path, other: Path) -> None:
    for group in GROUPS:
        ours, theirs = weights(one, group), weights(other, group)
        assert ours.keys() == theirs.keys()
        assert ours
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 1e-9, group


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine steps on one process."""
    folder = tmp_path_factory.mktemp("muon") / "alone"
    train(1, folder, *SETTINGS, "train.steps=9")
    return folder


def test_any_world_and_copies_on_the_way(alone: Path, tmp_path: Path) -> None:
    """4 processes in two copies (HSDP), 3 with uneven shards in the host's memory, 2 with a copy each."""
    staged = tmp_path / "staged"
    stages = ((4, 3, "parallel.shard=2"), (3, 6, "parallel.cpu_offload=true"), (2, 9, "parallel.shard=1"))
    records: list[dict[str, Any]] = []
    for processes, steps, option in stages:
        records = train(processes, staged, *SETTINGS, f"train.steps={steps}", option, "run.allow_change=[train.steps]")
    assert_close(records, train(1, alone, *SETTINGS, "train.steps=9"), 1e-9)
    assert_same_weights(staged, alone)


def test_what_muon_moves(alone: Path) -> None:
    """By the muP table: hidden matrices of attention and MLP have a momentum, all else the moments of AdamW."""
    momentum, mean = weights(alone, "momentum"), weights(alone, "exp_avg")
    assert momentum.keys() | mean.keys() == weights(alone).keys()
    assert not momentum.keys() & mean.keys()
    assert {name.rsplit(".", 2)[-2] for name in momentum} == {"qkv", "kv", "out", "fc1", "fc2"}
    assert all(name.startswith("blocks.") and "modulation" not in name for name in momentum)
    assert all(float(tensor.abs().max()) > 0 for tensor in momentum.values())


@pytest.mark.parametrize("save", ["true", "false"])
def test_killed_and_resumed_bit_for_bit(tmp_path: Path, save: str) -> None:
    """On two processes in float32, whole matrices on their way between the ranks when they are killed."""
    settings = (
        *SETTINGS, "parallel.precision=fp32", "train.steps=8", "train.log_every=1", "train.checkpoint_every=2",
        f"train.checkpoint_async={save}",
    )  # fmt: skip
    train_and_kill(2, tmp_path / "killed", 3, 0.02, *settings, after_save=True)
    killed = train(2, tmp_path / "killed", *settings)
    whole = train(2, tmp_path / "whole", *settings)
    assert exact(killed) == exact(whole)
    for group in GROUPS:
        ours, theirs = (weights(tmp_path / name, group) for name in ("killed", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), group


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of two ranks found."""
    done = finished("-m", "tests.distributed.muon_checks", "2", processes=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


def test_one_step_moves_every_matrix_by_its_lr_decay_and_scale(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["one_step_moves_as_the_table_says"] == []
        assert found["another_setting_is_seen"] == {"lr_scale": 0, "weight_decay": 0, "scale": 0}, "of all of Muon's"


def test_a_step_that_is_not_finite_on_one_rank_changes_nothing(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["non_finite_step_changes_nothing"] == {
            "skipped": 1.0, "moved": 0.0, "average_moved": 0.0, "next_is_finite": 1.0,
        }  # fmt: skip


def test_a_checkpoint_gives_back_the_momenta(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        loaded = found["save_and_load"]
        assert loaded["differed"] > 1e-3
        assert (loaded["same"], loaded["next"]) == (0.0, 0.0)


def test_averages_take_the_weights_place(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["swapped"]["averaged"] < 1e-5
        assert found["swapped"]["differs"] > 1e-4
