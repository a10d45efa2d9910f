"""The config that `mudit init` writes: what it says, which model it takes, and that it loads as it was estimated."""

import dataclasses
import json
from pathlib import Path

import pytest

from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.estimate import proposal
from trainer.estimate.cluster import CARDS, Cluster
from trainer.estimate.proposal import (
    Wish,
    encoder_width,
    matmul_rate,
    propose,
    propose_small,
    suited,
    two_digits,
    values_of,
)

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
    assert [value.override for value in values_of(wish(), "mine")] == [
        'run.name="mine"',
        'data.shards="a/{0..3}.tar"',
        "data.val_shards=null",
        "data.resolution=32",
    ]
    values = values_of(wish(encoder=encoder(tmp_path, d_model=512)), "mine")
    assert [value.override for value in values[4:]] == [
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
    assert load_config("mmdit_debug_mup").data.val_shards is not None, "of a base's own, which are not these data's"
    found = propose(asked, Cluster(2), DEBUG, "mine")
    path = tmp_path / "mine.yaml"
    path.write_text(found.text)
    config = load_config(str(path))
    assert config.run.name == "mine"
    assert (config.data.shards, config.data.val_shards, config.data.resolution) == ("a/{0..3}.tar", None, 32)
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
def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's model, as wide as the hours allow, for any resolution; nothing of the demo's own data is left."""
    monkeypatch.setattr(proposal, "matmul_rate", lambda: 1e11)

    def proposed(**changes: object) -> TrainConfig:
        asked = wish(gpus=0, encoder=encoder(tmp_path, d_model=512), **changes)
        (tmp_path / "mine.yaml").write_text(propose_small(asked, "mmdit_demo_mup", "mine").text)
        return load_config(str(tmp_path / "mine.yaml"))

    config, demo = proposed(hours=0.4), load_config("mmdit_demo_mup")
    assert (config.run.name, config.data.shards, config.data.val_shards) == ("mine", "a/{0..3}.tar", None)
    assert (demo.run.name, demo.data.val_shards) == ("demo", ".cache/emoji/val-*.tar")
    assert (config.text_encoder.path, config.text_encoder.width) == (str(tmp_path), 512)
    assert (config.model.width, proposed(hours=10).model.width) == (128, 256)
    assert proposed(hours=0.2).train.steps == pytest.approx(0.5 * config.train.steps, rel=0.1)
    assert proposed(resolution=64, hours=1).data.resolution == 64
    with pytest.raises(ConfigError, match=r"1e-09 hours hold 0 steps of mmdit_demo_mup: expected 10 at least"):
        proposed(hours=1e-9)
    with pytest.raises(ConfigError, match=r"sd3 has 4\.8 B parameters.* expected the folder of a small one"):
        propose_small(wish(gpus=0), "mmdit_demo_mup", "mine")


def test_rate_of_this_machine() -> None:
    assert 1e8 < matmul_rate() < 1e14


@pytest.mark.slow
def test_what_cannot_be_is_refused() -> None:
    small = dataclasses.replace(CARDS["h100"], memory_gb=0.7)
    with pytest.raises(ConfigError, match=r"none of mmdit_debug_mup fits into the 0\.7 GB of 2 GPUs at 32 pixels"):
        propose(wish(), Cluster(2, small), DEBUG, "mine")
    with pytest.raises(ConfigError, match="hold 0 steps of mmdit_debug_mup: expected 10 at least"):
        propose(wish(hours=1e-9), Cluster(2), DEBUG, "mine")
    with pytest.raises(ConfigError, match="resolution"):
        propose(wish(resolution=33), Cluster(2), DEBUG, "mine")
