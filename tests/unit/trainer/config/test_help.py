"""Help for the keys, as --help-config prints it."""

import subprocess
import sys

import pytest

from models.registry import MODEL_KINDS
from tests.helpers.paths import ROOT
from trainer.config.help import describe_keys
from trainer.config.keys import leaf_keys
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError


def test_all_keys_are_described() -> None:
    text = describe_keys()
    for model in MODEL_KINDS.values():
        for key in leaf_keys(TrainConfig, model):
            assert f"  {key}: " in text
    assert max(map(len, text.splitlines())) < 200


def test_a_section_and_a_key() -> None:
    section, key = describe_keys("optim"), describe_keys("optim.lr")
    assert (
        "  optim.lr: number; greater than 0; default 0.0009765625; schedule\n      Base learning rate of AdamW"
        in section
    )
    assert "  optim.lr: number" in key
    assert "optim.eps" in section
    assert "optim.eps" not in key
    assert "ema." not in section
    assert "data.sources[].weight: number; greater than 0; default 1.0; runtime" in describe_keys("data.sources")
    assert "data.sources[].shards: text; required; runtime" in describe_keys("data.sources")


def test_keys_that_all_models_have_come_once() -> None:
    text = describe_keys("model")
    assert text.count("  model.patch_size: ") == 1
    assert "default 512 (mmdit), 288 (dit, pixart, uvit)" in text
    assert '  model.kind: `mmdit`, `dit`, `pixart` or `uvit`; default "mmdit"; identity' in text


def test_an_unknown_section_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match='no config key or section is called "optm"; did you mean "optim"'):
        describe_keys("optm")


@pytest.mark.slow
def test_on_the_command_line() -> None:
    command = [sys.executable, "launch/train.py", "--help-config", "ema"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == describe_keys("ema") + "\n"
