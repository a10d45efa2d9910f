"""The watchdog's limits, and who is blamed; what it does in a real run is in tests/faults."""

import contextlib
import json
import signal
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from launch.processes import _WATCHDOG
from trainer.errors import PeerError
from trainer.monitor.records import read_status, write_status
from trainer.parallel.mesh import World
from trainer.recovery.signals import Signals
from trainer.recovery.watchdog import ASKED_S, PHASE_FACTOR, Fault, Watchdog, watched_build


def test_limits(world: World, tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, world, factor=20, min_s=30, host_lag_steps=10)
    assert watchdog.limit_s() == PHASE_FACTOR * 30, "blocks may still be compiled"
    assert Watchdog(tmp_path, world, 20, 30, 10, asked=lambda: True).limit_s() == ASKED_S
    watchdog.beat(10, step_time_s=100.0)  # compiled in it
    assert watchdog.limit_s() == 20 * 100 + 10 * 100
    for step in (20, 30):
        watchdog.beat(step, step_time_s=1.0)
    assert watchdog.limit_s() == 30 + 10, "the median"
    with watchdog.phase("validation"):
        assert watchdog.limit_s() == PHASE_FACTOR * 40
    assert watchdog.limit_s() == 40
    assert Watchdog(tmp_path, world, None, 30, 0).limit_s() is None


def test_a_fault_of_its_own_is_told(world: World, tmp_path: Path) -> None:
    error = ValueError("no such thing")
    watchdog = Watchdog(tmp_path, world, 20, 30, 0)
    watchdog.beat(7)
    assert watchdog.blame(error) is error
    told = json.loads((tmp_path / "status.json").read_text())
    assert told == {"state": "failed", "step": 7, "reason": "ValueError: no such thing"}


def test_the_first_fault_on_the_board_counts(world: World, tmp_path: Path) -> None:
    first, second = (Watchdog(tmp_path, world, 20, 30, 0) for _ in range(2))
    for rank, watchdog in enumerate((first, second)):
        watchdog._rank, watchdog._size, watchdog._board = rank, 2, first._board
    error = ValueError("no such thing")
    assert first.blame(error) is error
    other = second.blame(KeyError("what follows from it"))
    assert isinstance(other, PeerError)
    assert str(other).startswith("ValueError: no such thing (here: KeyError")
    assert "no such thing" in json.loads((tmp_path / "status.json").read_text())["reason"]


def test_no_thread_outlives_it(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread inside the store when the interpreter ends aborts it; here the store takes its time."""
    monkeypatch.setattr("trainer.recovery.watchdog.POLL_S", 0.01)
    watchdog, inside = Watchdog(tmp_path, world, 20, 30, 0), threading.Event()
    watchdog._size = 2

    def slow_read() -> None:
        inside.set()
        with contextlib.suppress(RuntimeError):
            watchdog._board.wait(["never"], timedelta(milliseconds=300))

    monkeypatch.setattr(watchdog, "_read_board", slow_read)
    with watchdog:
        assert inside.wait(20)
        assert {"watch_step", "watch_peers"} <= {thread.name for thread in threading.enumerate()}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(_WATCHDOG)]


def test_a_silent_neighbour_is_found(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.recovery.watchdog.POLL_S", 0.05)
    monkeypatch.setattr("trainer.recovery.watchdog.SUSPECT_S", 0.3)
    watchdog = Watchdog(tmp_path, world, None, 30, 0)
    monkeypatch.setattr("trainer.recovery.watchdog.ENDING_S", 60.0)
    watchdog._size = 2
    with watchdog:
        found = watchdog.blame(RuntimeError("Connection closed by peer"))
    assert isinstance(found, PeerError)
    assert str(found).startswith("rank 1 is lost")
    assert watchdog._fault == Fault(0, "rank 1 is lost: killed, or its host is gone", stacks=False)


def test_a_build_that_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    ended = threading.Event()
    monkeypatch.setattr("os._exit", lambda code: (codes.append(code), ended.set()))
    with watched_build(None, 0.001, Signals()), watched_build(20, 0.01, Signals()) as hold:
        hold(tmp_path)
        assert ended.wait(20)
    assert codes == [1]
    said = capfd.readouterr().err
    assert "not built within 0 s (10 x train.watchdog_min_s)" in said
    assert "test_a_build_that_hangs_is_ended" in said, "the stacks"
    state, reason = read_status(tmp_path) or ("", "")
    assert state == "failed"
    assert reason.startswith("the run was not built within")
    with watched_build(20, 300, Signals()):
        pass


def test_a_build_that_is_ended_by_a_signal_leaves_the_reason_where_the_folder_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os._exit", lambda code: None)
    (tmp_path / "checkpoints" / "step_00000007").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000007" / "meta.json").touch()
    write_status(tmp_path, "failed", 9, "of the start before")
    with Signals(at_once=True) as signals:
        with watched_build(None, 1, signals) as hold:
            signal.raise_signal(signal.SIGTERM)
            assert read_status(tmp_path) == ("failed", "of the start before"), "another run may train there"
            hold(tmp_path)
            signal.raise_signal(signal.SIGTERM)
        told = json.loads((tmp_path / "status.json").read_bytes())
        assert (told["state"], told["step"]) == ("failed", 7), "torchrun ends so what another rank's failure has left"
        assert told["reason"] == "ended by SIGTERM: no step was under way, so nothing is lost"
        with watched_build(None, 1, signals) as hold:
            hold(tmp_path)
            signal.raise_signal(signal.SIGUSR1)
        assert (read_status(tmp_path) or ("",))[0] == "preempted", "as a time limit asks"
        write_status(tmp_path, "finished", 9)
        signal.raise_signal(signal.SIGTERM)  # after training, say
    assert read_status(tmp_path) == ("finished", "")
