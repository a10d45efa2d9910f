"""The process of a command and those that it starts: its imports, what it may open, that none is left when it ends."""

import contextlib
import ctypes
import gc
import logging
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

_OPEN_FILES = 65536
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WATCHDOG = "watch_"  # threads that are left in a store that does not answer; they would abort the interpreter's end


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For what is slow to import. It makes 800,000 objects, and nearly all stay: to look through them for garbage
    while they come, and once more when the process ends, would be a third of the time that its start and end take."""
    known = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        gc.enable()


def end_process(main: Callable[[], int]) -> NoReturn:
    """End this process with the code that `main` returns, once all that it has printed is written.

    Where nobody reads that any more, as after `| head`, it ends as other tools do that SIGPIPE ends: without a message,
    with code 141. The signal itself stays ignored: it would also end a run whose peer has closed a socket.
    """
    try:
        try:
            code = main()
        except SystemExit:  # of --help
            print(end="", flush=True)
            raise
        print(end="", flush=True)
    except BrokenPipeError:
        if not _silence_unread():
            raise
        code = 128 + signal.SIGPIPE
    if any(thread.name.startswith(_WATCHDOG) for thread in threading.enumerate()):
        with contextlib.suppress(BrokenPipeError):
            print(end="", file=sys.stderr, flush=True)
        os._exit(code)
    sys.exit(code)


def _silence_unread() -> list[int]:
    """Those of standard output and error that nobody reads any more. What is still written to them, as Python does with
    its buffers at its end, goes nowhere."""
    unread = []
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            unread.append(descriptor)
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return unread


def end_with_torchrun() -> None:
    """Have the kernel kill this worker when torchrun dies. A check in a thread would not run while the worker is being
    built, nor while a call holds Python's lock. Without torchrun nothing changes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def allow_open_files() -> int:
    """Raise this process's limit of open files as far as its user may, and return it: each tensor that a worker hands
    over is one, and systems begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def quieten_imports() -> None:
    """Where torchao is installed, transformers and diffusers import it, which says much about what nobody asked for."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that descend from it. torchrun's workers are in process groups of their own: killed
    by its group alone it would leave them training."""
    doomed, found = set[int](), {pid}
    while found:  # stopped first: what runs might start another one meanwhile
        for process in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGSTOP)
        doomed |= found
        found = {child for child, parent in _parents().items() if parent in doomed} - doomed
    for process in doomed:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)


def children(pid: int) -> set[int]:
    """The processes that a process has started."""
    return {child for child, parent in _parents().items() if parent == pid}


def _parents() -> dict[int, int]:
    """{process: its parent}"""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    return parents
