"""Which folders a page shows."""

from pathlib import Path

import pytest

from launch.watching.sources import open_sources
from trainer.errors import ConfigError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory where the user stands, with runs/a, runs/b and the trunks of a forecast."""
    for name in ("runs/a", "runs/b", "runs/rungs/w64/trunk", "runs/rungs/w64/steps_00000010"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").touch()
    (tmp_path / "runs" / "no_run").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["runs/a"], ["runs/a"]),
        (["a", "runs/a", "b"], ["runs/a", "runs/b"]),
        (["runs"], ["runs/a", "runs/b"]),
        (["rungs"], ["runs/rungs/w64/steps_00000010", "runs/rungs/w64/trunk"]),
        (["later"], ["later"]),
        (["no_run"], ["runs/no_run"]),
    ],
)
def test_folders_names_and_folders_of_runs(here: Path, names: list[str], expected: list[str]) -> None:
    assert [str(source.folder) for source in open_sources(names)] == expected


def test_too_many_runs_are_refused(here: Path) -> None:
    for number in range(30):
        (here / "many" / str(number)).mkdir(parents=True)
        (here / "many" / str(number) / "config.yaml").touch()
    with pytest.raises(ConfigError, match="30 runs are more than the 24"):
        open_sources(["many"])
