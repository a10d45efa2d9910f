"""Copies of the weights that are each sharded (HSDP), through launch/train.py: 4 -> 2 -> 3 processes equal one."""

from pathlib import Path
from typing import Any

from .runs import assert_close, train, weights

# A stage ends on its checkpoint and validation; 8 samples on 3 ranks are uneven shares, in two micro-batches.
SETTINGS = (
    "parallel.precision=fp64", "train.validate_every=3", "train.checkpoint_every=3", "train.sample_every=0",
    "train.micro_batch_size=0.03125", "run.allow_change=[train.steps]",
)  # fmt: skip
STAGES = (
    (4, "train.steps=3", "parallel.shard=2", "parallel.activation_checkpointing=full"),
    (2, "train.steps=6", "parallel.shard=1", "parallel.reshard_after_forward=false"),
    (3, "train.steps=9", "parallel.shard=3", "parallel.cpu_offload=true"),
)


def test_other_worlds_and_copies_on_the_way(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    for processes, *stage in STAGES:
        records = train(processes, tmp_path / "staged", *SETTINGS, *stage)
    whole = train(1, tmp_path / "whole", *SETTINGS, "train.steps=9")
    assert records[-1]["step"] == 9
    assert_close(records, whole, 1e-9)  # the losses name the samples and draws
    assert records[0]["val_loss"] - records[-1]["val_loss"] > 1e-3
    for group in ("model", "ema_0.99", "exp_avg_sq"):
        ours, theirs = weights(tmp_path / "staged", group), weights(tmp_path / "whole", group)
        assert ours.keys() == theirs.keys()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 1e-10
