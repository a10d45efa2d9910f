"""Commands in processes forked from one that has done the imports, which are most of what a short run takes.

As `python COMMAND`, or as torchrun would start it on several processes; the tests of torchrun itself, of kills and of
signals start the real one.
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.process
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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


def finished(*command: str | Path, processes: int = 1, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    """launch/NAME.py ... or -m MODULE ..., run to its end; the output of its ranks one after another.

    The first rank that fails ends the others; its code is that of the command.
    """
    arguments = once([str(part) for part in command])
    _start_server()
    # Held here as torchrun's agent holds it: no port has to be guessed.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(processes):
            variables = environment() | (_of_rank(rank, processes, store.port) if store else {})
            ranks.append(_CONTEXT.Process(target=_execute, args=(arguments, variables, f"{folder}/{rank}")))
        try:
            for process in ranks:
                process.start()
            code = _ended(ranks, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                if process.pid is not None and process.exitcode is None:
                    kill_tree(process.pid)
                    process.join()
        out, err = (
            "".join(path.read_text(errors="replace") for path in sorted(Path(folder).glob(f"*.{name}")))
            for name in ("out", "err")
        )
    assert code is not None, f"not within {timeout_s} s: {' '.join(arguments)}\n{out[-2000:]}{err[-2000:]}"
    return subprocess.CompletedProcess(arguments, code, out, err)


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


def _ended(ranks: Sequence[multiprocessing.process.BaseProcess], deadline: float) -> int | None:
    """Exit code of the first rank that fails, 0 where none does, None where it takes too long."""
    running = list(ranks)
    while running:
        multiprocessing.connection.wait([process.sentinel for process in running], timeout=1)
        running = [process for process in running if process.exitcode is None]
        if failed := [process.exitcode for process in ranks if process.exitcode]:
            return failed[0]
        if time.monotonic() > deadline:
            return None
    return 0


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
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
