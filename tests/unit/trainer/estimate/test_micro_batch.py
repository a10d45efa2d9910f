"""train.micro_batch_size=auto: the largest that fits, one message where none does, and half of it after a failure."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import train
from trainer import loop
from trainer.build.engine import build_mup_table
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.estimate import micro_batch
from trainer.estimate.memory import Memory
from trainer.estimate.micro_batch import fitting_micro_batch
from trainer.estimate.simulation import profile
from trainer.monitor.metrics import read_metrics
from trainer.recovery.signals import Signals
from trainer.search import local_workers

pytestmark = pytest.mark.slow
AREA = 32**2 / 256**2  # of the debug config's images
QUIET = (
    "train.steps=3",
    "train.log_every=1",
    "train.validate_every=0",
    "train.sample_every=0",
    "parallel.precision=fp64",
)


def configured(*more: str) -> TrainConfig:
    return load_config("mmdit_debug_mup.yaml", ["data.shards=synthetic", "train.global_batch_size=24", *more])


def test_it_is_the_largest_that_fits_in_equal_parts() -> None:
    config = configured()
    memory = Memory(profile(config, 2), build_mup_table(config), 0, config.parallel)
    for most, rows, count in ((12, 12, 1), (5, 4, 3), (1, 1, 12)):
        usable = memory.total(2, most, most < 12)
        found = fitting_micro_batch(config, 2, usable)
        assert (found.rows, found.micro_batches, found.size) == (rows, count, rows * AREA)
        assert sum(found.parts.values()) <= usable
    assert f"auto: 1 x 12 per GPU, at the peak {usable / 2**30:.1f} of" in found.describe()
    with pytest.raises(ConfigError, match=r"one sample fits: .*checkpointing=full.*more GPUs"):
        fitting_micro_batch(config, 2, memory.total(2, 1, True) - 1)


def test_half_of_what_was_too_large() -> None:
    assert fitting_micro_batch(configured(), 2, 2**40, too_large=12 * AREA).rows == 6
    with pytest.raises(ConfigError, match="not even"):
        fitting_micro_batch(configured(), 2, 2**40, too_large=1 * AREA)


def test_pairs_are_fitted_and_halved_whole(tmp_path: Path) -> None:
    """Of 10 rows where 6 fit, plain micro-batches have 5 and those of pairs 4; the half of 6 is 3, which is 2."""
    pairs = configured("objective.contrastive_weight=0.05", "train.global_batch_size=10")
    memory = Memory(profile(pairs, 1), build_mup_table(pairs), 0, pairs.parallel)
    usable = memory.total(1, 6, True)
    assert fitting_micro_batch(configured("train.global_batch_size=10"), 1, usable).rows == 5
    assert fitting_micro_batch(pairs, 1, usable)[:3] == (4 * AREA, 4, 3)
    assert fitting_micro_batch(pairs, 1, 2**40, too_large=6 * AREA).rows == 2
    with pytest.raises(ConfigError, match="not even a micro-batch of 2 samples fits"):
        fitting_micro_batch(pairs, 1, memory.total(1, 2, True) - 1)
    for rows, told in ((10, "with 4"), (4, "with 2"), (2, "launch/estimate.py --plan tells what fits")):
        fitting = fitting_micro_batch(pairs, 1, 2**40)._replace(size=rows * AREA)
        assert micro_batch._remedy(pairs, fitting, 1, tmp_path, "full").endswith(told)
    named = configured("objective.contrastive_weight=0.05", f"train.micro_batch_size={6 * AREA}")
    assert f"Set train.micro_batch_size={2 * AREA:g}, or" in micro_batch._remedy(named, None, 1, tmp_path, "full")


def trained(folder: Path, *more: str) -> list[Any]:
    config = configured(*QUIET, f"run.dir={folder}", *more)
    with Signals(at_once=True) as signals:
        train._train(config, signals)
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(config.run.folder) if "loss" in line]


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, usable: int) -> None:
    """Have a run on this CPU look for what fits into `usable` bytes, as it would on a GPU."""
    found = micro_batch.find_fitting
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def find(config: TrainConfig, gpus: int, folder: Path) -> Any:
        fitting = found(config, gpus, folder)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return fitting

    monkeypatch.setattr(micro_batch, "find_fitting", find)
    monkeypatch.setattr(micro_batch, "usable_here", lambda: usable)
    monkeypatch.setattr(micro_batch, "_place", lambda config, gpus: f"a GPU x {gpus}")


def test_a_run_takes_it_and_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trained(tmp_path / "whole", "train.micro_batch_size=auto")
    config = configured(*QUIET)
    memory = Memory(profile(config, 1), build_mup_table(config), 0, config.parallel)
    as_on_a_gpu(monkeypatch, memory.total(1, 9, True))
    capsys.readouterr()
    parts = trained(tmp_path / "parts")
    assert "train.micro_batch_size=auto: 8 x 3 per GPU" in capsys.readouterr().out
    assert torch.tensor(parts).allclose(torch.tensor(whole), rtol=1e-6)
    assert "micro_batch_size: null" in (tmp_path / "parts" / "mmdit_debug_mup" / "config.yaml").read_text()


def test_out_of_memory_is_told_and_the_next_start_takes_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = loop.micro_batch_losses

    def memory_for_eight(model: Any, objective: Any, alignment: Any, encoded: Any, *more: Any) -> Any:
        if len(encoded.x0) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return losses(model, objective, alignment, encoded, *more)

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(loop, "micro_batch_losses", memory_for_eight)
    monkeypatch.setattr("os._exit", end)
    told = []
    for _ in range(2):
        as_on_a_gpu(monkeypatch, 2**40)
        with pytest.raises(SystemExit):
            trained(tmp_path)
        told.append(capsys.readouterr().err)
    assert "out of memory with micro-batches of 24 samples" in told[0]
    assert "from its newest checkpoint with 12" in told[0]
    assert "out of memory with micro-batches of 12 samples" in told[1]
    as_on_a_gpu(monkeypatch, 2**40)
    assert len(trained(tmp_path)) == 3
    said = capsys.readouterr().out
    assert "auto: 6 x 4 per GPU" in said
    assert "at most half of what ran out of memory before (micro_batch.json)" in said
    with pytest.raises(SystemExit):
        trained(tmp_path / "named", f"train.micro_batch_size={24 * AREA}")
    assert f"Set train.micro_batch_size={12 * AREA:g}, or auto" in capsys.readouterr().err


def test_out_of_memory_beside_the_steps_is_no_matter_of_the_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(loop, "_validate_sample_evaluate", full)
    monkeypatch.setattr("os._exit", end)
    with pytest.raises(SystemExit):
        trained(tmp_path)
    assert "out of memory, and not in a training step" in capsys.readouterr().err
    assert not (tmp_path / "mmdit_debug_mup" / "micro_batch.json").exists()


def test_a_damaged_record_is_no_record(tmp_path: Path) -> None:
    for text, found in (
        (json.dumps({"place": "here", "too_large": 4}), 4.0),
        (json.dumps({"place": "there", "too_large": 4}), None),
        ('{"place": "here"}', None),
        ("[1]", None),
        ("\0\0", None),
    ):
        (tmp_path / "micro_batch.json").write_text(text)
        assert micro_batch._recorded(tmp_path, "here") == found


def test_a_cpu_takes_its_whole_share() -> None:
    assert micro_batch.find_fitting(configured(), 1, Path())() is None


def test_workers_of_a_search_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers on two GPUs: each may take half of its GPU, also while the other has not begun."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (75 * 2**30, 80 * 2**30))
    assert micro_batch.usable_here() == 72 * 2**30
    for name, value in local_workers._device(2, 3).items():
        monkeypatch.setenv(name, value)
    assert micro_batch.usable_here() == 37 * 2**30
