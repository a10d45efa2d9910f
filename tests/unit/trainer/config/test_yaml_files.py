"""Overrides of a command line."""

import pytest

from trainer.config.yaml_files import refuse_duplicates
from trainer.errors import ConfigError


def test_a_key_given_twice_shows_both() -> None:
    with pytest.raises(ConfigError) as error:
        refuse_duplicates(["data.shards=a-000.tar", "optim.lr=1", "data.shards=a-001.tar", "optim.lr=1"])
    text = str(error.value)
    assert "data.shards is given 2 times: data.shards=a-000.tar data.shards=a-001.tar" in text
    assert "optim.lr is given 2 times: optim.lr=1 optim.lr=1" in text
    assert "braces" in text


def test_different_keys_pass() -> None:
    refuse_duplicates(["optim={lr: 1}", "optim.lr=2", "data.flip=0"])
    refuse_duplicates([])


def test_the_message_shows_no_secret() -> None:
    with pytest.raises(ConfigError) as error:
        refuse_duplicates([f"data.shards=https://me:hunter2@host/a-{n}.tar?sig=s3cret" for n in (0, 1)])
    assert "hunter2" not in str(error.value)
    assert "s3cret" not in str(error.value)
