"""What train.py says before it trains."""

import os

import pytest

from launch.train import foreign_validation, say_start
from trainer.config.load import load_config


def test_validation_on_other_data_than_is_trained_on_is_told() -> None:
    demo, own = load_config("mmdit_demo_mup"), "data.shards=mine"
    assert foreign_validation(demo, ["--config", "mmdit_demo_mup", "optim.lr=1"]) is None
    assert "data.val_shards=null" in (foreign_validation(demo, [own]) or "")
    assert foreign_validation(demo, ["data.sources=[{shards: mine}]"])
    assert foreign_validation(demo, [own, "data.val_shards=theirs"]) is None
    assert foreign_validation(load_config("mmdit_2b_mup"), [own]) is None


def test_the_start_is_said_once_and_to_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its libraries take seconds to load. (What a refusal says where there is no terminal: tests/integration.)"""
    config = load_config("mmdit_debug_mup", ["run.name=a"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for terminal, rank in ((True, "0"), (True, "1"), (False, "0")):
        monkeypatch.setattr(os, "isatty", lambda descriptor, terminal=terminal: terminal)
        monkeypatch.setenv("RANK", rank)
        say_start(config)
        captured = capsys.readouterr()
        assert captured.out == ""
        said.append(captured.err)
    assert said == ["runs/a: mmdit, 20 steps, 2 processes; starting takes up to a minute\n", "", ""]
