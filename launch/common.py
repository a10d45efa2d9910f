"""What every command shares: one message for a user's mistake, exit code 2, no traceback."""

import contextlib
import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from data.errors import DataError
from trainer.errors import CheckpointError, CompileError, ConfigError, RunError

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit: 0 success, 1 a check falls short, 2 bad input."""
    try:
        code = main() or 0
    except (ConfigError, DataError, CheckpointError, CompileError) as error:
        code = _report(str(error), 2)
    except RunError as error:
        code = _report(str(error), 1)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        code = _report(
            f"{where}{error.strerror}: make room or give rights, then run the same command again", 2, alike=False
        )
    sys.stdout.flush()
    sys.exit(code)


def end_with_torchrun() -> None:
    """Have the kernel kill this worker when torchrun dies. A check in a thread would not run while the worker is being
    built, nor while a call holds Python's lock. Without torchrun nothing changes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


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


def _parents() -> dict[int, int]:
    """{process: its parent}"""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    return parents


def _report(message: str, code: int, alike: bool = True) -> int:
    """alike: all ranks have much the same to say."""
    if alike and os.environ.get("RANK", "0") != "0":
        # Rank 0 nearly always has the same message; torchrun ends this process before it would repeat it.
        time.sleep(15)
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
