"""The watchdog: a run that hangs, or that has lost a rank, ends within seconds or minutes and says why.

Two threads beside each rank's training, which keep going while it is stuck in a collective. One measures how long the
present step takes and needs nobody else. The other shows that this rank lives and looks at its neighbour and at the
board: keys of the rendezvous store, over a connection of its own. Whoever finds a fault puts it on the board and
writes status.json; the others read it there and end as well.
"""

import contextlib
import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.redaction import message

from ..checkpoint.find import complete_checkpoints, step_of
from ..errors import PeerError
from ..monitor.metrics import write_status
from ..parallel.mesh import World, open_board
from .signals import ANSWER_S, Signals, within

POLL_S = 1.0  # between two looks at the board
LOST_S = 20.0  # a neighbour without a sign of life; torch may hold Python's lock for some seconds
SUSPECT_S = 3.0  # the same once this rank's own training has failed
ENDING_S = 6.0  # for the training thread to end by itself after a fault elsewhere
PHASE_FACTOR = 10  # the build, first steps, validation, sampling, saving and going back may take so many times as long
ASKED_S = 60.0  # for a first step to end once the run was asked to stop: there is nothing to save


class Fault(NamedTuple):
    """What is on the board: who wrote it, why the run ends, and whether all ranks shall leave their stacks."""

    rank: int
    reason: str
    stacks: bool


