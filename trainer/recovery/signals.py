"""The signals that ask a run to stop, heard from the command's first line on. No torch: it is imported meanwhile."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

# Of Slurm and torchrun, Ctrl-C, a terminal that is closed, Ctrl-\.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
ANSWER_S = 3.0  # for the store, or the disk, to answer a rank that ends: either may be what hangs


class Signals:
    """Within it the signals set `asked`, and a second Ctrl-C ends the process at once.

    at_once: any signal does, because there is nothing to save. What the process was told to ignore (nohup, a shell's
    background job) it goes on ignoring, and its forks ignore all of them: they end with their parent. before_end: is
    called with the reason before the process is ended at once, which waits for it for ANSWER_S at most.
    """

    def __init__(self, at_once: bool = False, before_end: Callable[[str], None] = lambda reason: None) -> None:
        self.asked = False
        self.before_end = before_end
        self._at_once, self._interrupted = at_once, False

    def __enter__(self) -> "Signals":
        self._process = os.getpid()
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            self._leave_terminals()
        if self._at_once:
            self._end(number, f"ended by {name}: no step was under way, so nothing is lost")
        if number == signal.SIGINT and self._interrupted:
            self._end(number, "ended at once by a second SIGINT: the steps since the newest checkpoint are lost")
        if not self.asked:
            _tell(f"{name}: the run saves and ends after this step (a second Ctrl-C ends it at once)")
        self.asked, self._interrupted = True, self._interrupted or number == signal.SIGINT

    def _leave_terminals(self) -> None:
        """A line to a terminal that is gone would raise, and end what is to be saved."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)

    def _end(self, number: int, why: str) -> None:
        _tell(f"error: {why}")
        try:
            within(ANSWER_S, self.before_end, why)
        finally:
            os._exit(128 + number)  # as a shell names it; process groups could not be left in order alone


def within(seconds: float, call: Callable[..., object], *arguments: object) -> bool:
    """Whether `call` has ended after so many seconds; it is left alone where it has not."""
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _tell(text: str) -> None:
    """A line from rank 0, past Python's buffers: the signal may have come in the middle of a print."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())
