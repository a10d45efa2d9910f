"""End a command with all the processes that it has started."""

import contextlib
import os
import signal
from pathlib import Path


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