class Watchdog:
    """Used as a context manager around training.

    folder: of the run. factor, min_s: a step may take factor x the median step, at least min_s seconds; None: any
    time. host_lag_steps: steps that the host may run ahead of the device, and then wait for in one. asked: whether this
    rank was asked to stop.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        factor: float | None,
        min_s: float,
        host_lag_steps: int,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self._folder, self._rank, self._size = folder, world.rank, world.size
        self._factor, self._min_s, self._lag = factor, min_s, host_lag_steps
        self._asked = asked
        self._board = open_board(world)
        self._step, self._phase = 0, ""
        self._since = time.monotonic()
        self._step_times: deque[float] = deque(maxlen=101)  # s, a mean of each log interval
        self._failed = threading.Event()  # this rank's training raised
        self._closed = threading.Event()
        self._fault: Fault | None = None  # as the board has it
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Watchdog":
        if self._factor is not None:
            self._start(self._watch_step)
        if self._size > 1:
            self._start(self._watch_peers)
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        # A thread that is inside the store when the interpreter ends aborts it. One that the store does not answer for
        # so long is left, and the command ends without that end (launch/common.py).
        for thread in self._threads:
            thread.join(LOST_S)

    # ----------------------------------------------------------------------------------- what the training thread calls

    def beat(self, step: int, step_time_s: float | None = None) -> None:
        """A step is done. step_time_s: mean of those since the last log line, where that is known."""
        self._step, self._since = step, time.monotonic()
        if step_time_s is not None:
            self._step_times.append(step_time_s)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within it something takes longer than a step."""
        self._phase, self._since = name, time.monotonic()
        yield
        self._phase, self._since = "", time.monotonic()

    def blame(self, error: BaseException) -> BaseException:
        """What ended this rank's training: `error`, after the other ranks have been told, or a PeerError where
        another rank failed first."""
        self._failed.set()
        deadline = time.monotonic() + ENDING_S
        # A collective raises when its peer is gone, mostly before anybody knows which: give the board some seconds.
        while self._size > 1 and isinstance(error, RuntimeError) and not self._fault and time.monotonic() < deadline:
            time.sleep(0.05)
        reason = f"{type(error).__name__}: {error}"
        fault = self._fault or self._tell(Fault(self._rank, reason, stacks=False))
        return error if fault is None else PeerError(f"{fault.reason} (here: {reason.splitlines()[0]})")

    # ------------------------------------------------------------------------------------------------------ the threads

    def limit_s(self) -> float | None:
        """What the present step or phase may take; None: any time. Before the first log line the median is not known,
        blocks are compiled and readers start."""
        if self._factor is None:
            return None
        if not self._step_times:
            return ASKED_S if self._asked() else PHASE_FACTOR * self._min_s
        median = statistics.median(self._step_times)
        limit = max(self._min_s, self._factor * median) + self._lag * median
        return limit * PHASE_FACTOR if self._phase else limit

    def _start(self, target: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=target, daemon=True, name=target.__name__.strip("_")))
        self._threads[-1].start()

    def _watch_step(self) -> None:
        while not self._closed.wait(min(POLL_S, self._min_s / 4)):
            limit, took = self.limit_s(), time.monotonic() - self._since
            if limit is not None and took > limit and not self._failed.is_set():
                what = f"{self._phase} after step {self._step}" if self._phase else f"step {self._step + 1}"
                long = "and no step was logged before"
                if self._step_times:
                    long = f"{took / statistics.median(self._step_times):.0f} times the median step"
                elif self._asked():
                    long = "and the run was asked to stop"
                self._end(
                    f"watchdog: {what} took more than {took:.0f} s on rank {self._rank}, {long}; stacks in "
                    f"{self._folder / 'stacks'}"
                )

    def _watch_peers(self) -> None:
        neighbour = (self._rank + 1) % self._size
        seen, seen_at = -1, time.monotonic()
        while not self._closed.wait(POLL_S / 4 if self._failed.is_set() else POLL_S):
            beats = seen
            try:
                self._board.add(f"alive/{self._rank}", 1)
                beats = self._board.add(f"alive/{neighbour}", 0)
                fault = self._read_board()
            except RuntimeError:
                if self._closed.is_set():  # training has ended, and so may have the process that holds the store
                    return
                fault = Fault(self._rank, "the rendezvous store is gone: its process or its host has ended", False)
                self._write_status(fault.reason)
            now = time.monotonic()
            if beats != seen:
                seen, seen_at = beats, now
            if fault is None and now - seen_at > (SUSPECT_S if self._failed.is_set() else LOST_S):
                fault = Fault(self._rank, f"rank {neighbour} is lost: killed, or its host is gone", stacks=False)
                fault = self._tell(fault) or fault
            if fault is not None:
                self._fault = fault
                self._follow(fault)
                return

    def _follow(self, fault: Fault) -> None:
        """End this rank, because of what is on the board."""
        if fault.stacks:
            within(ANSWER_S, self._dump)
        elif self._closed.wait(ENDING_S):  # the training thread ended by itself: its collective raised
            return
        print(message(f"rank {self._rank} ends: {fault.reason}"), file=sys.stderr, flush=True)
        os._exit(1)

    def _end(self, reason: str) -> None:
        """End this rank, which hangs, and with it the run."""
        self._closed.set()
        within(ANSWER_S, self._dump)
        if not within(ANSWER_S, self._tell, Fault(self._rank, reason, stacks=True)):
            within(ANSWER_S, self._write_status, reason)
        if self._size > 1:  # the others' collective would raise once this rank ends: they leave their stacks before
            time.sleep(ANSWER_S)
        print(message(f"error: {reason}"), file=sys.stderr, flush=True)
        os._exit(1)

    # -------------------------------------------------------------------------------------------------------- the board

    def _tell(self, fault: Fault) -> Fault | None:
        """Put a fault on the board and write status.json; returns the one that is on the board already, if any."""
        if self._size > 1:
            text = json.dumps(fault)
            with contextlib.suppress(RuntimeError):  # the store is gone
                if self._board.compare_set("fault", "", text).decode() != text:
                    return self._read_board()
        self._write_status(fault.reason)
        return None

    def _read_board(self) -> Fault | None:
        return Fault(*json.loads(self._board.get("fault"))) if self._board.check(["fault"]) else None

    def _write_status(self, reason: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, say: it must not hide the reason
            write_status(self._folder, "failed", self._step, message(reason))

    def _dump(self) -> None:
        """The stacks of all threads of this process, to stderr and into the run folder."""
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        folder = self._folder / "stacks"
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            with open(folder / f"rank_{self._rank}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)


@contextlib.contextmanager
def watched_build(factor: float | None, min_s: float, signals: Signals) -> Iterator[Callable[[Path], None]]:
    """End this process, with the stacks of its threads on stderr, where a run is not built in PHASE_FACTOR x min_s: a
    file system or a server that hangs, say. factor None: it may take any time.

    Yields what is to be called with the run's folder as soon as this process holds it: from then on status.json says
    what ended the build, this or one of `signals`.
    """
    limit = PHASE_FACTOR * min_s
    held: list[Path] = []

    def tell(state: str, reason: str) -> None:
        for folder in held:
            saved = complete_checkpoints(folder / "checkpoints")
            with contextlib.suppress(OSError):  # a full disk, say
                write_status(folder, state, step_of(saved[-1]) if saved else 0, message(reason))

    def end() -> None:
        reason = (
            f"the run was not built within {limit:.0f} s (10 x train.watchdog_min_s): mend what it waits for in the "
            "stacks on stderr, or raise the key"
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        print(f"error: {reason}", file=sys.stderr, flush=True)
        within(ANSWER_S, tell, "failed", reason)
        os._exit(1)

    def ended_by(reason: str) -> None:
        # torchrun and srun send SIGTERM to the ranks that are left when one has failed, which is no reason to start
        # again; a time limit or a preemption comes as SIGUSR1 (launch/slurm/train.sbatch).
        tell("failed" if "SIGTERM" in reason else "preempted", reason)

    timer = threading.Timer(limit, end)
    timer.daemon = True
    before_end, signals.before_end = signals.before_end, ended_by
    if factor is not None:
        timer.start()
    try:
        yield held.append
    finally:
        timer.cancel()
        signals.before_end = before_end
