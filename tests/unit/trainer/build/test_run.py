"""What a run does with the folder that it is told to write."""

from pathlib import Path

import pytest
import torch

from trainer.build.run import _check_is_run_folder, _slow_precision
from trainer.config.load import load_config
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("capabilities", "precision", "slow"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "bf16", True),
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16", False),
        ({"avx2": True}, "fp32", False),
        ({"avx2": True}, "null", False),
    ],
)
def test_who_asks_for_bf16_where_it_is_slow_is_warned(
    capabilities: dict[str, bool], precision: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    config = load_config("mmdit_debug_mup", [f"parallel.precision={precision}"])
    assert bool(_slow_precision(config, torch.device("cpu"))) == slow


def test_a_folder_with_other_files_is_not_taken_for_a_run(tmp_path: Path) -> None:
    """config.yaml and metrics.jsonl are written over; what a kill, convert.py or submit.py leave is a run's."""
    _check_is_run_folder(tmp_path / "absent")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "status.json").touch()
    _check_is_run_folder(tmp_path)
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).touch()
        with pytest.raises(ConfigError, match=f"{tmp_path} holds {name}, but no run: choose another run.name"):
            _check_is_run_folder(tmp_path)
        (tmp_path / "checkpoints").mkdir()
        _check_is_run_folder(tmp_path)
        (tmp_path / "checkpoints").rmdir()
        (tmp_path / name).unlink()
    (tmp_path / "mup.json").touch()
    (tmp_path / "metrics.jsonl").touch()
    _check_is_run_folder(tmp_path)
