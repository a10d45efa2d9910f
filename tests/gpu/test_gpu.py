"""What only a CUDA device can show; `make gpu-check` runs these, offline."""

from pathlib import Path

import pytest
import torch

from models.layers import time_sinusoids
from tests.distributed.runs import exact, train
from trainer.diffusion.random import normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CONFIG = "mmdit_0.18b_mup.yaml"
TINY = (
    "data.shards=synthetic", "model.width=128", "model.depth=2", "train.global_batch_size=8", "train.steps=6",
    "text_encoder.max_length=16", "text_encoder.width=64", "train.log_every=1", "train.validate_every=6",
    "train.checkpoint_every=3", "optim.warmup_steps=1", "train.deterministic=true",
)  # fmt: skip


def test_draws_are_those_of_the_cpu() -> None:
    keys = torch.arange(64)
    ours = normal(keys.cuda(), (4, 32, 32), "noise").cpu()
    torch.testing.assert_close(ours, normal(keys, (4, 32, 32), "noise"), rtol=0, atol=1e-12)


def test_sinusoids_stay_float32_under_bf16() -> None:
    t = torch.tensor([0.9001, 0.9012])
    torch.testing.assert_close(time_sinusoids(t.cuda()).cpu(), time_sinusoids(t), rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", ["compile=false", "compile=true", "cpu_offload=true"])
def test_trains_in_bf16_and_resumes_exactly(tmp_path: Path, way: str) -> None:
    """Six steps against three and three more, with deterministic algorithms: equal to the last bit."""
    settings = (*TINY, f"parallel.{way}")
    whole = train(1, tmp_path / "whole", *settings, config=CONFIG)
    train(1, tmp_path / "parts", *settings, "train.steps=3", config=CONFIG)
    parts = train(1, tmp_path / "parts", *settings, "run.allow_change=[train.steps]", config=CONFIG)
    assert exact(parts)[4:] == exact(whole)[4:]
    assert whole[-1]["val_loss"] < whole[0]["val_loss"]
