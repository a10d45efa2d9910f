"""Which folders a page shows."""

import os
from pathlib import Path

import pytest

from launch.watching.sources import Sources
from trainer.page.run_data import RunFolder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory where the user stands, with runs/a, runs/b and the trunks of a forecast."""
    for name in ("runs/a", "runs/b", "runs/rungs/w64/trunk", "runs/rungs/w64/steps_00000010"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").touch()
    (tmp_path / "runs" / "no_run").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folders(sources: Sources) -> list[str]:
    return [str(source.folder) for source in sources.look().values()]


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
    assert folders(Sources(names)) == expected


def test_what_comes_later_is_found_and_what_stays_keeps_its_number(here: Path) -> None:
    later, every = Sources(["later"]), Sources(["runs"])
    later.look()
    assert later.notes == ["no run in later or runs/later yet: the page waits for one"]
    before = every.look()
    (here / "later").mkdir()  # which holds no run
    (here / "runs" / "a2").mkdir()
    (here / "runs" / "later").mkdir()
    for name in ("a2", "later"):
        (here / "runs" / name / "config.yaml").touch()
    assert (folders(later), later.notes) == (["runs/later"], [])
    assert folders(every) == ["runs/a", "runs/a2", "runs/b", "runs/later"]
    assert {number: every.look()[number] for number in before} == before, "of which the logs are read on"
    number = next(iter(later.look()))
    (here / "runs" / "later" / "study.journal").touch()
    ((other, source),) = later.look().items()
    assert not isinstance(source, RunFolder)
    assert other != number, "an address leads to what it led to, or to nothing"


def test_of_too_many_runs_the_newest_are_shown(here: Path) -> None:
    for number in range(30):
        (here / "many" / f"{number:02}").mkdir(parents=True)
        (here / "many" / f"{number:02}" / "config.yaml").touch()
        os.utime(here / "many" / f"{number:02}" / "config.yaml", (0, 1000 + number if number != 29 else 0))
    sources = Sources(["many"])
    assert folders(sources) == [f"many/{number:02}" for number in range(5, 29)]
    assert sources.notes == ["the newest 24 of 30 runs are shown: name those to compare"]
