"""What a person runs before the first job: preflight, fetch, ladder."""

import sys
from pathlib import Path

import pytest

from data.encoders import fetch as fetching
from data.errors import DataError
from data.storage import read_rate
from launch import fetch, ladder
from tests.helpers.forked import finished
from trainer.config.load import load_config
from trainer.config.yaml_files import refuse_duplicates
from trainer.coord_check import ladder as rungs
from trainer.errors import ConfigError
from trainer.parallel.preflight import Measurement, judge


def test_preflight_names_the_slow_process() -> None:
    done = finished(
        *("-m", "tests.integration.slow_preflight", "--config", "mmdit_debug_mup.yaml", "data.shards=synthetic"),
        *("--process-nodes", "--least", "0.2", "--clock-s", "60"),
        processes=3,
        torchrun=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    slow = [line for line in done.stdout.splitlines() if "of the median" in line]
    assert any(line.startswith("process 2 (process 2): matmul") for line in slow), done.stdout
    assert not any("matmul" in line and "process 2" not in line for line in slow)


def measured(node: str, **changed: object) -> Measurement:
    found = Measurement(
        node, matmul=1.0, read=100.0, reduce={"other": 10.0, "another": 10.0}, clock_s=0.0, versions="one"
    )
    return found._replace(**changed)


def test_judgement() -> None:
    world = [measured(node) for node in "abcd"]
    assert judge(world, 0.8, 1.0) == []
    for changed, said in (
        ({"matmul": 0.5}, "b (process 1): matmul 0.5 TFLOP/s, 50%"),
        ({"read": 10.0}, "b (process 1): shard read"),
        ({"reduce": {"a": 2.0, "c": 2.0}}, "b: all-reduce with any node 2 GB/s"),
        ({"clock_s": -3.0}, "b (process 1): its clock is -3.0 s off"),
        ({"versions": "two"}, "b (process 1): two; the others have one"),
    ):
        (problem,) = judge([world[0], measured("b", **changed), *world[2:]], 0.8, 1.0)
        assert problem.startswith(said)
    # One slow link is not a slow node: both of its ends are fast with another.
    links = [measured("a", reduce={"b": 1.0, "d": 10.0}), measured("b", reduce={"a": 1.0, "c": 10.0}), *world[2:]]
    assert judge(links, 0.8, 1.0) == []


def test_shards_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(2**20))
    assert read_rate([tmp_path / "a.tar"], rank=3) > 0.0


def test_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {}

    def download(path: str, **options: object) -> str:
        asked[path] = options
        folder = Path(str(options["local_dir"]))
        for part in ("", "text_encoder_3", "vae"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / "model.safetensors").touch()
        return str(folder)

    monkeypatch.setattr(fetching, "snapshot_download", download)
    monkeypatch.setattr(sys, "argv", ["fetch.py", "--config", "mmdit_18b_mup.yaml", "--to", str(tmp_path)])
    assert fetch.main() == 0
    said = capsys.readouterr().out.splitlines()
    folder = tmp_path / "stabilityai/stable-diffusion-3-medium-diffusers"
    features = f"objective.repa_encoder={tmp_path}/facebook/dinov2-base"
    assert said == [f"autoencoder.path={folder}", f"text_encoder.path={folder}", features]
    options, _ = asked.values()
    assert "text_encoder_3/*.safetensors" in options["allow_patterns"]
    assert "tokenizer_3/*.json" in options["allow_patterns"]
    # What it prints are overrides of the config.
    assert load_config("mmdit_18b_mup.yaml", said).text_encoder.path == str(folder)


def test_fetch_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: str, **options: object) -> str:
        raise OSError("403: gated")

    monkeypatch.setattr(fetching, "snapshot_download", lambda path, **options: str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(DataError, match=r"text_encoder\.path: 'google/t5' has no \*\.safetensors, .* text_encoder_3"):
        fetching.fetch("text_encoder.path", "google/t5", None, None)
    monkeypatch.setattr(fetching, "snapshot_download", refuse)
    with pytest.raises(DataError, match=r"text_encoder\.path: 'a/b' .*403: gated.*HF_TOKEN"):
        fetching.fetch("text_encoder.path", "a/b", None, None)


def test_local_encoders_need_no_fetching(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"text_encoder.path={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["fetch.py", "--config", "mmdit_debug_mup.yaml", *overrides])
    assert fetch.main() == 0
    assert (
        capsys.readouterr().out == f"autoencoder.path: none is named\ntext_encoder.path: {tmp_path} is a local folder\n"
    )


def test_ladder_verdict() -> None:
    assert rungs.verdict(True, {64: 1.0, 128: 0.9, 256: 0.8}, 0.0)["passed"]
    assert rungs.verdict(True, {64: 1.0, 128: 0.9, 256: 0.901}, 0.002)["passed"]
    for losses in ({64: 1.0, 128: 0.9, 256: 0.95}, {64: 1.0, 128: float("nan"), 256: 0.8}):
        found = rungs.verdict(True, losses, 0.002)
        assert not found["passed"]
        assert "Wider is not better: width" in found["reason"]
    assert not rungs.verdict(False, {}, 0.0)["passed"]


def test_rungs_are_valid_and_short() -> None:
    config = load_config("mmdit_18b_mup.yaml")
    rung = load_config("mmdit_18b_mup.yaml", rungs.rung(config, Path("runs/x_ladder"), 1024, 100, []))
    assert (rung.model.width, rung.train.steps, rung.optim.warmup_steps) == (1024, 100, 25)
    assert rung.optim.lr == config.optim.lr
    own = rungs.rung(config, Path("runs/x_ladder"), 1024, 100, ["train.steps=7", "optim.eps=1e-9"])
    refuse_duplicates(own)  # a command would not take them
    assert {"train.steps=100", "optim.eps=1e-9"} <= {*own}


def test_ladder_refuses_bad_widths_before_it_climbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["ladder.py", "--config", "mmdit_debug_mup.yaml", f"run.dir={tmp_path}", "--steps", "4", "--widths"]
    for widths, message in (("32,64,100", r"model\.width 100"), ("32,64", "at least three")):
        monkeypatch.setattr(sys, "argv", [*command, widths])
        with pytest.raises(ConfigError, match=message):
            ladder.main()
    assert list(tmp_path.iterdir()) == []
