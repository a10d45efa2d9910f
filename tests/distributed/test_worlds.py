"""The same run on 1, 2, 3 and 4 processes, in float64: the world size is no part of the mathematics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.exports import run_export

from .runs import assert_close, train, weights

WORLDS = (1, 2, 3, 4)
STEPS = 5
# Uneven shares (8 samples on 3 ranks), accumulation (two rows a micro-batch at 32 pixels), caption dropout.
SETTINGS = (
    "parallel.precision=fp64",
    f"train.steps={STEPS}",
    f"train.validate_every={STEPS}",
    f"train.checkpoint_every={STEPS}",
    "train.sample_every=0",
    "train.micro_batch_size=0.03125",
    "text_encoder.dropout=0.3",
)

Runs = dict[int, tuple[list[dict[str, Any]], Path]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("worlds")
    return {world: (train(world, folder / f"w{world}", *SETTINGS), folder / f"w{world}") for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS[1:])
def test_losses_agree(runs: Runs, world: int) -> None:
    assert_close(runs[1][0], runs[world][0], 1e-9)


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("group", ["model", "ema_0.99", "exp_avg"])
def test_parameters_agree(runs: Runs, world: int, group: str) -> None:
    """T12 of the muP tests: at most 1e-10 after five steps, from meta device to sharded optimizer groups."""
    one, many = (weights(runs[w][1], group) for w in (1, world))
    assert one.keys() == many.keys()
    worst = max(float((one[name] - many[name]).abs().max()) for name in one)
    assert worst <= 1e-10, worst


def test_the_comparison_can_fail(runs: Runs) -> None:
    """Training moved every weight by far more than the tolerance, except where its rule says that it cannot."""
    records, folder = runs[1]
    assert records[0]["val_loss"] - records[-1]["val_loss"] > 1e-3
    live, average = weights(folder), weights(folder, "ema_0.99")
    assert all(float((live[name] - average[name]).abs().max()) > 1e-7 for name in live)
    assert all(tensor.dtype == torch.float64 for tensor in live.values())


def test_exports_agree(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that lie in three uneven shards are read whole."""
    for world in (1, 3):
        run_export(monkeypatch, "--checkpoint", runs[world][1], "--output", tmp_path / str(world))
    one, three = (load_file(next((tmp_path / str(world)).glob("transformer/*.safetensors"))) for world in (1, 3))
    assert one.keys() == three.keys()
    assert max(float((one[name] - three[name]).abs().max()) for name in one) <= 1e-10
    average = weights(runs[3][1], "ema_0.99")
    assert torch.equal(three["proj_out.weight"], average["final.weight"] / 2)  # m is 2
    assert torch.equal(three["transformer_blocks.0.ff.net.2.weight"], average["blocks.0.image.mlp.fc2.weight"])


@pytest.mark.parametrize("config", ["dit_debug_mup.yaml", "pixart_debug_mup.yaml", "uvit_debug_mup.yaml"])
def test_every_backbone_agrees_on_two_processes(config: str, tmp_path: Path) -> None:
    """T12 for the other backbones: one process against two, each weight of them sharded."""
    settings = [key for key in SETTINGS if not key.startswith("text_encoder")]
    records = {world: train(world, tmp_path / f"w{world}", *settings, config=config) for world in (1, 2)}
    assert_close(records[1], records[2], 1e-9)
    one, two = (weights(tmp_path / f"w{world}") for world in (1, 2))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-10
    assert records[1][-1]["val_loss"] != records[1][0]["val_loss"]
