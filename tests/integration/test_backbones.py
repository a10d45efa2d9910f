"""Each backbone learns from real data through the same launch/train.py: CIFAR-10's classes, captioned emoji."""

from pathlib import Path

import pytest

from tests.distributed.runs import train

CONFIGS = ("mmdit_demo_mup.yaml", "pixart_emoji_mup.yaml", "dit_cifar_mup.yaml", "uvit_cifar_mup.yaml")
SHORT = (
    "train.steps=60", "train.global_batch_size=16", "train.log_every=20", "train.validate_every=60",
    "train.checkpoint_every=60", "train.sample_every=60", "optim.warmup_steps=5", "ema.decays=[0.9]",
    "model.width=64", "mup.base_width=32", "model.depth=2", "validation.samples=32", "sample.count=4",
    "sample.prompts=[]", "sample.steps=5",
)  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_halves_its_validation_loss_on_real_data(config: str, tmp_path: Path) -> None:
    records = train(1, tmp_path / "run", *SHORT, config=config)
    assert records[-1]["val_loss_ema"] < 0.5 * records[0]["val_loss"]
    assert (tmp_path / "run" / "samples" / "step_00000060.png").stat().st_size > 1000
