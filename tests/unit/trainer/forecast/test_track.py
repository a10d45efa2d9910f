"""A run beside its forecast: inside or outside, a warning after three, and no forecast of another run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.forecast.track import FORECAST, Expected, Track, facts, read_forecast


def config_of(folder: Path, *overrides: str) -> TrainConfig:
    return load_config("mmdit_debug_mup.yaml", [f"run.dir={folder}", "run.name=target", *overrides])


def data(config: TrainConfig, **changes: Any) -> dict[str, Any]:
    course = [[10, 0.8, 0.7, 0.9], [100, 0.4, 0.35, 0.45], [200, 0.3, 0.29, 0.31]]
    whole = {"refused": False, "reasons": [], "target": facts(config), "course": course, "fingerprints": {"data": "a"}}
    return {**whole, "optimal_parameters": 1e6, "optimal_images": 1e5, **changes}


def written(folder: Path, config: TrainConfig, **changes: Any) -> Path:
    path = folder / FORECAST
    path.write_text(json.dumps(data(config, **changes)))
    return path


def track_of(folder: Path) -> Track:
    path = written(folder, config_of(folder))
    track = Track.of(config_of(folder, f"run.forecast={path}"))
    assert track is not None
    return track


def test_between_two_steps_of_the_course(tmp_path: Path) -> None:
    track = track_of(tmp_path)
    assert track.at(200) == Expected(200, 0.3, 0.29, 0.31)
    assert track.at(150) is None, "of the decay nothing was measured"
    middle = track.at(round(math.sqrt(1000)))
    assert middle is not None
    assert middle.loss == pytest.approx(math.sqrt(0.8 * 0.4), rel=0.01)
    assert middle.low < middle.loss < middle.high
    assert track.at(9) is None
    assert track.at(201) is None


def test_course_of_the_end_alone(tmp_path: Path) -> None:
    track = Track([Expected(200, 0.3, 0.29, 0.31)], tmp_path)
    assert track.at(100) is None
    assert track.at(200) == Expected(200, 0.3, 0.29, 0.31)


def test_told_and_warned_once(tmp_path: Path) -> None:
    track, said = track_of(tmp_path), list[str]()
    figures = track.follow(100, 0.4, said.append)
    assert said == ["forecast 0.4 [0.35, 0.45], now 0.4: inside"]
    assert figures == {"forecast/loss": 0.4, "forecast/low": 0.35, "forecast/high": 0.45}
    for step, loss in ((96, 0.5), (97, 0.5), (98, 0.2), (99, 0.5)):
        track.follow(step, loss, said.append)
    assert [text.splitlines()[0].rpartition(": ")[2] for text in said] == ["inside", "above", "above", "below", "above"]
    assert ["warning: 3 validations in a row" in text for text in said] == [False, False, False, True, False]
    assert "coord_check.py" in said[3]
    assert track.follow(0, 1.0, said.append) == {}, "nothing is forecast of the start"


def test_a_loss_that_is_not_finite_is_outside(tmp_path: Path) -> None:
    said = list[str]()
    track_of(tmp_path).follow(100, math.nan, said.append)
    assert not said[0].endswith("inside")


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    track, said = track_of(tmp_path), list[str]()
    outside = {"forecast/loss": 0.4, "forecast/low": 0.35, "forecast/high": 0.45, "val_loss_ema": 0.6}
    track.resume([{"step": 1}, outside, outside])
    track.follow(100, 0.6, said.append)
    assert "warning" in said[0]


def test_the_run_folder_may_name_it(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert Track.of(config) is None
    config.run.folder.mkdir()
    written(config.run.folder, config)
    assert Track.of(config) is not None


def test_of_another_run(tmp_path: Path) -> None:
    path = written(tmp_path, config_of(tmp_path))
    config = config_of(tmp_path, f"run.forecast={path}", "optim.lr=1e-5", "model.width=96", "train.seed=9")
    with pytest.raises(ConfigError) as error:
        Track.of(config)
    told = str(error.value)
    assert "optim.lr: " in told
    assert "model.width: " in told
    assert "train.seed" not in told, "the seed is what the interval is about"
    Track.of(config_of(tmp_path, f"run.forecast={path}", "train.log_every=7"))


def test_other_data_is_told(tmp_path: Path) -> None:
    track = track_of(tmp_path)
    assert track.notes({"data": "a", "text": "b"}) == []
    (told,) = track.notes({"data": "c"})
    assert "data: a there, c now" in told


def test_refused_missing_and_damaged(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    path = written(tmp_path, config, refused=True, reasons=["too few"])
    with pytest.raises(ConfigError, match=r"was refused when it was made \(too few\): set run\.forecast=null"):
        Track.of(config_of(tmp_path, f"run.forecast={path}"))
    config.run.folder.mkdir()
    written(config.run.folder, config, refused=True, reasons=["too few"])
    with pytest.raises(ConfigError, match="remove the file"):
        Track.of(config)
    with pytest.raises(ConfigError, match="cannot be read"):
        Track.of(config_of(tmp_path, "run.forecast=none.json"))
    whole = data(config)
    for damaged in (
        "", "[]", "null", "{", "[" * 100_000,
        *(json.dumps({key: value for key, value in whole.items() if key != gone}) for gone in whole),
        *(json.dumps({**whole, "course": c}) for c in ([[1, 2]], [[1, 2, 3, 1]], [list("abcd")], 7, [[1, -1, 1, 1]])),
        json.dumps({**whole, "refused": "no"}), json.dumps({**whole, "target": 3}),
    ):  # fmt: skip
        path.write_text(damaged)
        with pytest.raises(ConfigError, match=r"is no forecast of launch/forecast\.py"):
            read_forecast(path)
