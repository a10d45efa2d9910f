"""The study's journal stays readable: after a full disk, after kills, and whatever a disk has made of it."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.helpers.fuzz import OUTCOMES, READ, REFUSED, fuzz
from tests.helpers.studies import fill, search
from trainer.errors import ConfigError
from trainer.files import append_lines
from trainer.search.live_table import Table
from trainer.search.study import JOURNAL, Study


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: what fits is written, the rest fails, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of a study with three finished trials and one that runs."""
    study = Study.open(search(tmp_path_factory.mktemp("whole"), trials=4))
    for number, claim in enumerate(iter(study.claim, None)):
        if number < 3:
            claim.trial.report(2.0, 0)
            study.finish(claim, "complete", [1.0 + number], "")
        claim.lock.close()
        if number == 3:
            break
    return (study.folder / JOURNAL).read_bytes()


@pytest.mark.slow
def test_a_full_disk_and_kills_cost_the_study_nothing(tmp_path: Path) -> None:
    """The record that did not fit is not there; the next ones are, and so after a kill in the middle of a record."""
    study = Study.open(search(tmp_path))
    path = study.folder / JOURNAL
    with room_for(path.stat().st_size + 30), pytest.raises(OSError, match=str(path)):
        study.claim()
    with open(path, "ab") as file:
        file.write(b'{"op_code":9,"wor')  # killed
    fill(Study.open(search(tmp_path)), lambda point: 1.0)
    assert {trial.state for trial in Study.load(str(study.folder)).trials()} == {"complete"}


@pytest.mark.slow
@pytest.mark.parametrize("torn", [b'{"op_code":9,"wor', b"\0" * 5000], ids=["record", "zeros"])
def test_a_journal_that_older_versions_went_on_in_is_read(torn: bytes, journal: bytes, tmp_path: Path) -> None:
    wanted = search(tmp_path, trials=4)
    (tmp_path / "study").mkdir()
    lines = journal.splitlines(keepends=True)
    (tmp_path / "study" / JOURNAL).write_bytes(b"".join([*lines[:-3], torn, *lines[-3:]]))
    assert [trial.value for trial in Study.open(wanted).trials()] == [1.0, 2.0, 3.0, None]


def test_a_tail_is_cut_to_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for tail in (b"", b"half", b"\0" * 200_000):
        path.write_bytes(b"whole\n" + tail)
        append_lines(path, "next\nand next\n")
        assert path.read_bytes() == b"whole\nnext\nand next\n"
    path.write_bytes(b"half")
    append_lines(path, "first\n")
    assert path.read_bytes() == b"first\n"


KINDS = ("cut", "flip", "zeros", "drop", "twice", "swap")
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "zeros", "drop", "twice", "swap"]), st.floats(0, 1), st.binary(min_size=1)
    ),
    min_size=1,
    max_size=3,
)


def damaged(whole: bytes, kind: str, where: float, noise: bytes) -> bytes:
    at = int(where * max(0, len(whole) - 1))
    lines = whole.splitlines(keepends=True)
    line = int(where * (len(lines) - 1))
    match kind:
        case "cut":
            return whole[:at]
        case "flip":
            return whole[:at] + noise + whole[at + len(noise) :]
        case "zeros":
            return whole[:at] + b"\0" * 64 + whole[at + 64 :]
        case "drop":
            return b"".join(lines[:line] + lines[line + 1 :])
        case "twice":
            return b"".join(lines[: line + 1] + lines[line:])
        case _:
            return b"".join(lines[line:] + lines[:line])


@example(damage=[("cut", 0.9, b"x")])
@example(damage=[("drop", 0.25, b""), ("drop", 0.25, b"")])  # a value of a finished trial
@given(damage=DAMAGE)
@fuzz(20)
def test_whatever_became_of_a_journal_it_is_read_or_refused_in_one_message(
    damage: list[tuple[str, float, bytes]], journal: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    wanted, path = search(folder, trials=4), folder / "study" / JOURNAL
    path.parent.mkdir()
    whole = journal
    for kind, where, noise in damage:
        whole = damaged(whole, kind, where, noise)
    path.write_bytes(whole)
    try:
        study = Study.open(wanted)
        Table(study).summary()
        if claim := study.claim():
            study.finish(claim, "complete", [9.0], "")
            assert [9.0] in [trial.losses for trial in Study.load(str(path.parent)).trials()]
    except ConfigError as error:
        told = str(error)
        OUTCOMES[REFUSED] += 1
    else:
        OUTCOMES[READ] += 1
        return
    assert str(path.parent) in told
    assert "\n" not in told or "another search" in told
