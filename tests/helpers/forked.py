"""Commands in processes forked from one that has done the imports, which are most of what a short run takes.

As `python COMMAND`, or as torchrun would start it on several processes. Of each way in which torchrun starts a command
or ends with it one test has the real one.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.process
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from launch.processes import kill_tree
from tests.helpers.paths import ROOT

_CONTEXT = multiprocessing.get_context("forkserver")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def once(arguments: Sequence[str]) -> list[str]:
    """Without the key=value that a later one of the same key replaces: a command takes each key once, and what tests
    share is a list to which each adds its own."""
    last = {text.partition("=")[0]: at for at, text in enumerate(arguments) if not text.startswith("-")}
    return [text for at, text in enumerate(arguments) if "=" not in text or at >= last.get(text.partition("=")[0], at)]


@dataclass(frozen=True)
class Started:
    """Ranks of a command that is under way; what they say goes to files in `folder`."""

    ranks: Sequence[multiprocessing.process.BaseProcess]
    folder: Path

    def code(self) -> int | None:
        """Of the first rank that has failed; 0 where all have ended well, None while they run."""
        codes = [rank.exitcode for rank in self.ranks]
        failed = [code for code in codes if code]
        return failed[0] if failed else None if None in codes else 0

    def wait(self, timeout_s: float) -> int | None:
        """The code, or None where it takes longer."""
        deadline = time.monotonic() + timeout_s
        while (code := self.code()) is None and time.monotonic() < deadline:
            running = [rank.sentinel for rank in self.ranks if rank.exitcode is None]
            multiprocessing.connection.wait(running, timeout=1)
        return code

    def said(self, stream: str) -> str:
        """On "out" or "err", one rank after another."""
        files = sorted(self.folder.glob(f"*.{stream}"))
        return "".join(path.read_text(errors="replace") for path in files)

    def send_signal(self, number: int) -> None:
        """To each rank that runs."""
        for rank in self.ranks:
            if rank.pid is not None and rank.exitcode is None:
                os.kill(rank.pid, number)

    def kill(self) -> None:
        """SIGKILL to all ranks at once, and to what they have started."""
        running = [rank.pid for rank in self.ranks if rank.pid is not None and rank.exitcode is None]
        for pid in running:  # stopped first: none is to see that another one is lost
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        for pid in running:
            kill_tree(pid)
        for rank in self.ranks:
            if rank.pid in running:
                rank.join()


@contextlib.contextmanager
def started(
    *command: str | Path, processes: int = 1, more_environment: Mapping[str, str] | None = None
) -> Iterator[Started]:
    """launch/NAME.py ..., -m MODULE ... or -c CODE ..., killed at the end of the block where it still runs."""
    arguments = once([str(part) for part in command])
    _start_server()
    # Held here as torchrun's agent holds it: no port has to be guessed.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(processes):
            variables = environment() | (_of_rank(rank, processes, store.port) if store else {})
            variables |= more_environment or {}
            ranks.append(_CONTEXT.Process(target=_execute, args=(arguments, variables, f"{folder}/{rank}")))
        job = Started(ranks, Path(folder))
        try:
            for process in ranks:
                process.start()
            yield job
        finally:
            job.kill()


@dataclass(frozen=True)
class Torchrun:
    """The real torchrun under way, as Started."""

    process: subprocess.Popen[bytes]
    folder: Path

    def code(self) -> int | None:
        return self.process.poll()

    def wait(self, timeout_s: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        return self.code()

    def said(self, stream: str) -> str:
        return (self.folder / stream).read_text(errors="replace")

    def kill(self) -> None:
        kill_tree(self.process.pid)
        self.process.wait()


@contextlib.contextmanager
def under_torchrun(
    *command: str | Path, processes: int = 1, more_environment: Mapping[str, str] | None = None
) -> Iterator[Torchrun]:
    """As `started`, by `python -m torch.distributed.run`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = [*launcher, *once([str(part) for part in command])]
    variables = {**environment(), **(more_environment or {})}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            job = Torchrun(subprocess.Popen(arguments, cwd=ROOT, env=variables, stdout=out, stderr=err), folder)
            try:
                yield job
            finally:
                job.kill()


def finished(
    *command: str | Path,
    processes: int = 1,
    timeout_s: float = 400,
    more_environment: Mapping[str, str] | None = None,
    torchrun: bool = False,
) -> subprocess.CompletedProcess[str]:
    """A command run to its end; the first rank that fails ends the others, and its code is that of the command.
    torchrun: under the real one, whose code is 1 where a rank fails."""
    start = under_torchrun if torchrun else started
    with start(*command, processes=processes, more_environment=more_environment) as job:
        code = job.wait(timeout_s)
        job.kill()
        out, err = job.said("out"), job.said("err")
    assert code is not None, f"not within {timeout_s} s: {command}\n{out[-2000:]}{err[-2000:]}"
    return subprocess.CompletedProcess([str(part) for part in command], code, out, err)


def _start_server() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        _CONTEXT.set_forkserver_preload(["tests.helpers.preloaded"])
        multiprocessing.forkserver.ensure_running()


def _of_rank(rank: int, processes: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {name: str(value) for name, value in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _execute(command: list[str], variables: dict[str, str], log: str) -> None:
    """In the forked process."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
