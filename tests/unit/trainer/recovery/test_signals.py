"""What the signals do that ask a run to stop; in a real run: tests/faults/test_signals.py."""

import os
import signal
from collections.abc import Iterator

import pytest

from trainer.recovery.signals import SIGNALS, Signals


@pytest.fixture(autouse=True)
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Exit codes of ends at once. The process that runs the tests may have been told to ignore some signals."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield codes
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_of_them_asks(number: int, ended: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    with Signals() as signals:
        assert not signals.asked
        signal.raise_signal(number)
        assert signals.asked
        assert f"{signal.Signals(number).name}: the run saves and ends" in capfd.readouterr().err
        signal.raise_signal(signal.SIGTERM)  # a scheduler sends several
        assert not ended
    assert signal.getsignal(number) is signal.default_int_handler
    with Signals(at_once=True):
        signal.raise_signal(number)
    assert ended == [128 + number]
    assert "nothing is lost" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_at_once(ended: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    with Signals(before_end=told.append):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert not ended
        assert not told
        signal.raise_signal(signal.SIGINT)
    assert ended == [130]
    assert told == ["ended at once by a second SIGINT: the steps since the newest checkpoint are lost"]
    assert "ended at once" in capfd.readouterr().err


def test_what_is_ignored_stays_so(ended: list[int]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with Signals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert not signals.asked
