"""The config that `mudit init` writes: what it says, which model it takes, and that it loads as it was estimated."""

import dataclasses
import json
from pathlib import Path

import pytest

from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.estimate.cluster import CARDS, Cluster
from trainer.estimate.proposal import Wish, encoder_width, propose, suited, two_digits, values_of

DEBUG = ["mmdit_debug_mup"]


def wish(**changes: object) -> Wish:
    return Wish(**({"data": "a/{0..3}.tar", "gpus": 2, "hours": 0.1, "resolution": 32, "encoder": "sd3"} | changes))  # pyright: ignore[reportArgumentType]


def encoder(folder: Path, **config: object) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_width_of_an_encoder(tmp_path: Path) -> None:
    assert encoder_width(Path(encoder(tmp_path, d_model=512, hidden_size=9))) == 512
    assert encoder_width(Path(encoder(tmp_path, hidden_size=384))) == 384
    assert encoder_width(Path(encoder(tmp_path, text_config={"hidden_size": 768}))) == 768
    for wrong in ({}, {"text_config": 3}, {"hidden_size": None}):
        with pytest.raises(ConfigError, match=r'is no text encoder: expected "sd3", or a folder whose config\.json'):
            encoder_width(Path(encoder(tmp_path, **wrong)))
    with pytest.raises(ConfigError, match="is no text encoder"):
        encoder_width(tmp_path / "nowhere")


def test_values(tmp_path: Path) -> None:
    assert [value.override for value in values_of(wish())] == ['data.shards="a/{0..3}.tar"', "data.resolution=32"]
    values = values_of(wish(encoder=encoder(tmp_path, d_model=512)))
    assert [value.override for value in values[2:]] == [
        f'text_encoder.path="{tmp_path}"',
        "text_encoder.subfolder=null",
        "text_encoder.width=512",
    ]


def test_round() -> None:
    assert [two_digits(number) for number in (0.4, 7.9, 84.9, 849, 84999.9)] == [0, 7, 84, 840, 84000]


@pytest.mark.slow
def test_the_largest_model_that_suits_the_compute() -> None:
    bases = ["mmdit_0.7b_mup", "mmdit_0.18b_mup"]  # of 0.72 and 0.18 B parameters

    def best(parameters: float) -> float:
        """The compute for which the paper finds so many parameters best."""
        return (parameters / 0.0009) ** (1 / 0.5681)

    assert suited(bases, [], best(0.40e9)) == bases
    assert suited(bases, [], best(0.30e9)) == bases[1:]
    assert suited(bases, [], best(1e6)) == bases[1:], "the smallest is always there"


@pytest.mark.slow
def test_what_is_written_is_what_was_estimated(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    asked = wish(encoder=encoder(tmp_path / "encoder", d_model=512), hours=0.01)
    found = propose(asked, Cluster(2), DEBUG, "mine")
    path = tmp_path / "mine.yaml"
    path.write_text(found.text)
    config = load_config(str(path))
    assert config.run.name == "mine"
    assert (config.data.shards, config.data.resolution) == ("a/{0..3}.tar", 32)
    assert (config.text_encoder.path, config.text_encoder.width) == (str(tmp_path / "encoder"), 512)
    assert config.model == load_config("mmdit_debug_mup").model
    assert config.train.steps > 10
    assert f"steps: {config.train.steps} # 90% of 0.01 hours at" in found.text
    assert all(f"# {line}".rstrip() in found.text for line in found.page.splitlines())
    assert found.page.startswith("mine on 2 GPUs of 80 GB: ")
    twice = propose(asked._replace(hours=0.02), Cluster(2), DEBUG, "mine").text
    steps = load_config(str(path), [f"run.dir={tmp_path}"]).train.steps
    path.write_text(twice)
    assert load_config(str(path)).train.steps == pytest.approx(2 * steps, rel=0.1)


@pytest.mark.slow
def test_what_cannot_be_is_refused() -> None:
    small = dataclasses.replace(CARDS["h100"], memory_gb=0.7)
    with pytest.raises(ConfigError, match=r"none of mmdit_debug_mup fits into the 0\.7 GB of 2 GPUs at 32 pixels"):
        propose(wish(), Cluster(2, small), DEBUG, "mine")
    with pytest.raises(ConfigError, match="hold 0 steps of mmdit_debug_mup: expected 10 at least"):
        propose(wish(hours=1e-9), Cluster(2), DEBUG, "mine")
    with pytest.raises(ConfigError, match="resolution"):
        propose(wish(resolution=33), Cluster(2), DEBUG, "mine")
